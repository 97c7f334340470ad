"""What the block loop has to say: a row per pruned layer, and the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..patterns import Pattern


@dataclass(frozen=True)
class LayerRow:
    """One pruned layer.

    Attributes:
        name: full name in the model.
        block: index of its decoder block.
        shape: (out, in).
        pattern: what was asked, "0.7" or "2:4".
        selection: the set of weights among which the method compared scores.
        sparsity_target: fraction of zeros asked for.
        sparsity: fraction of zeros in the written weight.
        relative_loss: ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² of the written weight, None when not measured.
        held_out_loss: the same on tokens that were not calibrated on (data.holdout).
        status: the solver's, as in `Solution`.
        iterations: of the solver.
        seconds: wall time of the solver; layers solved together share their time equally.
        seconds_by_phase: the same by the solver's phases, as far as it reports them.
        tokens: calibration tokens that the layer saw.
        dead_inputs: inputs that were zero on all of them.
        stats: what else the solver reports; of an expert, `borrowed` is the share of the tokens behind its statistics
            that are those of the layer's other experts (`expert_shrinkage`).
        target: what it was fitted to.
        target_loss: ‖X(T - Ŵ)ᵀ‖² / ‖XTᵀ‖² of the written weight, where another weight T than the dense one was fitted.
    """

    name: str
    block: int
    shape: list[int]
    pattern: str
    selection: str
    sparsity_target: float
    sparsity: float
    relative_loss: float | None
    status: str
    iterations: int
    seconds: float
    seconds_by_phase: dict[str, float]
    tokens: int | None
    dead_inputs: int
    stats: dict
    held_out_loss: float | None = None
    target: str = "layer"
    target_loss: float | None = None

    @classmethod
    def plain(cls, name: str, block: int, weight: Tensor, pattern: Pattern, selection: str) -> LayerRow:
        """The row of a layer of which nothing is known but its pruned weight.

        Args:
            name: of the layer.
            block: index of its decoder block.
            weight: (out, in) as it was written.
            pattern: what was asked.
            selection: the set of weights among which the method compared scores.
        """
        sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
        found = (name, block, list(weight.shape), str(pattern), selection, pattern.sparsity, sparsity)
        return cls(*found, None, "exact", 0, 0.0, {}, None, 0, {})


@dataclass(frozen=True)
class FinishedBlock:
    """A block that needs no more work.

    Attributes:
        rows: of its pruned layers.
        seconds: wall time by phase.
        sizes: windows of each forward through it by the name of the stream, by which its output is made again; empty
            without forwards.
        drift: of its output from the dense model's, by stream (`Streams.drift`); empty where that does not go beside.
        finish: what its finishing did (`training.Training`) with its seconds and tokens; empty without.
        fallbacks: what was done in a plainer way than usual since the block before, in words (`base.fallbacks`).
    """

    rows: list[LayerRow]
    seconds: dict[str, float]
    sizes: dict[str, list[int]] = field(default_factory=dict)
    drift: dict[str, dict[str, float]] = field(default_factory=dict)
    finish: dict = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)


@dataclass
class PruneResult:
    """What the loop did.

    Attributes:
        layers: one row per pruned layer, in the model's order.
        seconds: wall time of calibrate, solve, propagate, and transfer (blocks to the device and back).
        block_seconds: wall time of each block, all phases.
        notes: what was done for want of device memory, or otherwise in a plainer way than usual.
        hidden_states: where they were in the end, "device", "host" or "disk"; None without forwards.
        cached_blocks: blocks whose statistics were those that another run had collected; those done by this attempt.
        cached_passes: passes over the dense model whose results were those of another run.
        block_weights: all parameters of the decoder blocks, pruned or not.
        drift: of each block's output from the dense model's, where that goes beside.
        strength: what target.strength=auto was chosen by (`strength.chosen`); empty where a number was given.
        finish: what finishing did: `blocks`, a training per block, and `distil`, that of the model.
        training: what the training of a method did that trains the model; None for the others.
    """

    layers: list[LayerRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    block_seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hidden_states: str | None = None
    cached_blocks: list[int] = field(default_factory=list)
    cached_passes: list[str] = field(default_factory=list)
    block_weights: int = 0
    drift: list[dict[str, dict[str, float]]] = field(default_factory=list)
    strength: dict = field(default_factory=dict)
    finish: dict = field(default_factory=dict)
    training: dict | None = None

    def add(self, done: FinishedBlock) -> None:
        """Account for a finished block."""
        self.layers += done.rows
        self.block_seconds.append(sum(done.seconds.values()))
        self.drift += [done.drift] if done.drift else []
        if done.finish:
            self.finish.setdefault("blocks", []).append(done.finish)
        self.add_seconds(done.seconds)
        self.notes += [line for line in done.fallbacks if line not in self.notes]

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Account for wall time by phase."""
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def line(self) -> str:
        """What to show beside the progress."""
        losses = [row.relative_loss for row in self.layers if row.relative_loss is not None]
        return f"mean relative loss {math.fsum(losses) / len(losses):.4g}" if losses else ""
