"""The hidden states that travel through the blocks, one block after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..model.blocks import BlockModel
from ..model.hidden import HiddenStates
from .ladder import CALIBRATION, Ladder, naming_the_step
from .replay import Replay

HELD_OUT = "held out"
FRESH = "fresh"  # text that blocks are finished on beside the calibration windows
DENSE = "dense"  # in front of a stream's name: the same windows through the dense model, beside the pruned one


@dataclass
class Streams:
    """Hidden states by name: those of the calibration windows, of held-out ones and of fresh text, and of all of them
    through the dense model where they go through the pruned one. None at all where no block needs a forward.

    All are under one ladder against lack of device memory.

    Attributes:
        model: the model.
        ladder: the measures taken.
        states: the hidden states by the stream's name.
        blocks: through how many blocks they go, the first ones: behind the last of them nobody reads them.
        dense: names of the streams that go through the dense model.
    """

    model: BlockModel
    ladder: Ladder
    states: dict[str, HiddenStates] = field(default_factory=dict)
    blocks: int = 0
    dense: frozenset[str] = frozenset()

    @classmethod
    def open(
        cls,
        model: BlockModel,
        windows: Mapping[str, Tensor],
        batch_size: int,
        blocks: int,
        ladder: Ladder,
        propagate: str,
        beside: bool,
    ) -> Streams:
        """Embed the windows.

        Args:
            model: the model.
            windows: (windows, seqlen) token ids by the stream's name.
            batch_size: windows per forward.
            blocks: how many blocks they will go through, the first ones.
            ladder: the measures taken so far.
            propagate: "pruned" or "dense": which model's blocks they go through.
            beside: the same windows go through the dense model too.
        """
        with naming_the_step("embedding"):
            options = (batch_size, ladder.place, min(blocks, len(model)))
            states = {name: HiddenStates(model, ids, *options) for name, ids in windows.items()}
            if beside:
                states |= {f"{DENSE} {name}": stream.copy() for name, stream in states.items()}
        through = frozenset(name for name in states if propagate == DENSE or name.startswith(f"{DENSE} "))
        streams = cls(model, ladder, states, blocks, through)
        ladder.take_over("embedding", states)
        return streams

    @property
    def calibration(self) -> HiddenStates:
        """Those of the calibration windows."""
        return self.states[CALIBRATION]

    @property
    def held_out(self) -> HiddenStates | None:
        """Those of the held-out windows, where there are such."""
        return self.states.get(HELD_OUT)

    @property
    def fresh(self) -> HiddenStates | None:
        """Those of fresh text, where blocks are finished on it."""
        return self.states.get(FRESH)

    @property
    def beside(self) -> HiddenStates:
        """Those of the calibration windows through the dense model."""
        return self.states[f"{DENSE} {CALIBRATION}"]

    @property
    def place(self) -> str | None:
        """Where they are, "device", "host" or "disk"; None without any."""
        return self.calibration.place if self.states else None

    def reach(self, index: int) -> bool:
        """Whether they come to this block."""
        return index < self.blocks

    def any(self, dense: bool) -> bool:
        """Whether some go through the dense model, or through the pruned one."""
        return bool(self.dense) if dense else bool(self.states.keys() - self.dense)

    def drift(self, gather: Callable[[list], list] = list) -> dict[str, dict[str, float]]:
        """How far the pruned model's hidden states have come from the dense one's, by stream: of the relative errors
        ‖h_p - h_d‖² / ‖h_d‖² of all tokens, `mean` and `median` of all but each window's first, and `first` the mean of
        those. Empty where the dense model does not go beside.

        Args:
            gather: gives what all processes have, which divide the calibration windows.
        """
        found = {}
        for name in self.states:
            if f"{DENSE} {name}" in self.states and name != FRESH:
                errors = self._errors(name)
                errors = torch.cat(gather([errors])) if name == CALIBRATION else errors
                rest = errors[:, 1:] if errors.shape[1] > 1 else errors
                values = {"mean": rest.mean(), "median": rest.median(), "first": errors[:, 0].mean()}
                found[name] = {key: float(value) for key, value in values.items()}
        return found

    def _errors(self, name: str) -> Tensor:
        pruned, dense, found = self.states[name], self.states[f"{DENSE} {name}"], []
        for begin, end in pruned.spans():
            wanted = dense.at(begin, end).float()
            error = (pruned.at(begin, end).float() - wanted).square().sum(-1)
            found.append((error / wanted.square().sum(-1).clamp_min(1e-30)).cpu())
        return torch.cat(found)

    def rechunk(self, sizes: Mapping[str, list[int]]) -> None:
        """Forward the windows in the batches of an earlier attempt, where it has left such."""
        for name, stream in self.states.items():
            if sizes.get(name):
                stream.rechunk(sizes[name])

    def advance(self, index: int, block: nn.Module, dense: bool, replay: Replay | None = None) -> dict[str, list[int]]:
        """Replace hidden states by the block's output, unless it is the last block that they go through.

        Args:
            index: the block's.
            block: with the weights that the model has which these streams go through.
            dense: those that go through the dense model, or those that go through the pruned one.
            replay: what was kept of the block's forwards on them. Of windows that go through the dense model alone it
                was kept with pruned weights, and is not taken.

        Returns:
            Windows of each forward, by the stream's name.
        """
        if not self.reach(index + 1):
            return {}
        moving = {name: stream for name, stream in self.states.items() if (name in self.dense) == dense}
        with naming_the_step(self.model.name(index)):
            for name, stream in moving.items():
                ours = replay is not None and name.startswith(f"{DENSE} ") == dense
                output_of = {"output_of": partial(replay.output, name)} if ours else {}
                stream.advance(self.model, index, block, **output_of)
        self.ladder.take_over(self.model.name(index), self.states)
        return {name: list(stream.sizes) for name, stream in moving.items()}
