"""Distillation: all kept weights together follow gradients towards the dense model's next-token distributions.

Per token, with p the dense model's distribution and q the pruned one's, the loss is KL(p ‖ q). The dense model is not
there any more by then, and need not be: what lies behind its last block is kept, some bytes per token, and its own norm
and head, which are never pruned, make the distributions of it again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..base.clock import Stopwatch
from ..base.errors import UserError
from ..base.memory import free_host
from ..base.progress import Progress
from ..calibration.ladder import naming_the_step
from ..model.blocks import BlockModel
from ..model.hidden import HiddenStates
from ..model.layers import find_layer
from ..model.structure import block_layers
from ..pruning.job import PruneJob
from ..pruning.rows import PruneResult
from ..pruning.tools import Tools
from ..training.finish import Distillation
from ..training.losses import divergence, divergence_in_pieces
from ..training.trainer import Trainer, completed, taken_over
from ..training.whole import Checkpointing, on_device, window_bytes, working_dtypes

_FILE = "distil.pt"
# At most this many logits at once (512 MB in float32); of a window that has more, so many positions at a time.
_LOGITS = 2**27


class Teacher:
    """What the dense model makes of the windows, behind its last block. To be made before anything is pruned.

    Args:
        model: the dense model.
        job: what is asked.
        tools: what a model method works with.

    Attributes:
        tokens: (windows, seqlen) those to train on, then the held-out ones.
        windows, held_out: how many of each.
        states: their hidden states; None where an earlier attempt, or processes that work together, have distilled
            already, and only what they have left is to be taken over.
        seconds: that it took.

    Raises:
        UserError: a model that is not in memory, or too large for the device.
    """

    def __init__(self, model: BlockModel, job: PruneJob, tools: Tools) -> None:
        refuse_streamed(model.source is not None)
        needed = 0 if taken_over(tools.store.file(_FILE)) else _check_memory(model, job, tools.team.size)
        fresh = job.fresh if job.fresh is not None else job.tokens[:0]
        self.tokens = torch.cat([job.tokens, fresh, job.held_out])
        self.held_out = len(job.held_out)
        self.windows = len(self.tokens) - self.held_out
        watch, self.states = Stopwatch(model.device), None
        if all(tools.team.gather([completed(tools.store.file(_FILE))])):  # all do the same, whatever one can read
            self.seconds = 0.0
            return
        with naming_the_step("the dense model's forward (finish=distil)"):
            place, room = tools.ladder.place, _room(model, needed)
            self.states = HiddenStates(model, self.tokens, job.batch_size, place, room=room, sharers=tools.team.size)
            for index in Progress(range(len(model)), "dense forward for the distillation", quiet=job.quiet):
                with model.block(index, changing=False) as block:
                    self.states.advance(model, index, block)
        self.seconds = watch.lap("distil")


def refuse_streamed(streamed: bool) -> None:
    """Raise UserError if the blocks are read from files one at a time."""
    if streamed:
        raise UserError(
            "finish=distil trains all blocks at once and needs the model in memory, and this one is read from its "
            "files block by block: give finish=block, or stream=false on a machine with more memory"
        )


def distil(model: BlockModel, job: PruneJob, tools: Tools, teacher: Teacher, result: PruneResult) -> None:
    """Train the pruned model in place, and account for it in the result. What a killed attempt has reached is gone on
    from, where the store keeps files."""
    choice, ladder = job.finish.distil, tools.ladder
    streams = {"teacher": teacher.states} if teacher.states is not None else {}
    with on_device(model, "finish=distil"), Checkpointing(model.blocks) as checkpointing:
        layers = (find_layer(model.model, name) for name in job.patterns)
        held = {layer.stored: layer.held for layer in layers}  # experts share theirs
        width = teacher.states.width if teacher.states is not None else _text_config(model).hidden_size
        gone = math.fsum(done["seconds"] for done in result.finish.get("blocks", []))
        minutes = job.finish.distil_minutes(tools.team.tell(gone))
        recipe = choice.recipe(teacher.windows, width, minutes, ladder.micro)
        working = working_dtypes(recipe.compute(model.device))

        def lighter() -> str | None:
            return checkpointing.begin() or ladder.lighter_training("the distillation", streams)

        trainer = Trainer(
            model.model,
            {name: weight != 0 for name, weight in held.items()},  # a byte per weight, not kept
            _loss(model, teacher, working),
            teacher.windows,
            recipe,
            held_out=teacher.held_out,
            working=working,
            label="distilling",
            quiet=job.quiet,
            file=tools.store.file(_FILE),
            lighter=lighter,
            shrunk=lambda micro: ladder.for_training("the distillation", micro, streams),
            together=tools.team,
            shared=True,
            blocks=model.blocks,
        )
        done = dataclasses.asdict(trainer.run())
        result.layers = [_recounted(row, model) for row in result.layers]
    seconds = teacher.seconds + done["seconds"]  # of all attempts, and of a team's processes
    result.notes = [*dict.fromkeys([*result.notes, *done["notes"], *ladder.notes])]
    result.add_seconds({"distil": seconds})
    seqlen = teacher.tokens.shape[1]
    result.finish["distil"] = {
        **done,
        "seconds": seconds,
        "tokens": done["windows"] * seqlen,
        "distinct_tokens": teacher.windows * seqlen,
        "fresh_tokens": (teacher.windows - len(job.tokens)) * seqlen,
    }
    # The rows were measured block by block, on inputs that the distillation has changed since.
    result.finish["layer_losses"] = "before the distillation"


def _loss(
    model: BlockModel, teacher: Teacher, working: Mapping[torch.dtype, torch.dtype]
) -> Callable[[Sequence[int], bool], Tensor]:
    seqlen, vocabulary = teacher.tokens.shape[1], _text_config(model).vocab_size
    positions = -(-seqlen // -(-seqlen * vocabulary // _LOGITS))
    together = max(1, _LOGITS // (seqlen * vocabulary))  # windows whose logits the dense model's head makes at once

    def loss(numbers: Sequence[int], held_out: bool) -> Tensor:
        if teacher.states is None:
            raise UserError(f"{_FILE} is the checkpoint of another distillation: start again with resume=false")
        rows = [number + teacher.windows * held_out for number in numbers]
        tokens = teacher.tokens[rows].to(model.device, non_blocking=True)
        hidden = teacher.states.take(rows)
        # The head that they go through computes in that as long as the training lasts, and not every norm casts.
        hidden = hidden.to(working.get(hidden.dtype, hidden.dtype))
        if positions == seqlen:
            logits = model.forward(tokens)
            parts = zip(tokens.split(together), hidden.split(together), strict=True)
            return divergence(logits, (window for part in parts for window in model.head(*part)))

        def logits(window: int, part: slice, piece: Tensor) -> Tensor:
            return model.logits(tokens[window : window + 1, part], piece)

        def wanted(window: int, part: slice) -> Tensor:
            return model.head(tokens[window : window + 1, part], hidden[window : window + 1, part])

        return divergence_in_pieces(model.behind(tokens), positions, logits, wanted)

    return loss


def _text_config(model: BlockModel):
    return model.model.config.get_text_config(decoder=True)


def _recounted(row, model: BlockModel):
    weight = find_layer(model.model, row.name).weight
    return dataclasses.replace(row, sparsity=1 - int(weight.count_nonzero()) / weight.numel())


def device_bytes(
    choice: Distillation,
    layers: Mapping[str, tuple[tuple[int, int], float]],
    weights: int,
    itemsize: int,
    blocks: int,
    seqlen: int,
    vocabulary: int,
    devices: int = 1,
) -> int:
    """Device memory that a distillation takes at least: one window at a time, activations made again.

    Args:
        choice: how.
        layers: name → ((out, in), sparsity) of the layers to train.
        weights: number of the model's parameters.
        itemsize: bytes of each.
        blocks: number of decoder blocks.
        seqlen: tokens in a window.
        vocabulary: number of tokens that there are.
        devices: that divide masters, gradients and moments among them.
    """
    sizes = {name: shape[0] * shape[1] for name, (shape, _) in layers.items()}
    kept = sum((1 - layers[name][1]) * size for name, size in sizes.items())
    # Per kept weight its master and gradient, and AdamW's two moments; per weight a bit that says which are kept.
    state = kept * (4 + 4 + (2 if choice.state == "8bit" else 8)) / devices + sum(sizes.values()) / 8
    if devices > 1:  # gradients of about a block that wait to be sent
        state += itemsize * sum(sizes.values()) / blocks
    held = min(vocabulary, _LOGITS / seqlen)
    window = window_bytes([shape for shape, _ in layers.values()], itemsize, blocks, seqlen, held)
    return int(weights * itemsize + state + max(sizes.values()) * itemsize + window)


def _room(model: BlockModel, needed: int) -> float | None:
    """What the dense model's hidden states may take on the device: they are there before the masters are, which must
    find room; and more windows per backward pass are worth more than a copy of some megabytes in each step."""
    return (device_memory(model.device) - needed) / 8 if model.device.type == "cuda" else None


def device_memory(device: torch.device) -> int:
    """What a GPU has in all."""
    return torch.cuda.mem_get_info(device)[1]


def _check_memory(model: BlockModel, job: PruneJob, devices: int) -> int:
    """What it takes at least; refuse what no measure can make fit, before hours are spent."""
    shapes = {
        name: (layer.shape, job.patterns[name].sparsity)
        for index, block in enumerate(model.blocks)
        for name, layer in block_layers(block, model.name(index), job.selection.excluded).items()
        if name in job.patterns
    }
    config = _text_config(model)
    count = sum(parameter.numel() for parameter in model.model.parameters())
    precision, on_gpu = job.finish.distil.precision, model.device.type == "cuda"
    itemsize = 4 if precision == "float32" or (precision == "auto" and not on_gpu) else model.size // count
    needed = device_bytes(
        job.finish.distil, shapes, count, itemsize, len(model), job.tokens.shape[1], config.vocab_size, devices
    )
    total = device_memory(model.device) if on_gpu else free_host() + model.size
    if needed > total:
        raise UserError(
            f"finish=distil needs at least {needed / 1e9:.3g} GB of memory for this model, and {model.device} has "
            f"{total / 1e9:.3g} GB: give finish=block, finish.distil.state=8bit, or shorter windows (seqlen)"
        )
    return needed
