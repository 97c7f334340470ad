"""Sparsity in tiles that survive or go as a whole: blocks, rows and columns of a layer.

    block=32@0.7, block=16x64@0.7    0.7 of the tiles of so many outputs × inputs are zero
    row@0.3                          0.3 of the outputs
    column@0.3                       0.3 of the inputs

Tiles compare by their energy, the sum of their entries' squared scores: those of largest energy are the projection in
the metric that the scores are scaled by. Of equal tiles the first survive, in row-major order of the tiles.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..base.errors import UserError
from .pattern import Pattern, Scope
from .unstructured import Unstructured

if TYPE_CHECKING:
    from torch import Tensor

    from .tracker import Tracker

_EXAMPLES = {"block": "block=32@0.7", "row": "row@0.3", "column": "column@0.3"}


@dataclass(frozen=True)
class _Tiles(Pattern):
    """What blocks, rows and columns have in common: a field `level`, the fraction of tiles that are zero."""

    across: ClassVar[bool] = True

    def __post_init__(self) -> None:
        level = self.level
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
            raise UserError(
                f"sparsity {self.kind} with level {level!r} is not allowed: give a fraction of zeros above 0 and "
                f"below 1, as in {_EXAMPLES[self.kind]}"
            )

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        match = re.fullmatch(rf"{cls.kind}@(\d*\.?\d+)", text)
        return cls(round(float(match[1]), 10)) if match else None

    @property
    def written(self) -> str:
        return f"{self.kind}@{self.level:.10g}"

    @property
    def sparsity(self) -> float:
        return float(self.level)

    @property
    def note(self) -> str:
        return f"{self.kind}: whole {'inputs' if self.kind == 'column' else 'outputs'} of a layer are zero"

    @abstractmethod
    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Outputs and inputs of a tile of a weight (out, in) of this shape."""

    def selected(self, selection: str) -> str:
        return f"{self.kind}s of the layer"

    def keep(self, score: Tensor, scope: Scope = "layer") -> Tensor:
        self.check(tuple(score.shape))
        # In float64, where squares of float32 numbers are exact; of negative scores the square counts as negative.
        return self.best(_sums(score.double(), self.tile(score.shape), signed=True), score.shape)

    def best(self, energy: Tensor, shape: tuple[int, int]) -> Tensor:
        """The mask (out, in) of the tiles of largest energy (down, across)."""
        kept = Unstructured(self.level).keep(energy)
        rows, columns = shape[0] // kept.shape[0], shape[1] // kept.shape[1]
        return kept[:, None, :, None].expand(-1, rows, -1, columns).reshape(shape).contiguous()

    def tracker(self) -> Tracker:
        from .tracker import Tracker

        return Tracker(_Quick(self))

    def misfit(self, shape: tuple[int, int]) -> str | None:
        down, across = (size // part for size, part in zip(shape, self.tile(shape), strict=True))
        if not round((1 - self.level) * down * across):
            what = f"none of the {down * across} {self.kind}s of a weight {shape[0]} × {shape[1]} would stay"
            return f"{what}; choose a smaller fraction"
        return None

    def holds(self, support: Tensor) -> bool:
        filled = _sums(support.double(), self.tile(support.shape)).count_nonzero()
        tiles = support.numel() // math.prod(self.tile(support.shape))
        return int(filled) <= round((1 - self.level) * tiles)


@dataclass(frozen=True)
class Block(_Tiles):
    """A fraction `level` of the tiles of `rows` outputs × `columns` inputs is zero; they compete over the layer."""

    kind: ClassVar[str] = "block"
    rank: ClassVar[int] = 5

    rows: int
    columns: int
    level: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"sparsity.{name}={value!r} is not allowed: give a whole number above 0")
        if self.rows == self.columns == 1:
            raise UserError(f"blocks of one weight are not allowed: that is sparsity={self.level:.10g}")

    @classmethod
    def parse(cls, text: str) -> Block | None:
        match = re.fullmatch(r"block=(\d+)(?:x(\d+))?@(\d*\.?\d+)", text)
        return cls(int(match[1]), int(match[2] or match[1]), round(float(match[3]), 10)) if match else None

    @property
    def written(self) -> str:
        return f"block={self._size}@{self.level:.10g}"

    @property
    def _size(self) -> str:
        return str(self.rows) if self.rows == self.columns else f"{self.rows}x{self.columns}"

    @property
    def order(self) -> tuple:
        return self.rank, self.rows * self.columns, self.rows, self.level

    @property
    def note(self) -> str:
        return f"block: blocks of {self.rows} outputs × {self.columns} inputs are zero as a whole"

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.rows, self.columns

    def selected(self, selection: str) -> str:
        return f"blocks of {self.rows}x{self.columns} of the layer"

    def tracker(self) -> Tracker:
        from .block_tracker import BlockTracker

        return BlockTracker(_Quick(self), (self.rows, self.columns))

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if not shape[0] % self.rows and not shape[1] % self.columns:
            return super().misfit(shape)
        what = f"its weight {shape[0]} × {shape[1]} does not divide into blocks of {self.rows} × {self.columns}"
        if self.rows == self.columns:
            return f"{what}; sizes that fit: {fitting(math.gcd(*shape), self.rows)}"
        heights, widths = (fitting(size, part) for size, part in zip(shape, (self.rows, self.columns), strict=True))
        return f"{what}; heights that fit: {heights}; widths that fit: {widths}"


@dataclass(frozen=True)
class Row(_Tiles):
    """A fraction `level` of the outputs is zero, whatever a method compares within; biases stay as they are."""

    kind: ClassVar[str] = "row"
    rank: ClassVar[int] = 6

    level: float

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, shape[1]


@dataclass(frozen=True)
class Column(_Tiles):
    """A fraction `level` of the inputs is not used, whatever a method compares within."""

    kind: ClassVar[str] = "column"
    rank: ClassVar[int] = 7

    level: float

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0], 1


class _Quick:
    """A tiles' pattern in the precision of the scores, which are not negative: for the supports of iterates."""

    def __init__(self, pattern: _Tiles) -> None:
        self._pattern, self.sparsity = pattern, pattern.sparsity

    def keep(self, score: Tensor) -> Tensor:
        return self._pattern.best(_sums(score, self._pattern.tile(score.shape)), score.shape)

    def keep_tiles(self, energy: Tensor) -> Tensor:
        """Which tiles stay, by their energies."""
        return Unstructured(self.sparsity).keep(energy)


def _sums(score: Tensor, tile: tuple[int, int], signed: bool = False) -> Tensor:
    """(tiles down, tiles across) energy of a score (out, in)."""
    score = score.contiguous()
    squares = score * score.abs() if signed else score.square()
    return squares.view(score.shape[0] // tile[0], tile[0], score.shape[1] // tile[1], tile[1]).sum((1, 3))


def fitting(size: int, wanted: int, above: int = 1) -> str:
    """Divisors of `size` above 1 or another number, the five nearest to what was wanted."""
    found = [number for number in range(above + 1, size + 1) if size % number == 0]
    return ", ".join(map(str, sorted(sorted(found, key=lambda n: abs(math.log(n / wanted)))[:5]))) or "none"
