"""What methods are that train the model as a whole, against its own loss: the mean cross-entropy of the next token."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..allocation.allocations import block_of
from ..base.checks import one_of, require
from ..base.errors import UserError
from ..base.memory import free_host
from ..layer.inputs import Statistics
from ..model.blocks import BlockModel
from ..model.layers import find_layer
from ..model.structure import find_blocks
from ..patterns import Pattern
from ..pruning.job import PruneJob
from ..pruning.method import ModelMethod
from ..pruning.rows import LayerRow, PruneResult
from ..pruning.tools import Tools
from ..training.optimisers import eight_bit
from ..training.recipe import Recipe
from ..training.trainer import Companion, Trainer, taken_over
from ..training.whole import Checkpointing, window_bytes, working_dtypes

_FILE = "training.pt"


@dataclass(frozen=True)
class TrainingMethod(ModelMethod):
    """Base of methods that train the model on text. They are not one-shot, and tables mark their rows.

    Attributes:
        steps: of the optimiser.
        batch: windows per step.
        tokens: to train on, the calibration windows first, then other text of the data set; seen again, in another
            order, where there are more steps than that. None: as many as the steps see.
        rate: learning rate of AdamW (β = 0.9, 0.95; no decay).
        schedule: of the rate: "linear" and "cosine" end at 0; "constant".
        warmup: share of the steps in which the rate rises.
        clip: largest norm of the gradients; None: they are not clipped.
        others: embeddings, norms, biases and the head follow gradients too.
        precision: "bfloat16" computes under autocast, "float32" does not; "auto" is bfloat16 on a GPU.
        state: of the optimiser; "8bit" needs torchao or bitsandbytes.
        micro: windows per backward pass; None: as many of a batch as fit.
        saved: steps between checkpoints, where one is due.
        patience: end after so many looks at held-out windows without improvement, where a method has use for them.
    """

    statistics: ClassVar[Statistics] = Statistics.NONE
    kinds: ClassVar[frozenset[str] | None] = None
    shares: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    label: ClassVar[str] = "training"

    steps: int = 4096
    batch: int = 8
    tokens: int | None = None
    rate: float = 2e-4
    schedule: str = "linear"
    warmup: float = 0.0
    clip: float | None = 1.0
    others: bool = True
    precision: str = "auto"
    state: str = "float32"
    micro: int | None = None
    saved: int = 100
    patience: int = 3

    def __post_init__(self) -> None:
        self.recipe()
        one_of("method.others", self.others, (True, False))
        if self.tokens is not None:
            require("method.tokens", self.tokens, int, 2, float("inf"))

    def recipe(self, micro: int | None = None) -> Recipe:
        """How the training goes.

        Args:
            micro: windows per backward pass, where an earlier attempt has found that there is no memory for more.
        """
        same = ("rate", "steps", "batch", "clip", "warmup", "schedule", "precision", "state", "saved", "patience")
        given = {name: getattr(self, name) for name in same}
        micro = min((most for most in (self.micro, micro) if most is not None), default=None)
        return Recipe(judged=10, micro=micro, key="method", **given)

    def training_windows(self, seqlen: int) -> int:
        most = self.steps * self.batch
        asked = most if self.tokens is None else math.ceil(self.tokens / seqlen)
        if asked > most:
            raise UserError(
                f"method.tokens={self.tokens} are more than the {most * seqlen} that {self.steps} steps of "
                f"{self.batch} windows of {seqlen} see: give method.steps={math.ceil(asked / self.batch)}, or "
                "method.tokens=null"
            )
        return asked

    def trained_windows(self) -> int:
        return self.steps * self.batch

    def for_layers(self, patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]]) -> TrainingMethod:
        if self.state == "8bit":
            eight_bit()
        return super().for_layers(patterns, shapes)

    @property
    def whole(self) -> bool:
        """Whether parameters are trained as they are, with all that they hold."""
        return True

    def misfit_of_experts(self, names: Collection[str]) -> str | None:
        return None

    @abstractmethod
    def state_bytes(self, network: nn.Module, patterns: Mapping[str, Pattern], itemsize: int) -> float:
        """What it holds beside the weights: masters, gradients, moments, and what is its own."""

    def moment_bytes(self) -> int:
        """Of AdamW's two moments of a weight."""
        return 2 if self.state == "8bit" else 8

    def memory(
        self, network: nn.Module, patterns: Mapping[str, Pattern], itemsize: int, seqlen: int, devices: int = 1
    ) -> int:
        """Memory of a device that it takes at least, in bytes: one window at a time, activations made again.

        Args:
            network: the model, or its skeleton.
            patterns: of the layers that are pruned.
            itemsize: bytes of a weight.
            seqlen: tokens in a window.
            devices: that divide masters, gradients, moments and the method's own among them.
        """
        _, blocks = find_blocks(network)
        weights = sum(parameter.numel() for parameter in network.parameters())
        shapes = [tuple(parameter.shape) for parameter in blocks.parameters() if parameter.ndim == 2]
        vocabulary = network.config.get_text_config(decoder=True).vocab_size
        window = window_bytes(shapes, itemsize, len(blocks), seqlen, vocabulary)
        state = self.state_bytes(network, patterns, itemsize) / devices
        if devices > 1:  # gradients that wait to be sent
            state += itemsize * max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        return int(weights * itemsize + state + window)

    def text(self, job: PruneJob) -> Tensor:
        """(windows, seqlen) those to train on.

        Raises:
            UserError: there are too few.
        """
        seqlen = job.tokens.shape[1]
        windows = torch.cat([job.tokens, job.text]) if job.text is not None else job.tokens
        if len(windows) < (asked := self.training_windows(seqlen)):
            raise UserError(
                f"{self.label} trains on {asked} windows of {seqlen} tokens, and there are {len(windows)}: give more "
                f"text, fewer method.steps, or method.tokens={len(windows) * seqlen} to see them several times"
            )
        return windows[:asked]

    def check(self, model: BlockModel, job: PruneJob, tools: Tools) -> None:
        """Raise UserError for a model that cannot be trained here."""
        refuse_streamed(self.label, model.source is not None)
        if taken_over(tools.store.file(_FILE)):
            return
        weights, devices = sum(parameter.numel() for parameter in model.model.parameters()), tools.team.size
        needed = self.memory(model.model, job.patterns, model.size // weights, job.tokens.shape[1], devices)
        device = model.device
        there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else free_host() + model.size
        if needed > there:
            each = f" on each of {devices} devices" if devices > 1 else ""
            raise UserError(
                f"{self.label} needs at least {needed / 1e9:.3g} GB of memory for this model{each}, and {device} has "
                f"{there / 1e9:.3g} GB: give method.state=8bit, shorter windows (seqlen), more devices, or larger ones"
            )

    def fit(
        self,
        model: BlockModel,
        job: PruneJob,
        tools: Tools,
        trained: Mapping[str, Tensor | None],
        companions: Sequence[Companion] = (),
        held_out: bool = False,
    ) -> dict:
        """Train on the device that the model is on as a whole (`whole.on_device`); what was done.

        Args:
            model, job, tools: as in `run`.
            trained: weights with their masks, as in `Trainer`.
            companions: what is added to the steps.
            held_out: the held-out windows choose among the weights.
        """
        windows, ladder = self.text(job), tools.ladder
        recipe = self.recipe(ladder.micro)
        with Checkpointing(model.blocks) as checkpointing:
            done = Trainer(
                model.model,
                trained,
                cross_entropy(model, windows, job.held_out),
                len(windows),
                recipe,
                held_out=len(job.held_out) if held_out and job.held_out is not None else 0,
                working=working_dtypes(recipe.compute(model.device)),
                label=self.label,
                quiet=job.quiet,
                file=tools.store.file(_FILE),
                lighter=checkpointing.begin,
                shrunk=lambda micro: ladder.for_training(self.label, micro, {}),
                companions=companions,
                together=tools.team,
                shared=True,
                blocks=model.blocks,
            ).run()
        done = dataclasses.asdict(done)
        seen = done["windows"] * windows.shape[1]
        rate = seen / done["seconds"]
        return done | {"tokens": seen, "distinct_tokens": windows.numel(), "tokens_per_second": rate}


def refuse_streamed(what: str, streamed: bool) -> None:
    """Raise UserError if the blocks are read from files one at a time."""
    if streamed:
        raise UserError(
            f"{what} trains all blocks at once and needs the model in memory, and this one is read from its files "
            "block by block: give stream=false on a machine with more memory, or a method that prunes block by block"
        )


def cross_entropy(
    model: BlockModel, windows: Tensor, held_out: Tensor | None
) -> Callable[[Sequence[int], bool], Tensor]:
    """The mean over tokens of -log p(next token), as a `Trainer` asks for it: of windows, or of held-out ones."""

    def loss(numbers: Sequence[int], judging: bool) -> Tensor:
        tokens = (held_out if judging else windows)[list(numbers)].to(model.device)
        logits = model.forward(tokens)[:, :-1].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())

    return loss


@torch.no_grad()
def judged(model: BlockModel, windows: Tensor | None) -> float | None:
    """The mean cross-entropy of some windows, None without any, by the model as it is."""
    if windows is None:
        return None
    loss = cross_entropy(model, windows, None)
    return math.fsum(float(loss([number], False)) for number in range(len(windows))) / len(windows)


def accounted(model: BlockModel, job: PruneJob, method: ModelMethod, done: dict, stats: Mapping) -> PruneResult:
    """The result of a training.

    Args:
        model: as it was trained.
        job: what was asked.
        method: that trained.
        done: what the trainer did.
        stats: layer name → what else there is to say of it.
    """
    result = PruneResult(training=done, notes=list(done["notes"]))
    result.add_seconds({"train": done["seconds"]})
    for name, pattern in job.patterns.items():
        weight = find_layer(model.model, name).weight
        row = LayerRow.plain(name, block_of(name), weight, pattern, pattern.selected(method.selection))
        row = dataclasses.replace(row, status="fixed", iterations=done["steps"], stats=dict(stats[name]))
        result.layers.append(row)
    return result
