"""Transposable N:M sparsity, written 2:4T: a weight and its transpose both have the pattern."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .nm import NM
from .pattern import Scope
from .tiles import fitting

if TYPE_CHECKING:
    from torch import Tensor

    from .tracker import Tracker


@dataclass(frozen=True)
class Transposable(NM):
    """Exactly `kept` entries in each row and in each column of every tile of `width` outputs × `width` inputs; which
    ones, and which of equal ones, is told in `transposing.py`."""

    kind: ClassVar[str] = "transposable"
    rank: ClassVar[int] = 2
    separable: ClassVar[bool] = False
    across: ClassVar[bool] = True

    @classmethod
    def parse(cls, text: str) -> Transposable | None:
        match = re.fullmatch(r"(\d+):(\d+)T", text)
        return cls(int(match[1]), int(match[2])) if match else None

    @property
    def written(self) -> str:
        return f"{super().written}T"

    @property
    def swaps(self) -> int | None:
        return None  # every exchange changes the count of a column

    @property
    def note(self) -> str:
        return f"{self.written}: {self.kept} of {self.width} kept along the inputs, and along the outputs"

    def selected(self, selection: str) -> str:
        return f"tile of {self.width}x{self.width}"

    def keep(self, score: Tensor, scope: Scope = "layer") -> Tensor:
        from .transposing import best_masks

        self.check(tuple(score.shape))
        return best_masks(score, self.kept, self.width)

    def tracker(self) -> Tracker:
        from .transposing import TransposableTracker

        return TransposableTracker(self, self.kept, self.width)

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if shape[0] % self.width or shape[1] % self.width:
            what = f"its {shape[0]} outputs and {shape[1]} inputs are not both multiples of {self.width}"
            return f"{what}; M that fit: {fitting(math.gcd(*shape), self.width, self.kept)}"
        return None

    def holds(self, support: Tensor) -> bool:
        tiles = support.view(support.shape[0] // self.width, self.width, support.shape[1] // self.width, self.width)
        return all(int(tiles.sum(along).max()) <= self.kept for along in (1, 3))
