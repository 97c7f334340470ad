"""Masks that keep N of M in the rows and in the columns of M × M tiles, and as much energy as they can.

The energy of a mask is the sum of the squared scores that it keeps; negative scores count as negative squares.

M up to 4: all masks are tried, 90 of them for 2:4. Of masks of equal energy, the one is taken whose first row has the
earlier entries, then whose second row has, and so on.

Larger M: a local search. From a band of N diagonals on, two rows of a tile exchange two columns, of which each has
kept one: those that raise the energy the most, if any do. All pairs of rows take their turn, then all pairs of columns,
until nothing improves. The best of four starts is taken, the first among equals; of equal columns the first is
exchanged. On random scores all tiles together come within 0.3 % of the optimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ..numerics.kernels import kernel_for
from .tracker import Keeps, Step, Tracker

# Tiles' entries that are looked at together, and energies nearer than this are equal: sums in another order.
_BATCH, _EQUAL = 1 << 22, 1e-12
_STARTS, _SWEEPS = 4, 20
# Larger M that a kernel knows.
_IN_KERNEL = (8, 16)


def best_masks(score: Tensor, kept: int, width: int) -> Tensor:
    """(out, in) bool.

    Args:
        score: (out, in), both multiples of `width`.
        kept: N.
        width: M.
    """
    tiles = _tiles(score.double(), width)
    batch = _BATCH << 4 if score.is_cuda else _BATCH
    parts = max(batch // (90 * 16 if width <= 4 else width**2), 1)
    if width <= 4:
        found = [_enumerated(part, kept) for part in tiles.split(parts)]
    else:
        found = [_best_of_starts(part * part.abs(), kept) for part in tiles.split(parts)]
    return _untiled(torch.cat(found), score.shape)


class TransposableTracker(Tracker):
    """Masks of a layer's successive iterates. Up to M = 4 all masks are tried, in the scores' own precision; above, one
    round of exchanges goes on from the last iterate's mask."""

    def __init__(self, pattern: Keeps, kept: int, width: int) -> None:
        super().__init__(pattern)
        self._kept, self._width = kept, width
        self._last: Tensor | None = None
        self.fast = width in (4, *_IN_KERNEL)
        self.kernel = "masks_step" if width == 4 else "exchange"

    def __call__(self, score: Tensor) -> Tensor:
        energy = _tiles(score.square(), self._width)
        if self._width <= 4:
            masks = all_masks(self._width, self._kept).to(energy.device)
            table = masks.flatten(1).to(energy).T.contiguous()
            parts = energy.flatten(1).split(_BATCH // 16)
            return _untiled(torch.cat([masks[(part @ table).argmax(1)] for part in parts]), score.shape)
        if self._last is None:
            self._last = _start(self._width, self._kept, 0).to(energy.device).expand_as(energy).clone()
        parts = max(_BATCH // self._width**2, 1)
        for part, mask in zip(energy.split(parts), self._last.split(parts), strict=True):
            exchange(part, mask)
        return _untiled(self._last, score.shape)

    def step(self, device: torch.device, heights: Sequence[int]) -> Step | None:
        if not self.fast:
            return None
        from ..numerics import tile_kernels

        if self._width == 4:
            if self._kept == 2 and (pairs := kernel_for(device, "pairs_step")) is not None:
                return partial(pairs)  # a recording knows by this that kernels do all of it
            return partial(tile_kernels.masks_step, masks=_bits(4, self._kept).to(device))
        return partial(_exchange_step, width=self._width, pairs=_pairs(self._width).to(device))


def _exchange_step(
    b: Tensor, target: Tensor, support: Tensor, scale: float, rho: float, change: Tensor, width: int, pairs: Tensor
) -> None:
    from ..numerics import tile_kernels

    former = target * support
    target.sub_(former).mul_(scale).add_(b)
    tile_kernels.exchange(target.square(), support, width, pairs)
    change.copy_((target * support).mul_(2).sub_(b).sub_(former).mul_(rho))


@cache
def all_masks(width: int, kept: int) -> Tensor:
    """(masks, M, M) bool: exactly N in every row and column, rows with earlier entries first."""
    rows = []
    for chosen in itertools.combinations(range(width), kept):
        row = torch.zeros(width, dtype=torch.bool)
        row[list(chosen)] = True
        rows.append(row)
    masks = torch.stack([torch.stack(tile) for tile in itertools.product(rows, repeat=width)])
    return masks[(masks.sum(1) == kept).all(1)]


def _tiles(values: Tensor, width: int) -> Tensor:
    """(tiles, M, M) of (out, in), in row-major order."""
    rows, columns = values.shape[0] // width, values.shape[1] // width
    return values.reshape(rows, width, columns, width).transpose(1, 2).reshape(-1, width, width)


def _untiled(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    width = tiles.shape[1]
    return tiles.view(shape[0] // width, shape[1] // width, width, width).transpose(1, 2).reshape(shape)


def _enumerated(score: Tensor, kept: int) -> Tensor:
    """(tiles, M, M) the best mask of each tile."""
    masks = all_masks(score.shape[1], kept).to(score.device)
    table = masks.flatten(1).to(score).T.contiguous()
    energy = (score * score.abs()).flatten(1) @ table
    best = energy.amax(1, keepdim=True)
    equal = energy >= best - _EQUAL * score.square().sum((1, 2))[:, None]
    return masks[equal.to(torch.uint8).argmax(1)]


def _start(width: int, kept: int, number: int) -> Tensor:
    """(M, M) a band of N diagonals, its columns in another order for each number."""
    places = torch.arange(width)
    step = next(step for step in itertools.count(2 * number + 1) if math.gcd(step, width) == 1)
    mask = (places * step - places[:, None]) % width < kept
    return mask.flip(1) if number % 2 else mask


def _best_of_starts(energy: Tensor, kept: int) -> Tensor:
    best, most = None, None
    for number in range(_STARTS):
        mask = _start(energy.shape[1], kept, number).to(energy.device).expand_as(energy).clone()
        value = (energy * mask).sum((1, 2))
        for _ in range(_SWEEPS):
            before = value
            exchange(energy, mask)
            value = (energy * mask).sum((1, 2))
            if bool((value <= before + _EQUAL * before.abs()).all()):
                break
        if best is None:
            best, most = mask, value
        else:
            better = value > most + _EQUAL * most.abs()
            best, most = torch.where(better[:, None, None], mask, best), torch.where(better, value, most)
    return best


def exchange(energy: Tensor, mask: Tensor) -> None:
    """All pairs of rows exchange what raises the energy the most, then all pairs of columns.

    Args:
        energy: (tiles, M, M).
        mask: (tiles, M, M) bool, contiguous; changed in place.
    """
    width = energy.shape[1]
    if width in _IN_KERNEL and (kernel := kernel_for(energy.device, "exchange")) is not None:
        pairs = _pairs(width).to(energy.device)
        kernel(energy.contiguous().view(-1, width), mask.view(-1, width), width, pairs)
    else:
        _exchange(energy, mask)


def _exchange(energy: Tensor, mask: Tensor) -> None:
    width = energy.shape[1]
    for values, chosen in ((energy, mask), (energy.mT, mask.mT)):
        for first, second in _rounds(width):
            one, other = chosen[:, first], chosen[:, second]
            ahead = values[:, first] - values[:, second]
            least, give = ahead.masked_fill(~(one & ~other), torch.inf).min(2, keepdim=True)
            greatest, take = ahead.masked_fill(~(other & ~one), -torch.inf).max(2, keepdim=True)
            better = greatest > least
            flip = torch.zeros_like(one).scatter_(2, give, better).scatter_(2, take, better)
            chosen[:, first], chosen[:, second] = one ^ flip, other ^ flip


@cache
def _pairs(width: int) -> Tensor:
    """(pairs, 2) int32: the pairs of all rounds, in order."""
    return torch.tensor(
        [pair for first, second in _rounds(width) for pair in zip(first, second, strict=True)], dtype=torch.int32
    )


@cache
def _bits(width: int, kept: int) -> Tensor:
    """(masks,) int32: bit iM + j says whether a mask keeps entry (i, j)."""
    places = 1 << torch.arange(width * width, dtype=torch.int32)
    return (all_masks(width, kept).flatten(1).int() * places).sum(1, dtype=torch.int32)


@cache
def _rounds(width: int) -> list[tuple[list[int], list[int]]]:
    """All pairs of `width` rows, in rounds of pairs without a common row, as in a tournament."""
    ring, rounds = list(range(width + width % 2)), []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        pairs = [pair for pair in pairs if max(pair) < width]
        rounds.append(([min(pair) for pair in pairs], [max(pair) for pair in pairs]))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds
