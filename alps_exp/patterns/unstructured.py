"""Unstructured sparsity, written 0.7: zeros anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..base.errors import UserError
from .pattern import Pattern, Scope

if TYPE_CHECKING:
    from torch import Tensor

    from .tracker import Tracker


# Entries up to which several matrices are sorted at once rather than searched one after the other.
_SORTED = 1 << 18


@dataclass(frozen=True)
class Unstructured(Pattern):
    """A fraction `level` of zeros anywhere in the selection group.

    A layer keeps round((1 - s) * size) entries (ALPS's rule), a row loses floor(s * in) (Wanda's), a block of columns
    floor(s * size) (SparseGPT's).
    """

    kind: ClassVar[str] = "unstructured"
    rank: ClassVar[int] = 0

    level: float

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or not isinstance(self.level, (int, float)) or not 0 < self.level < 1:
            raise UserError(
                f"sparsity {self.level!r} is not allowed: give a fraction of zeros above 0 and below 1 (0.7), "
                'or a pattern N:M such as "2:4"; method=dense is the run without pruning'
            )

    @classmethod
    def parse(cls, text: str) -> Unstructured | None:
        try:
            # Ten digits: a range such as range(0.5,0.8,step=0.1) otherwise yields 0.7000000000000001.
            given = float(text)
        except ValueError:
            return None
        level = round(given, 10) if math.isfinite(given) else given
        if 0 < given < 1 and not 0 < level < 1:
            raise UserError(
                f"sparsity={text} is not allowed: give a fraction of at most ten digits above 0 and below 1"
            )
        return cls(level) if level <= 1 else None  # a plain 2:4 in YAML is the number 124

    @property
    def written(self) -> str:
        return f"{self.level:.10g}"

    @property
    def sparsity(self) -> float:
        return float(self.level)

    @property
    def slug(self) -> str:
        return f"u{self.written}"

    def keep(self, score: Tensor, scope: Scope = "layer") -> Tensor:
        from .keeping import keep_largest, keep_per_row

        if scope == "row":
            return keep_per_row(score, score.shape[1] - _floor(self.sparsity * score.shape[1]))
        if scope == "block":
            return keep_largest(score, score.numel() - _floor(self.sparsity * score.numel()))
        return keep_largest(score, round((1 - self.sparsity) * score.numel()))

    def keep_each(self, scores: Tensor, scope: Scope = "layer") -> Tensor:
        from .keeping import keep_per_row

        if scope != "block" or scores[0].numel() > _SORTED:
            return super().keep_each(scores, scope)
        flat = scores.flatten(1)
        return keep_per_row(flat, flat.shape[1] - _floor(self.sparsity * flat.shape[1])).view(scores.shape)

    def tracker(self) -> Tracker:
        from .tracker import ThresholdTracker

        return ThresholdTracker(self)


def _floor(value: float) -> int:
    # 0.29 * 100 is 28.999999999999996 in binary; the user meant 29.
    return math.floor(value + 1e-6)
