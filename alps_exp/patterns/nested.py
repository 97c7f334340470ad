"""Sparsity of two levels: N:M within what a coarser choice has kept.

    4:8>2:4    of every 8 consecutive groups of 4 inputs, 4 are kept, each with 2 of its 4 weights (HighLight, MICRO
               2023); 4:8/2:4 is the same, for shells, to which > means a file
    64:2:8     64 consecutive outputs share which 4 of every 8 consecutive inputs they use, and each of them keeps 2 of
               its 4 weights there: 2:8 on the whole (VENOM, SC 2023)

Both are exact by energy, the sum of squared scores: the coarser choice compares what the finer one would keep. Of equal
groups the first stays; of equal choices of inputs the one with the earlier inputs.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from ..base.errors import UserError
from .nm import NM
from .pattern import Pattern, Scope
from .tiles import fitting

if TYPE_CHECKING:
    from torch import Tensor

    from .tracker import Tracker

# Inputs that V outputs share of every M: as many as the matrix units that this is made for take N of.
_SHARED = 4
# Above this many inputs there are too many choices of four (1820 of 16) to try all.
_MOST = 16


@dataclass(frozen=True)
class Hierarchical(Pattern):
    """At most `outer_kept` of every `outer_width` consecutive groups of `width` inputs, with at most `kept` each."""

    kind: ClassVar[str] = "hierarchical"
    rank: ClassVar[int] = 3
    separable: ClassVar[bool] = False

    outer_kept: int
    outer_width: int
    kept: int
    width: int

    def __post_init__(self) -> None:
        NM(self.outer_kept, self.outer_width)
        NM(self.kept, self.width)

    @classmethod
    def parse(cls, text: str) -> Hierarchical | None:
        match = re.fullmatch(r"(\d+):(\d+)[>/](\d+):(\d+)", text)
        return cls(*map(int, match.groups())) if match else None

    @property
    def written(self) -> str:
        return f"{self.outer_kept}:{self.outer_width}>{self.kept}:{self.width}"

    @property
    def sparsity(self) -> float:
        return 1 - self.outer_kept * self.kept / (self.outer_width * self.width)

    @property
    def group(self) -> int:
        return self.outer_width * self.width

    @property
    def swaps(self) -> int:
        return self.width

    @property
    def order(self) -> tuple:
        return self.rank, self.sparsity, self.group, self.written

    @property
    def note(self) -> str:
        outer = f"{self.outer_kept} of {self.outer_width} groups of {self.width} inputs kept"
        return f"{self.written}: {outer}, with {self.kept} of {self.width} each"

    def keep(self, score: Tensor, scope: Scope = "layer") -> Tensor:
        from .keeping import keep_per_row

        self.check(tuple(score.shape))
        inner = keep_per_row(score.reshape(-1, self.width), self.kept)
        values = score.reshape(-1, self.width).double()
        energy = (values * values.abs()).masked_fill_(~inner, 0).sum(1)
        outer = keep_per_row(energy.view(-1, self.outer_width), self.outer_kept)
        return (inner & outer.view(-1, 1)).view(score.shape)

    def tracker(self) -> Tracker:
        from .nesting import HierarchicalTracker

        return HierarchicalTracker(self, (self.outer_kept, self.outer_width), (self.kept, self.width))

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.group:
            inputs = f"its {shape[1]} inputs are not a multiple of {self.outer_width} groups of {self.width}"
            if shape[1] % self.width == 0:
                sets = fitting(shape[1] // self.width, self.outer_width, self.outer_kept)
                return f"{inputs}; numbers of groups of {self.width} that fit: {sets}"
            if shape[1] % self.outer_width == 0:
                widths = fitting(shape[1] // self.outer_width, self.width, self.kept)
                return f"{inputs}; widths of a group that fit: {widths}"
            return f"{inputs}, nor of {self.outer_width} or of {self.width}: change both"
        return None


@cache
def _choices(width: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(width), _SHARED))


@cache
def _paired(width: int) -> tuple[tuple[list[int], ...], list[tuple[list[int], int]], list[int]]:
    """The inputs of each pair, those pairs that end alike with the first of the pairs behind them, and where each of
    `_choices` is among the choices that these make, turn by turn."""
    pairs = list(itertools.combinations(range(width), 2))
    turns, made = [], []
    for last in range(1, width - 2):
        first = [number for number, pair in enumerate(pairs) if pair[1] == last]
        later = pairs.index((last + 1, last + 2))
        turns.append((first, later))
        made += [(*pairs[number], *pair) for number in first for pair in pairs[later:]]
    one, other = map(list, zip(*pairs, strict=True))
    return (one, other), turns, sorted(range(len(made)), key=made.__getitem__)


@dataclass(frozen=True)
class VNM(Pattern):
    """`rows` consecutive outputs share four of every `width` consecutive inputs, of which each keeps `kept`."""

    kind: ClassVar[str] = "vnm"
    rank: ClassVar[int] = 4
    separable: ClassVar[bool] = False
    across: ClassVar[bool] = True

    rows: int
    kept: int
    width: int

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.rows, self.kept, self.width))
        if not whole or self.rows < 1 or not 0 < self.kept < _SHARED < self.width <= _MOST:
            raise UserError(
                f"sparsity {self.written} is not allowed: in V:N:M, V outputs share {_SHARED} of M inputs and keep N "
                f"of them, with V > 0, 0 < N < {_SHARED} < M <= {_MOST}, as in 64:2:8"
            )

    @classmethod
    def parse(cls, text: str) -> VNM | None:
        match = re.fullmatch(r"(\d+):(\d+):(\d+)", text)
        return cls(*map(int, match.groups())) if match else None

    @property
    def written(self) -> str:
        return f"{self.rows}:{self.kept}:{self.width}"

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.width

    @property
    def group(self) -> int:
        return self.width

    @property
    def choices(self) -> list[tuple[int, ...]]:
        """All choices of the inputs that are shared, those with earlier inputs first."""
        return _choices(self.width)

    @property
    def swaps(self) -> int | None:
        return None  # the inputs that may be exchanged are not consecutive

    @property
    def order(self) -> tuple:
        return self.rank, self.sparsity, self.width, self.rows

    @property
    def note(self) -> str:
        shared = f"{self.rows} outputs share {_SHARED} of {self.width} inputs"
        return f"{self.written}: {shared}, and {self.kept} of {_SHARED} are kept"

    def selected(self, selection: str) -> str:
        return f"tile of {self.rows}x{self.width}"

    def keep(self, score: Tensor, scope: Scope = "layer") -> Tensor:
        import torch

        from .keeping import keep_per_row

        self.check(tuple(score.shape))
        down, across = score.shape[0] // self.rows, score.shape[1] // self.width
        tiles = score.reshape(down, self.rows, across, self.width).transpose(1, 2)
        values = tiles.double()
        energy = (values * values.abs()).permute(3, 2, 0, 1).reshape(self.width, self.rows, down * across)
        # As many tiles at a time as stay in a processor's cache.
        parts = energy.split(max((1 << (18 if score.is_cuda else 11)) // self.rows, 1), dim=2)
        which = torch.cat([self._best(part) for part in parts]).view(down, across)
        places = torch.tensor(self.choices, device=score.device)[which][:, :, None, :].expand(-1, -1, self.rows, -1)
        shared = tiles.gather(3, places)
        kept = keep_per_row(shared.reshape(-1, _SHARED), self.kept).view(shared.shape)
        mask = torch.zeros(tiles.shape, dtype=torch.bool, device=score.device).scatter_(3, places, kept)
        return mask.transpose(1, 2).reshape(score.shape)

    def _best(self, energy: Tensor) -> Tensor:
        """The number of each tile's best choice among `choices`, the first among equals.

        A choice is a pair of inputs and a pair of later ones, so that each pair is compared once for all choices.

        Args:
            energy: (M, V, tiles).
        """
        import torch

        (one, other), turns, numbers = _paired(self.width)
        high, low = torch.maximum(energy[one], energy[other]), torch.minimum(energy[one], energy[other])
        both, found = high + low, []
        for first, later in turns:
            best = high[first, None] + high[None, later:]
            if self.kept == 1:
                torch.maximum(high[first, None], high[None, later:], out=best)
            elif self.kept == 2:  # one of each pair, or both of one
                torch.maximum(best, both[first, None], out=best)
                torch.maximum(best, both[None, later:], out=best)
            else:
                best += torch.maximum(low[first, None], low[None, later:])
            found.append(best.sum(2).flatten(0, 1))
        return torch.cat(found)[numbers].argmax(0)

    def tracker(self) -> Tracker:
        from .nesting import VNMTracker

        return VNMTracker(self, self.rows, self.kept, self.width, self.choices)

    def misfit(self, shape: tuple[int, int]) -> str | None:
        what = f"its weight {shape[0]} × {shape[1]} does not divide into tiles of {self.rows} × {self.width}"
        if shape[0] % self.rows:
            return f"{what}; V that fit: {fitting(shape[0], self.rows)}"
        if shape[1] % self.width:
            widths = [width for width in range(_SHARED + 1, _MOST + 1) if shape[1] % width == 0]
            return f"{what}; M that fit: {', '.join(map(str, widths)) or 'none'}"
        return None
