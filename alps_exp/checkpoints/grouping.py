"""How the kept weights of a structured layer lie together: whole blocks, or inputs that several outputs share.

A layout names the entries of a matrix (out, in) that are worth storing, which are all that are kept and perhaps some
zeros, in an order that makes a smaller matrix of them, the core. It is found by looking at the mask.

    blocks    tiles of r × c entries, of which some hold nothing: the core has a row for each other tile, row by row of
              the tile. Whole outputs are tiles of 1 × in, whole inputs tiles of out × 1, groups tiles of 1 × c.
              Stated by one bit a tile, in row-major order: does it hold something.
    shared    V consecutive outputs use no more than four of M consecutive inputs: the core (out, 4 · in / M) has these.
              Stated by four places of 4 bits a tile of V × M, ascending, from the lowest bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_TALLEST = 128  # of the blocks whose sides are powers of two that are looked for
_SHARED, _WIDEST = 4, 16
# Fewer outputs that share their inputs than this would take more to state than they save.
_FEWEST = 4


@dataclass(frozen=True)
class Blocks:
    """Tiles of `rows` × `columns`, with `bits` (tiles,) bool."""

    rows: int
    columns: int
    bits: np.ndarray

    scheme = "blocks"

    @property
    def stated(self) -> np.ndarray:
        return np.packbits(self.bits, bitorder="little")

    def core(self, matrix: Tensor) -> Tensor:
        """(tiles that hold something, rows · columns) of a matrix (out, in)."""
        return self._tiles(matrix).reshape(-1, self.rows * self.columns)[torch.from_numpy(self.bits)]

    def restore(self, core: Tensor, matrix: Tensor) -> None:
        """Write a core into a matrix (out, in)."""
        tiles = self._tiles(matrix)
        down, across = torch.from_numpy(self.bits).view(tiles.shape[0], tiles.shape[1]).nonzero(as_tuple=True)
        tiles[down, across] = core.view(-1, self.rows, self.columns)

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the core."""
        return int(np.count_nonzero(self.bits)), self.rows * self.columns

    def _tiles(self, matrix: Tensor) -> Tensor:
        down, across = matrix.shape[0] // self.rows, matrix.shape[1] // self.columns
        return matrix.view(down, self.rows, across, self.columns).transpose(1, 2)

    @property
    def fields(self) -> dict[str, int]:
        return {"rows": self.rows, "columns": self.columns}

    @classmethod
    def read(cls, shape: tuple[int, int], fields: dict[str, int], stated: np.ndarray) -> Blocks | None:
        """The layout that was stated; None if this is none."""
        rows, columns = fields["rows"], fields["columns"]
        if rows < 1 or columns < 1 or shape[0] % rows or shape[1] % columns:
            return None
        tiles = math.prod(shape) // (rows * columns)
        if stated.shape != (-(-tiles // 8),):
            return None
        return cls(rows, columns, np.unpackbits(stated, count=tiles, bitorder="little").view(bool))


@dataclass(frozen=True)
class Shared:
    """`rows` outputs that use four of `columns` inputs, with `which` (tiles, 4) ascending."""

    rows: int
    columns: int
    which: np.ndarray

    scheme = "shared"

    @property
    def stated(self) -> np.ndarray:
        return (self.which[:, ::2] | self.which[:, 1::2] << 4).astype(np.uint8).reshape(-1)

    def core(self, matrix: Tensor) -> Tensor:
        """(out, 4 · in / columns) of a matrix (out, in)."""
        tiles, places = self._tiles(matrix)
        return tiles.gather(3, places).view(self.size(matrix.shape))

    def restore(self, core: Tensor, matrix: Tensor) -> None:
        tiles, places = self._tiles(matrix)
        tiles.scatter_(3, places, core.view(places.shape))

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0], shape[1] // self.columns * _SHARED

    def _tiles(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        down, across = matrix.shape[0] // self.rows, matrix.shape[1] // self.columns
        places = torch.from_numpy(self.which).view(down, 1, across, _SHARED).expand(-1, self.rows, -1, -1)
        return matrix.view(down, self.rows, across, self.columns), places

    @property
    def fields(self) -> dict[str, int]:
        return {"rows": self.rows, "columns": self.columns}

    @classmethod
    def read(cls, shape: tuple[int, int], fields: dict[str, int], stated: np.ndarray) -> Shared | None:
        rows, columns = fields["rows"], fields["columns"]
        if rows < 1 or not _SHARED < columns <= _WIDEST or shape[0] % rows or shape[1] % columns:
            return None
        tiles = math.prod(shape) // (rows * columns)
        if stated.shape != (2 * tiles,):
            return None
        pairs = stated.reshape(tiles, 2)
        which = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(tiles, _SHARED).astype(np.int64)
        return cls(rows, columns, which) if (np.diff(which) > 0).all() and (which < columns).all() else None


LAYOUTS = {layout.scheme: layout for layout in (Blocks, Shared)}


def layout_of(mask: np.ndarray, itemsize: int) -> Blocks | Shared | None:
    """The layout that stores a matrix in the fewest bytes; None where one bit for every entry takes no more.

    Args:
        mask: (out, in) bool, what is kept.
        itemsize: bytes of a value.
    """
    kept = int(np.count_nonzero(mask))
    if not kept:
        return None
    found, fewest = None, kept * itemsize + mask.size / 8
    for rows, columns, full in _tilings(mask, int(fewest / itemsize)):
        entries = int(np.count_nonzero(full)) * rows * columns
        size = full.size / 8 + entries * itemsize
        # As many kept of every block that holds something: groups of N:M, whose masks take one bit an entry.
        with_masks = full.size / 8 + kept * itemsize + entries / 8
        if with_masks < min(size, fewest) and _even(mask, rows, columns, full):
            size = with_masks
        if size < fewest:
            found, fewest = (rows, columns, full), size
    best = None if found is None else Blocks(found[0], found[1], found[2].reshape(-1))
    shared = _shared(mask)
    if shared is not None and len(shared.which) * 2 + kept * itemsize + len(shared.which) * shared.rows / 2 < fewest:
        best = shared
    return best


def _tilings(mask: np.ndarray, most: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Heights and widths of tiles, and (down, across) whether each holds something, of all that are looked at: whole
    outputs, whole inputs, sides that are powers of two, and the largest on whose edges alone the mask changes. Tiles of
    several rows that make more than `most` entries are left out."""
    height, width = mask.shape
    yield 1, width, mask.any(1)[:, None]
    yield height, 1, mask.any(0)[None, :]
    down = math.gcd(height, *(1 + np.flatnonzero((mask[1:] != mask[:-1]).any(1))).tolist())
    across = math.gcd(width, *(1 + np.flatnonzero((mask[:, 1:] != mask[:, :-1]).any(0))).tolist())
    if down * across > 1:
        yield down, across, mask[::down, ::across]
    rows, tall = 1, mask
    while int(np.count_nonzero(tall)) * rows <= most:
        columns, full = 1, tall
        while rows == 1 or int(np.count_nonzero(full)) * rows * columns <= most:
            if rows * columns > 1:
                yield rows, columns, full
            if columns == _TALLEST or full.shape[1] % 2:
                break
            columns, full = 2 * columns, full[:, ::2] | full[:, 1::2]
        if rows == _TALLEST or tall.shape[0] % 2:
            return
        rows, tall = 2 * rows, tall[::2] | tall[1::2]


def _even(mask: np.ndarray, rows: int, columns: int, full: np.ndarray) -> bool:
    """Whether every tile that holds something holds as much as the others."""
    for part in (slice(0, 8), slice(None)):  # most masks show in a few rows that they are not
        tiles = mask.reshape(full.shape[0], rows, full.shape[1], columns)[part]
        counts = np.count_nonzero(tiles, axis=(1, 3))[full[part]]
        if (counts != counts[:1]).any():
            return False
    return True


def _shared(mask: np.ndarray) -> Shared | None:
    """The layout with the most outputs that share their inputs, for the widest M."""
    width = mask.shape[1]
    rows, tall = 1, mask
    while rows < _FEWEST and tall.shape[0] % 2 == 0:
        rows, tall = 2 * rows, tall[::2] | tall[1::2]
    if rows < _FEWEST:
        return None
    for columns in range(_WIDEST, _SHARED, -1):
        if width % columns == 0 and _few(tall, columns):
            while tall.shape[0] % 2 == 0 and _few(tall[::2] | tall[1::2], columns):
                rows, tall = 2 * rows, tall[::2] | tall[1::2]
            tiles = tall.reshape(-1, columns)
            # Those that are used come first, then the first of the others, all in ascending order again.
            order = np.argsort(~tiles, axis=1, kind="stable")[:, :_SHARED]
            return Shared(rows, columns, np.sort(order, axis=1))
    return None


def _few(used: np.ndarray, columns: int) -> bool:
    return bool(used.reshape(len(used), -1, columns).sum(2).max() <= _SHARED)
