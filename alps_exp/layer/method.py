"""What is known of every pruning method, whatever its scope: a layer, a block, or a whole model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..base.errors import UserError
from ..patterns import Pattern
from .inputs import Statistics


@dataclass(frozen=True)
class Method:
    """Base of all methods: hyperparameters, and what a run must know before it starts.

    Class attributes:
        statistics: what it must know of the layers' inputs.
        selection: the set of weights among which scores compete, as the record states it (unstructured patterns).
        prunes: False for the dense baseline, which leaves the model as it is and needs no loop.
        kinds: the kinds of patterns that it can keep (`Pattern.kind`); None is all.
        shares: what it knows of the inputs is what other methods collect, so that runs can share it; False where it
            sends the calibration windows through blocks by itself.
        structured: whole channels and heads leave, of which the sparsity is the share.
        even: as many of them in every block.
        reconstruction: made from what is known of a method whose full text is not public.
        trains: the weights follow gradients of the model's own loss on text: not one-shot.
        unplanned: what takes time that `flops` does not know, as plan=true states it; "" is nothing to speak of.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    selection: ClassVar[str] = "layer"
    prunes: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str] | None] = frozenset({"unstructured", "nm"})
    shares: ClassVar[bool] = True
    structured: ClassVar[bool] = False
    even: ClassVar[bool] = True
    reconstruction: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    unplanned: ClassVar[str] = ""

    def flops(self, rows: int, width: int) -> float:
        """Floating-point operations of one layer's matrix products, for the estimates of plan=true; 0 where memory
        bandwidth decides."""
        return 0.0

    def block_work(self, shapes: Mapping[str, tuple[int, int]], tokens: int) -> tuple[float, float]:
        """What a block takes beside its layers' `flops`, for plan=true: floating-point operations, and bytes.

        Args:
            shapes: layer name → (out, in), of those of the block that are pruned.
            tokens: to calibrate on.
        """
        return 0.0, 0.0

    def training_windows(self, seqlen: int) -> int:
        """How many windows of so many tokens it trains on: the calibration windows first, then more of the data set."""
        return 0

    def trained_windows(self) -> int:
        """How many windows its training sees, each as often as it comes."""
        return 0

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise UserError unless the method can keep this kind of pattern."""
        if self.kinds is not None and pattern.kind not in self.kinds:
            raise UserError(
                f"{type(self).__name__} cannot keep sparsity {pattern.written}: it takes "
                f"{', '.join(sorted(self.kinds))}"
            )

    def for_layers(self, patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]]) -> Method:
        """The method for these layers of a model, asked for before anything is calibrated.

        Args:
            patterns: layer name → pattern, for every layer that is to be pruned.
            shapes: layer name → (out, in), for these and perhaps others.

        Raises:
            UserError: a layer or a pattern that the method cannot keep.
        """
        for pattern in dict.fromkeys(patterns.values()):
            self.check_pattern(pattern)
        return self

    def for_model(self, model: nn.Module, patterns: Mapping[str, Pattern]) -> Method:
        """The method for this model, asked for after `for_layers`, where it must know more than layers' shapes.

        Args:
            model: the model, or its skeleton on the meta device.
            patterns: layer name → pattern, for every layer that is to be pruned.

        Raises:
            UserError: a model that the method cannot prune.
        """
        return self

    def misfit_of_experts(self, names: Collection[str]) -> str | None:
        """Why the method cannot prune matrices of a mixture's experts; None where it can.

        Args:
            names: of theirs among the layers to prune.
        """
        if self.structured:
            return (
                f"{type(self).__name__} takes channels away, and experts share one parameter, with one number of "
                "channels for all"
            )
        return f"{type(self).__name__} prunes blocks or the model as a whole"

    def digests(self) -> dict[str, str]:
        """What of the files that the method reads decides about results, by name."""
        return {}
