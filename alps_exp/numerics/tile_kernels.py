"""Triton kernels of the patterns whose choices go beyond one group of a row: ADMM's D and V for a new B, and the
exchange within transposable tiles. Each has its plain counterpart in `patterns`, which runs wherever Triton does not.

The arguments that `step`s share are those of `triton_kernels.threshold_step`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_kernels import _advance


def masks_step(
    b: Tensor, target: Tensor, support: Tensor, scale: float, rho: float, change: Tensor, masks: Tensor
) -> None:
    """Where every 4 × 4 tile has the mask that keeps the most energy, the first among equals.

    Args:
        b: (…, out, in), both multiples of 4.
        masks: (masks,) int32: bit 4i + j says whether entry (i, j) is kept.
    """
    across, tiles = b.shape[-1] // 4, b.numel() // 16
    block = 64
    with torch.cuda.device_of(b):
        _masks_step[(triton.cdiv(tiles, block),)](
            b, target, support.view(torch.uint8), change, masks, len(masks), scale, rho, across, tiles,
            MASKS=max(triton.next_power_of_2(len(masks)), 16), BLOCK=block, num_warps=8,
        )  # fmt: skip


def pairs_step(b: Tensor, target: Tensor, support: Tensor, scale: float, rho: float, change: Tensor) -> None:
    """Where every 4 × 4 tile has a mask with two entries in each row and column that keeps the most energy.

    Of the 90 masks no sum is made twice: what rows may have together depends on how often their pairs use each column.

    Args:
        b: (…, out, in), both multiples of 4.
    """
    across, tiles, block = b.shape[-1] // 4, b.numel() // 16, 128
    with torch.cuda.device_of(b):
        _pairs_step[(triton.cdiv(tiles, block),)](
            b, target, support.view(torch.uint8), change, scale, rho, across, tiles, BLOCK=block, num_warps=4
        )


def blocks_step(
    b: Tensor,
    target: Tensor,
    support: Tensor,
    scale: float,
    rho: float,
    change: Tensor,
    tile: tuple[int, int],
    keep: Callable[[Tensor], Tensor],
) -> None:
    """Where blocks stay or go as a whole.

    Args:
        b: (…, out, in), layers one below the other.
        tile: outputs and inputs of a block, powers of two that divide the layers' shapes.
        keep: (blocks down, blocks across) energies ↦ which stay, bool.
    """
    area, across = tile[0] * tile[1], b.shape[-1] // tile[1]
    tiles, block = b.numel() // area, max(1024 // area, 1)
    grid, sizes = (triton.cdiv(tiles, block),), {"ROWS": tile[0], "COLUMNS": tile[1], "BLOCK": block}
    energy = torch.empty(tiles // across, across, dtype=torch.float32, device=b.device)
    with torch.cuda.device_of(b):
        _block_energies[grid](b, target, support.view(torch.uint8), energy, scale, across, tiles, **sizes)
        kept = keep(energy).contiguous().view(torch.uint8)
        _blocks_step[grid](b, target, support.view(torch.uint8), change, kept, scale, rho, across, tiles, **sizes)


def nested_step(
    b: Tensor,
    target: Tensor,
    support: Tensor,
    scale: float,
    rho: float,
    change: Tensor,
    outer: tuple[int, int],
    inner: tuple[int, int],
) -> None:
    """Where of every M₁ consecutive groups of M₀ entries, N₁ are kept with the N₀ largest of their entries: those
    groups in which these have the most energy. The first among equals.

    Args:
        outer: (N₁, M₁), M₁ a power of two.
        inner: (N₀, M₀), M₀ a power of two, and M₁M₀ divides the width.
    """
    sets = b.numel() // (outer[1] * inner[1])
    block = max(1024 // (outer[1] * inner[1] * max(outer[1], inner[1])), 1) * 4
    with torch.cuda.device_of(b):
        _nested_step[(triton.cdiv(sets, block),)](
            b, target, support.view(torch.uint8), change, scale, rho, sets, outer[0], inner[0],
            OUTER=outer[1], INNER=inner[1], BLOCK=block,
        )  # fmt: skip


def shared_step(
    b: Tensor,
    target: Tensor,
    support: Tensor,
    scale: float,
    rho: float,
    change: Tensor,
    choices: Tensor,
    rows: int,
    kept: int,
    width: int,
) -> None:
    """Where `rows` outputs share some of every `width` inputs, and each keeps the `kept` largest of these: those inputs
    with which the most energy is kept. The first among equals.

    Args:
        choices: (choices,) int32: bit j says whether input j is shared.
        rows: V, a divisor of the outputs.
        kept: N, below the number of inputs that are shared.
        width: M, a divisor of the inputs; one program holds V × M entries, each made a power of two.
    """
    across = b.shape[-1] // width
    with torch.cuda.device_of(b):
        _shared_step[(b.numel() // (rows * width),)](
            b, target, support.view(torch.uint8), change, choices, len(choices), scale, rho, across, rows, width,
            KEPT=kept, ROWS=triton.next_power_of_2(rows), WIDTH=triton.next_power_of_2(width),
        )  # fmt: skip


def exchange(energy: Tensor, mask: Tensor, width: int, pairs: Tensor) -> None:
    """`transposing.exchange`: in every tile, pair by pair of rows and then of columns, the two exchange what raises the
    energy that is kept the most.

    Args:
        energy: (…, out, in) contiguous, both multiples of `width`.
        mask: the same shape, bool, contiguous; overwritten.
        width: M, a power of two.
        pairs: (pairs, 2) int32.
    """
    across, tiles = energy.shape[-1] // width, energy.numel() // width**2
    block = max(512 // width, 1)
    with torch.cuda.device_of(energy):
        _exchange[(triton.cdiv(tiles, block),)](
            energy, mask.view(torch.uint8), pairs, len(pairs), energy.shape[-1], across, tiles, WIDTH=width, BLOCK=block
        )


@triton.jit
def _finish(b, former, target, support, target_at, support_at, change_at, at, inside, rho):
    change = rho * (2 * tl.where(support, target, 0.0) - b - former)
    tl.store(target_at + at, target, mask=inside)
    tl.store(support_at + at, support.to(tl.uint8), mask=inside)
    tl.store(change_at + at, change.to(change_at.dtype.element_ty), mask=inside)


@triton.jit
def _masks_step(
    b_at, target_at, support_at, change_at, masks_at, masks, scale, rho, across, tiles,
    MASKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 16)
    corner = tile // across * (16 * across) + tile % across * 4
    at = corner[:, None] + (place // 4 * (4 * across) + place % 4)[None, :]
    inside = (tile < tiles)[:, None] & (place >= 0)[None, :]
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    former, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    # The energy of every mask is a product with a table of zeros and ones: exact in TF32, of which three make float32.
    number = tl.arange(0, MASKS)
    bits = tl.load(masks_at + number, mask=number < masks, other=0)
    table = ((bits[None, :] >> place[:, None]) & 1).to(tl.float32)
    value = tl.dot(target * target, table, input_precision="tf32x3")
    best = tl.load(masks_at + tl.argmax(value, axis=1, tie_break_left=True))
    support = ((best[:, None] >> place[None, :]) & 1) != 0
    _finish(b, former, target, support, target_at, support_at, change_at, at, inside, rho)


@triton.jit
def _better(value, bits, other, other_bits):
    return tl.maximum(value, other), tl.where(other > value, other_bits, bits)


@triton.jit
def _crossed(one_first, other_second, one_second, other_first, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Of two rows, one has the pair FIRST and the other SECOND: the better way round, and its bits."""
    there, back = one_first + other_second, one_second + other_first
    return tl.maximum(there, back), tl.where(back > there, SECOND | (FIRST << 4), FIRST | (SECOND << 4))


