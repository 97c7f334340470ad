"""Finishing a block: its kept weights follow gradients towards the dense block's output.

Per token t, with o the pruned block's output for its input in the pruned model, and y the dense block's for its input
in the dense model, the loss is mean_t ‖o_t - y_t‖² / ‖y_t‖².
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.ladder import CALIBRATION
from ..calibration.streams import DENSE, FRESH, HELD_OUT
from ..model.blocks import hidden_of
from ..pruning.block import BlockProblem
from ..pruning.stages import Stage
from ..training.casting import floats_in
from ..training.finish import BlockFinish
from ..training.losses import relative_error
from ..training.trainer import Trainer

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # there is room for one block


@dataclass(frozen=True)
class FinishBlock(Stage):
    """The stage after the one that prunes. Weights that are zero stay zero; norms and biases stay as they are."""

    choice: BlockFinish
    minutes: float | None = None  # of all blocks together

    def run(self, block: BlockProblem) -> None:
        block.advance_dense()
        block.watch.lap("propagate")
        if not block.layers:
            return
        ladder, streams, team = block.tools.ladder, block.streams, block.tools.team
        windows, every = streams.calibration, len(block.job.tokens) + block.job.fresh_blocks
        share = None if self.minutes is None else self.minutes / block.job.blocks
        trainer = Trainer(
            block.module,
            _masks(block),
            _Loss(block),
            len(windows) + (len(streams.fresh) if streams.fresh is not None else 0),
            self.choice.recipe(every, windows.width, share, ladder.micro),
            held_out=len(streams.held_out),
            working=_WIDE,
            label=f"finishing {block.name}",
            quiet=True,
            lighter=lambda: ladder.lighter_training(block.name, streams.states),
            together=team,
            shrunk=lambda micro: ladder.for_training(block.name, micro, streams.states),
            blocks=[block.module],
        )
        done = dataclasses.asdict(trainer.run())
        seconds = block.watch.lap("finish")
        block.finished = {"block": block.index, **done, "seconds": seconds, "tokens": done["windows"] * windows.seqlen}


def _masks(block: BlockProblem) -> dict[str, Tensor]:
    return {layer.stored.removeprefix(f"{block.name}."): layer.held != 0 for layer in block.layers.values()}


class _Loss:
    """The mean over tokens of the relative error of the block's output."""

    def __init__(self, block: BlockProblem) -> None:
        self._block = block
        self._dtype = torch.promote_types(next(iter(block.layers.values())).weight.dtype, torch.float32)

    def __call__(self, numbers: Sequence[int], held_out: bool) -> Tensor:
        block = self._block
        hidden = self._taken("", numbers, held_out)
        call = block.model.call(block.index, hidden)
        args, kwargs = floats_in(self._dtype, (call.args, call.kwargs))
        output = hidden_of(block.module(hidden.to(self._dtype), *args, **kwargs))
        return relative_error(output, self._taken(f"{DENSE} ", numbers, held_out))

    def _taken(self, through: str, numbers: Sequence[int], held_out: bool) -> Tensor:
        """Hidden states of windows; the numbers of fresh ones follow those of the calibration windows."""
        states = self._block.streams.states
        if held_out:
            return states[f"{through}{HELD_OUT}"].take(numbers)
        first = len(states[CALIBRATION])
        own, more = [n for n in numbers if n < first], [n - first for n in numbers if n >= first]
        parts = [states[f"{through}{name}"].take(part) for name, part in ((CALIBRATION, own), (FRESH, more)) if part]
        if len(parts) == 1:
            return parts[0]
        job = self._block.job
        self._block.model.know_calls(torch.cat([job.tokens, job.fresh])[: len(numbers)])  # of this shape
        return torch.cat(parts)
