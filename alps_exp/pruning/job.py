"""What a model method is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..allocation.allocations import Allocation, Uniform, block_of
from ..allocation.selection import Selection
from ..calibration.sensitivity import SensitivityChoice
from ..layer.inputs import Statistics
from ..layer.method import Method
from ..methods.target import LayerTarget, Target
from ..patterns import Pattern
from ..training.finish import Finish


@dataclass(frozen=True)
class PruneJob:
    """What a model method is asked to do.

    Attributes:
        solver: the method.
        patterns: layer name → pattern, for every layer to prune.
        selection: where the patterns came from; it tells which weights were excluded on purpose.
        tokens: (windows, seqlen) calibration windows.
        batch_size: windows per forward.
        propagate: "pruned" feeds each block what the pruned blocks before it produce, "dense" what the dense ones did.
        losses: measure every layer's relative loss, which takes the Gram matrix whatever the method needs.
        held_out: (windows, seqlen) other windows, on which every layer's loss is measured too.
        quiet: no progress.
        target: what the layers are fitted to.
        capture: "block" collects the inputs of all of a block's layers before any of them is pruned; "groups" those of
            one group of layers after the other, each behind the pruned ones before it; "auto" groups where the target
            compares with the dense model, otherwise the block.
        allocation: how the sparsity is divided among layers.
        sensitivity: whether gradients of the dense model weigh the outputs.
        finish: which gradients the kept weights follow after that.
        fresh: (windows, seqlen) text that finishing trains on beside the calibration windows.
        shrinkage: how many tokens of all experts of a layer an expert's statistics borrow for each input.
        weighting: how a token counts in an expert's statistics, one of `WEIGHTINGS`.
        text: (windows, seqlen) text that a method trains on beside the calibration windows.
        rows: layer name → (out,) factors by which its rows are scaled before a solver whose scores compete over rows.
    """

    solver: Method
    patterns: Mapping[str, Pattern]
    selection: Selection
    tokens: Tensor
    batch_size: int = 1
    propagate: str = "pruned"
    losses: bool = True
    held_out: Tensor | None = None
    quiet: bool = False
    target: Target = field(default_factory=LayerTarget)
    capture: str = "auto"
    allocation: Allocation = field(default_factory=Uniform)
    sensitivity: SensitivityChoice = field(default_factory=SensitivityChoice)
    finish: Finish = field(default_factory=Finish)
    fresh: Tensor | None = None
    shrinkage: float = 0.0
    weighting: str = "none"
    text: Tensor | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def beside(self) -> bool:
        """Whether the dense model's hidden states go through the blocks beside those of the pruned one."""
        return self.target.beside or self.finish.block is not None

    @property
    def fresh_blocks(self) -> int:
        """Windows of fresh text that blocks are finished on."""
        asked = self.finish.block is not None and self.finish.block.fresh and self.fresh is not None
        return len(self.fresh) if asked else 0

    @property
    def shared(self) -> Mapping[str, Pattern]:
        """The patterns that an allocation may change: of layers without a sparsity of their own."""
        return self.selection.shared(self.patterns)

    @property
    def blocks(self) -> int:
        """How many blocks have layers to prune."""
        return len({block_of(name) for name in self.patterns})

    @property
    def in_order(self) -> bool:
        """Whether groups of layers are captured one after the other: where nothing is captured, there is no order."""
        asked = self.capture == "groups" or (self.capture == "auto" and self.target.beside)
        return asked and bool(self.statistics)

    @property
    def statistics(self) -> Statistics:
        """What is collected of the layers' inputs."""
        measured = Statistics.GRAM if self.losses or self.target.beside else Statistics.NONE
        return self.solver.statistics | measured