@triton.jit
def _joined(value, bits, above, above_bits, below, below_bits):
    return _better(value, bits, above + below, above_bits | (below_bits << 8))


@triton.jit
def _opposite(ab, ac, ad, bc, bd, cd, other_ab, other_ac, other_ad, other_bc, other_bd, other_cd):
    """Of two rows, which together have every column once, the best."""
    value, bits = _crossed(ab, other_cd, cd, other_ab, 3, 12)
    more, more_bits = _crossed(ac, other_bd, bd, other_ac, 5, 10)
    value, bits = _better(value, bits, more, more_bits)
    more, more_bits = _crossed(ad, other_bc, bc, other_ad, 9, 6)
    return _better(value, bits, more, more_bits)


@triton.jit
def _row(b_at, target_at, support_at, at, inside, scale, BLOCK: tl.constexpr):
    """Of a row of each tile: B, the former D and the new T, and T's energies of all pairs of columns."""
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    former, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    even, odd = tl.split(tl.reshape(target * target, (BLOCK, 2, 2)))
    a, c = tl.split(even)
    b_, d = tl.split(odd)
    return b, former, target, a + b_, a + c, a + d, b_ + c, b_ + d, c + d


@triton.jit
def _pairs_step(
    b_at, target_at, support_at, change_at, scale, rho, across, tiles, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 4)
    corner = tile // across * (16 * across) + tile % across * 4
    at = corner[:, None] + place[None, :]
    inside = (tile < tiles)[:, None] & (place >= 0)[None, :]
    step = 4 * across
    b0, f0, t0, ab0, ac0, ad0, bc0, bd0, cd0 = _row(b_at, target_at, support_at, at, inside, scale, BLOCK)
    b1, f1, t1, ab1, ac1, ad1, bc1, bd1, cd1 = _row(b_at, target_at, support_at, at + step, inside, scale, BLOCK)
    b2, f2, t2, ab2, ac2, ad2, bc2, bd2, cd2 = _row(b_at, target_at, support_at, at + 2 * step, inside, scale, BLOCK)
    b3, f3, t3, ab3, ac3, ad3, bc3, bd3, cd3 = _row(b_at, target_at, support_at, at + 3 * step, inside, scale, BLOCK)
    # Bits of a pair: a 1, b 2, c 4, d 8. The two upper rows have every column once, and so have the lower ones;
    value, bits = _opposite(ab0, ac0, ad0, bc0, bd0, cd0, ab1, ac1, ad1, bc1, bd1, cd1)
    below, below_bits = _opposite(ab2, ac2, ad2, bc2, bd2, cd2, ab3, ac3, ad3, bc3, bd3, cd3)
    value, bits = value + below, bits | (below_bits << 8)
    # or both upper ones have the same pair, and both lower ones the other two columns;
    value, bits = _better(value, bits, ab0 + ab1 + cd2 + cd3, 0xCC33)
    value, bits = _better(value, bits, ac0 + ac1 + bd2 + bd3, 0xAA55)
    value, bits = _better(value, bits, ad0 + ad1 + bc2 + bc3, 0x6699)
    value, bits = _better(value, bits, bc0 + bc1 + ad2 + ad3, 0x9966)
    value, bits = _better(value, bits, bd0 + bd1 + ac2 + ac3, 0x55AA)
    value, bits = _better(value, bits, cd0 + cd1 + ab2 + ab3, 0x33CC)
    # or the upper ones share one column and leave one out, which then the lower ones share.
    above, above_bits = _crossed(ac0, ad1, ad0, ac1, 5, 9)
    below, below_bits = _crossed(bc2, bd3, bd2, bc3, 6, 10)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(ab0, ad1, ad0, ab1, 3, 9)
    below, below_bits = _crossed(bc2, cd3, cd2, bc3, 6, 12)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(ab0, ac1, ac0, ab1, 3, 5)
    below, below_bits = _crossed(bd2, cd3, cd2, bd3, 10, 12)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(bc0, bd1, bd0, bc1, 6, 10)
    below, below_bits = _crossed(ac2, ad3, ad2, ac3, 5, 9)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(ab0, bd1, bd0, ab1, 3, 10)
    below, below_bits = _crossed(ac2, cd3, cd2, ac3, 5, 12)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(ab0, bc1, bc0, ab1, 3, 6)
    below, below_bits = _crossed(ad2, cd3, cd2, ad3, 9, 12)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(bc0, cd1, cd0, bc1, 6, 12)
    below, below_bits = _crossed(ab2, ad3, ad2, ab3, 3, 9)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(ac0, cd1, cd0, ac1, 5, 12)
    below, below_bits = _crossed(ab2, bd3, bd2, ab3, 3, 10)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(ac0, bc1, bc0, ac1, 5, 6)
    below, below_bits = _crossed(ad2, bd3, bd2, ad3, 9, 10)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(bd0, cd1, cd0, bd1, 10, 12)
    below, below_bits = _crossed(ab2, ac3, ac2, ab3, 3, 5)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(ad0, cd1, cd0, ad1, 9, 12)
    below, below_bits = _crossed(ab2, bc3, bc2, ab3, 3, 6)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    above, above_bits = _crossed(ad0, bd1, bd0, ad1, 9, 10)
    below, below_bits = _crossed(ac2, bc3, bc2, ac3, 5, 6)
    value, bits = _joined(value, bits, above, above_bits, below, below_bits)
    for_row0 = ((bits[:, None] >> place[None, :]) & 1) != 0
    _finish(b0, f0, t0, for_row0, target_at, support_at, change_at, at, inside, rho)
    for_row1 = ((bits[:, None] >> (place + 4)[None, :]) & 1) != 0
    _finish(b1, f1, t1, for_row1, target_at, support_at, change_at, at + step, inside, rho)
    for_row2 = ((bits[:, None] >> (place + 8)[None, :]) & 1) != 0
    _finish(b2, f2, t2, for_row2, target_at, support_at, change_at, at + 2 * step, inside, rho)
    for_row3 = ((bits[:, None] >> (place + 12)[None, :]) & 1) != 0
    _finish(b3, f3, t3, for_row3, target_at, support_at, change_at, at + 3 * step, inside, rho)


@triton.jit
def _block_places(across, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, ROWS * COLUMNS)
    corner = tile // across * (ROWS * COLUMNS * across) + tile % across * COLUMNS
    at = corner[:, None] + (place // COLUMNS * (COLUMNS * across) + place % COLUMNS)[None, :]
    return tile, at, (tile < tiles)[:, None] & (place >= 0)[None, :]


@triton.jit
def _block_energies(
    b_at, target_at, support_at, energy_at, scale, across, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, at, inside = _block_places(across, tiles, ROWS, COLUMNS, BLOCK)
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    _, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    tl.store(energy_at + tile, tl.sum(target * target, axis=1), mask=tile < tiles)


@triton.jit
def _blocks_step(
    b_at, target_at, support_at, change_at, kept_at, scale, rho, across, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, at, inside = _block_places(across, tiles, ROWS, COLUMNS, BLOCK)
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    former, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    kept = tl.load(kept_at + tile, mask=tile < tiles, other=0) != 0
    _finish(b, former, target, kept[:, None] & inside, target_at, support_at, change_at, at, inside, rho)


@triton.jit
def _nested_step(
    b_at, target_at, support_at, change_at, scale, rho, sets, outer_kept, kept,
    OUTER: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * (BLOCK * OUTER) + tl.arange(0, BLOCK * OUTER)
    place, outer = tl.arange(0, INNER), tl.arange(0, OUTER)
    at = group[:, None] * INNER + place[None, :]
    inside = (group < sets * OUTER)[:, None] & (place >= 0)[None, :]
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    former, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    energy = target * target
    own, other = energy[:, :, None], energy[:, None, :]
    beaten = (other > own) | ((other == own) & (place[None, :] < place[:, None])[None, :, :])
    support = tl.sum(beaten.to(tl.int32), axis=2) < kept
    energy = tl.reshape(tl.sum(tl.where(support, energy, 0.0), axis=1), (BLOCK, OUTER))
    own, other = energy[:, :, None], energy[:, None, :]
    beaten = (other > own) | ((other == own) & (outer[None, :] < outer[:, None])[None, :, :])
    full = tl.reshape((tl.sum(beaten.to(tl.int32), axis=2) < outer_kept).to(tl.int32), (BLOCK * OUTER,))
    support = support & (full != 0)[:, None]
    _finish(b, former, target, support, target_at, support_at, change_at, at, inside, rho)


@triton.jit
def _shared_step(
    b_at, target_at, support_at, change_at, choices_at, choices, scale, rho, across, rows, width,
    KEPT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row, place = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    corner = tile // across * (rows * width * across) + tile % across * width
    at = corner + row[:, None] * (width * across) + place[None, :]
    inside = (row < rows)[:, None] & (place < width)[None, :]
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    former, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    energy = target * target
    # An entry beats another of its row with more energy, or with as much and an earlier place.
    own, other = energy[:, :, None], energy[:, None, :]
    rank = tl.sum(
        ((other > own) | ((other == own) & (place[None, :] < place[:, None])[None, :, :])).to(tl.int32), axis=2
    )
    best, most = 0, -1.0
    for number in range(choices):
        choice = tl.load(choices_at + number)
        # The KEPT first of the shared entries of each row, by the ranks, which are all different.
        left = tl.where((((choice >> place) & 1) != 0)[None, :], rank, WIDTH)
        taken = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        for _ in tl.static_range(KEPT):
            first = left == tl.min(left, axis=1)[:, None]
            taken = tl.where(first, energy, taken)
            left = tl.where(first, WIDTH, left)
        value = tl.sum(tl.sum(taken, axis=1), axis=0)
        best, most = tl.where(value > most, choice, best), tl.maximum(value, most)
    left = tl.where((((best >> place) & 1) != 0)[None, :], rank, WIDTH)
    support = left < 0
    for _ in tl.static_range(KEPT):
        first = left == tl.min(left, axis=1)[:, None]
        support = support | first
        left = tl.where(first, WIDTH, left)
    _finish(b, former, target, support, target_at, support_at, change_at, at, inside, rho)


@triton.jit
def _exchange(energy_at, mask_at, pairs_at, pairs, width, across, tiles, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, WIDTH)
    corner = (tile // across * (WIDTH * width) + tile % across * WIDTH)[:, None]
    inside = (tile < tiles)[:, None] & (place >= 0)[None, :]
    for turn in range(2):
        # Along a pair's lines, and from one line to the next: rows first, then columns.
        along = tl.where(turn == 0, 1, width).to(tl.int64)
        between = tl.where(turn == 0, width, 1).to(tl.int64)
        for number in range(pairs):
            at = corner + place[None, :] * along + tl.load(pairs_at + 2 * number) * between
            other_at = corner + place[None, :] * along + tl.load(pairs_at + 2 * number + 1) * between
            ahead = tl.load(energy_at + at, mask=inside, other=0.0) - tl.load(
                energy_at + other_at, mask=inside, other=0.0
            )
            one = tl.load(mask_at + at, mask=inside, other=0) != 0
            other = tl.load(mask_at + other_at, mask=inside, other=0) != 0
            low = tl.where(one & (other == 0), ahead, float("inf"))
            high = tl.where(other & (one == 0), ahead, float("-inf"))
            least, greatest = tl.min(low, axis=1)[:, None], tl.max(high, axis=1)[:, None]
            give = tl.min(tl.where(low == least, place[None, :], WIDTH), axis=1)[:, None]
            take = tl.min(tl.where(high == greatest, place[None, :], WIDTH), axis=1)[:, None]
            flip = (greatest > least) & ((place[None, :] == give) | (place[None, :] == take))
            tl.store(mask_at + at, (one ^ flip).to(tl.uint8), mask=inside)
            tl.store(mask_at + other_at, (other ^ flip).to(tl.uint8), mask=inside)
        tl.debug_barrier()  # what follows reads across the lines what other threads have written
