"""Triton kernels for element-wise work that would otherwise pass through device memory many times.

Each has a plain counterpart in torch beside its caller (`alps._Layer`, `sparsegpt._sweep_step`, `sparseswaps._Pairs`),
which runs wherever Triton does not; the two differ in rounding only. Callers get them from `kernels.kernel_for`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
# A sample of so many entries at most lies in the registers of one program, which selects from it by itself.
SELECTED = 1 << 14


class Segments:
    """Layers whose states lie one after the other in one contiguous tensor, each with a threshold of its own.

    Args:
        sizes: number of entries of each.
        sparsities: the share of the entries of each that are not to be kept.
        strides: every how many entries of each one is taken as a sample; at most `SELECTED` are.
        device: where the state lies.

    Attributes:
        count: how many there are.
        places: (4, count) int64: where each begins, its size, its stride, and how many entries it is to keep.
        ranks: (2, count) float64: the sparsities, and what each sample's rank is corrected by.
        kept: (count,) int32, how many entries the last threshold of each has kept.
    """

    def __init__(
        self, sizes: Sequence[int], sparsities: Sequence[float], strides: Sequence[int], device: torch.device
    ) -> None:
        wanted = [round((1 - sparsity) * size) for size, sparsity in zip(sizes, sparsities, strict=True)]
        ends = list(accumulate(sizes))
        # In few tensors, as each takes time at every launch.
        self.places = torch.tensor([[0, *ends[:-1]], sizes, strides, wanted], dtype=torch.int64).to(device)
        self.ranks = torch.tensor([sparsities, [0.0] * len(sizes)], dtype=torch.float64).to(device)
        self.kept = self.places[3].int()
        self.count, self.largest = len(sizes), max(sizes)
        self.sampled = max(-(-size // stride) for size, stride in zip(sizes, strides, strict=True))


def sampled_threshold(b: Tensor, target: Tensor, support: Tensor, scale: float, segments: Segments) -> Tensor:
    """The thresholds of the next `threshold_step`, from every `stride`-th entry of each segment: the entry of the
    sample whose rank is the sparsity's, rounded down, so that less than one entry of the sample is kept too many. It is
    corrected by what the former thresholds have kept too many (`ThresholdTracker`).

    Args:
        b: as in `threshold_step`, and so are `target`, `support` and `scale`.
        segments: of the state; its `ranks` are brought up to date, and its `kept` becomes 0.

    Returns:
        (segments,) float32 on the device.
    """
    threshold = torch.empty(segments.count, device=b.device)
    with torch.cuda.device_of(b):
        _sampled_threshold[(segments.count,)](
            b, target, support.view(torch.uint8), threshold, segments.places, segments.ranks, segments.kept,
            segments.count, scale, BLOCK=max(triton.next_power_of_2(segments.sampled), 32), num_warps=16,
        )  # fmt: skip
    return threshold


def threshold_step(
    b: Tensor,
    target: Tensor,
    support: Tensor,
    scale: float,
    rho: float,
    change: Tensor,
    threshold: Tensor,
    segments: Segments | None = None,
) -> Tensor:
    """ADMM's D and V for a new B, entries of at least `threshold` in magnitude being kept.

    Args:
        b: the new B, any shape, contiguous like all others, float32.
        target: B + V/ρ of the former iteration, which holds D on the support and V/ρ elsewhere; overwritten.
        support: bool, of the former iteration; overwritten.
        scale: former ρ over ρ.
        rho: ρ.
        change: low precision, overwritten: ρ(2D - B - D_former).
        threshold: (segments,) float32; 0-dim without segments.
        segments: layers with thresholds of their own, `kept` of which is 0; all is one layer if not given.

    Returns:
        int32, how many entries are kept, of each segment; `segments.kept` where there are such.
    """
    if segments is None:
        count, places = torch.zeros((), dtype=torch.int32, device=b.device), None
        size, layers = b.numel(), 1
    else:
        count, places, size, layers = segments.kept, segments.places, segments.largest, segments.count
    with torch.cuda.device_of(b):
        _threshold_step[(triton.cdiv(size, _BLOCK), layers)](
            b, target, support.view(torch.uint8), change, threshold, count, places, layers, scale, rho, size,
            BLOCK=_BLOCK,
        )  # fmt: skip
    return count


def sampled_step(
    b: Tensor, target: Tensor, support: Tensor, scale: float, rho: float, change: Tensor, segments: Segments
) -> None:
    """`threshold_step` by `sampled_threshold`."""
    threshold = sampled_threshold(b, target, support, scale, segments)
    threshold_step(b, target, support, scale, rho, change, threshold, segments)


def group_step(
    b: Tensor, target: Tensor, support: Tensor, scale: float, rho: float, change: Tensor, group: tuple[int, int]
) -> None:
    """The same where the N largest of every M consecutive entries are kept, the first among equals.

    Args:
        group: (N, M), M a power of two that divides the width.
    """
    kept, width = group
    groups = b.numel() // width
    block = max(_BLOCK // width // width, 16)
    with torch.cuda.device_of(b):
        _group_step[(triton.cdiv(groups, block),)](
            b, target, support.view(torch.uint8), change, scale, rho, groups, kept, WIDTH=width, BLOCK=block
        )


def sweep_step(work: Tensor, keep: Tensor, factor: Tensor, errors: Tensor, group: tuple[int, int] | None) -> None:
    """SparseGPT's walk over a few columns, one after the other.

    Args:
        work: (…, columns, out) W, rows contiguous, compensated in place; at most 64 columns, and one dimension before
            them at most, in which any strides are.
        keep: bool of the same shape; read without `group`, otherwise overwritten.
        factor: (…, columns, columns), the columns' part of U, any strides.
        errors: of the same shape as `work`, overwritten.
        group: None, or (N, M): the N best of every M consecutive columns by W²/U_jj² are kept, M a divisor of their
            number.
    """
    columns, out = work.shape[-2:]
    kept, width = group or (0, 0)
    block = 16  # with one warp: what steps wait for is in its own registers, and few rows still fill the device
    several = work.ndim > 2
    apart = [part.stride(0) if several else 0 for part in (work, keep, factor, errors)]
    with torch.cuda.device_of(work):
        _sweep_step[(triton.cdiv(out, block), len(work) if several else 1)](
            work, keep.view(torch.uint8), factor, errors, *apart, columns, out, *factor.stride()[-2:], kept,
            WIDTH=width, COLUMNS=triton.next_power_of_2(columns), BLOCK=block, num_warps=1,
        )  # fmt: skip


def best_pairs(gram: Tensor, s: Tensor, regrow: Tensor, prune: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SparseSwaps' best pair (p, k) of every row: the smallest regrow_p + prune_k - 2 s_p s_k R_pk.

    Args:
        gram: (in, in) R, contiguous like all others.
        s, regrow, prune: (rows, in); infinite where an input cannot be p or k.
        bound: (rows, in) numbers that no pair of an input as p is below.

    Returns:
        The value, p and k, (rows,) each; (0, 0, 0) where no pair is below 0.
    """
    bound, order = bound.sort(dim=1)
    rows, width = s.shape
    best = torch.zeros(rows, device=s.device)
    p, k = (torch.zeros(rows, dtype=torch.long, device=s.device) for _ in range(2))
    with torch.cuda.device_of(s):
        _best_pairs[(rows,)](
            gram, s, regrow, prune, bound, order, best, p, k, WIDTH=width, TRIED=16, BLOCK=256, num_warps=8
        )
    return best, p, k


def combine(parts: Sequence[Tensor], weights: Sequence[float], low: torch.dtype) -> Tensor:
    """Σ weight · part, rounded to a lower precision, in one pass.

    Args:
        parts: four contiguous tensors of one shape.
        weights: their weights.
        low: the lower precision.
    """
    rounded = torch.empty_like(parts[0], dtype=low)
    size = rounded.numel()
    with torch.cuda.device_of(rounded):
        _combine[(triton.cdiv(size, _BLOCK),)](*parts, *weights, rounded, size, BLOCK=_BLOCK)
    return rounded


def rounded(change: Tensor, rest: Tensor, eight: Tensor, unit: float) -> None:
    """What is left over by rounding, or is too large, is rounded with the next change, so that it does not add up.

    Args:
        change: any shape, contiguous like the others, in low precision.
        rest: of the same shape and dtype: what former calls have left over; overwritten.
        eight: float8 of the same shape, overwritten: unit · (change + rest), between -448 and 448.
        unit: a power of two.
    """
    size = change.numel()
    with torch.cuda.device_of(change):
        _rounded[(triton.cdiv(size, _BLOCK),)](change, rest, eight, unit, 1 / unit, size, BLOCK=_BLOCK)


def add_correction(b: Tensor, product: Tensor, eight: Tensor, diagonal: Tensor) -> None:
    """b += product + eight · diag(diagonal), in one pass.

    Args:
        b: (rows, width) float32, contiguous like the others.
        product: (rows, width).
        eight: (rows, width) float8.
        diagonal: (width,) float32.
    """
    rows, width = b.shape
    block = 1024
    with torch.cuda.device_of(b):
        _add_correction[(rows, triton.cdiv(width, block))](b, product, eight, diagonal, width, BLOCK=block)


@triton.jit
def _rounded(change_at, rest_at, eight_at, unit, inverse, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(change_at + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(rest_at + at, mask=inside, other=0.0).to(tl.float32)
    eight = tl.minimum(tl.maximum(total * unit, -448.0), 448.0).to(eight_at.dtype.element_ty)
    tl.store(eight_at + at, eight, mask=inside)
    tl.store(rest_at + at, (total - eight.to(tl.float32) * inverse).to(rest_at.dtype.element_ty), mask=inside)


@triton.jit
def _add_correction(b_at, product_at, eight_at, diagonal_at, width, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    b = tl.load(b_at + at, mask=inside, other=0.0)
    b += tl.load(product_at + at, mask=inside, other=0.0).to(tl.float32)
    diagonal = tl.load(diagonal_at + column, mask=inside, other=0.0)
    b += tl.load(eight_at + at, mask=inside, other=0.0).to(tl.float32) * diagonal
    tl.store(b_at + at, b, mask=inside)


@triton.jit
def _advance(b, target, support, scale):
    """(former D, new B + V/ρ)."""
    former = tl.where(support, target, 0.0)
    return former, b + (target - former) * scale


@triton.jit
def _sampled_threshold(
    b_at, target_at, support_at, threshold_at, places_at, ranks_at, kept_at, layers, scale, BLOCK: tl.constexpr
):
    layer = tl.program_id(0)
    start = tl.load(places_at + layer)
    stride, wanted = tl.load(places_at + 2 * layers + layer), tl.load(places_at + 3 * layers + layer)
    size = tl.cdiv(tl.load(places_at + layers + layer), stride)
    drift = tl.load(ranks_at + layers + layer) + (tl.load(kept_at + layer) - wanted).to(tl.float64) / stride
    rank = tl.load(ranks_at + layer) * size + drift
    rank = tl.minimum(tl.maximum(rank, 0.0), size - 1.0).to(tl.int32)
    place = tl.arange(0, BLOCK)
    inside, at = place < size, start + place * stride
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    _, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    # Bits of floats that are not negative are in the floats' order. The largest number below which there are no more
    # than `rank` entries is the entry of that rank; it is found bit by bit.
    bits = tl.where(inside, tl.abs(target).to(tl.int32, bitcast=True), 0x7FFFFFFF)
    found = 0
    for step in range(31):
        tried = found | (1 << (30 - step))
        found = tl.where(tl.sum((bits < tried).to(tl.int32), axis=0) <= rank, tried, found)
    # After the sums, behind which no thread of the program has still to read what is overwritten here.
    tl.store(threshold_at + layer, found.to(tl.float32, bitcast=True))
    tl.store(ranks_at + layers + layer, drift)
    tl.store(kept_at + layer, 0)


@triton.jit
def _threshold_step(
    b_at, target_at, support_at, change_at, threshold_at, count_at, places_at, layers, scale, rho, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if places_at is not None:
        inside = at < tl.load(places_at + layers + layer)
        at += tl.load(places_at + layer)
    else:
        inside = at < size
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    former, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    support = (tl.abs(target) >= tl.load(threshold_at + layer)) & inside
    change = rho * (2 * tl.where(support, target, 0.0) - b - former)
    tl.store(target_at + at, target, mask=inside)
    tl.store(support_at + at, support.to(tl.uint8), mask=inside)
    tl.store(change_at + at, change.to(change_at.dtype.element_ty), mask=inside)
    tl.atomic_add(count_at + layer, tl.sum(support.to(tl.int32), axis=0))


@triton.jit
def _group_step(
    b_at, target_at, support_at, change_at, scale, rho, groups, kept, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, WIDTH)
    at = group[:, None] * WIDTH + place[None, :]
    inside = (group < groups)[:, None] & (place >= 0)[None, :]
    b = tl.load(b_at + at, mask=inside, other=0.0)
    support = tl.load(support_at + at, mask=inside, other=0) != 0
    former, target = _advance(b, tl.load(target_at + at, mask=inside, other=0.0), support, scale)
    score = tl.abs(target)
    own, other = score[:, :, None], score[:, None, :]
    beaten = (other > own) | ((other == own) & (place[None, :] < place[:, None])[None, :, :])
    support = tl.sum(beaten.to(tl.int32), axis=2) < kept
    change = rho * (2 * tl.where(support, target, 0.0) - b - former)
    tl.store(target_at + at, target, mask=inside)
    tl.store(support_at + at, support.to(tl.uint8), mask=inside)
    tl.store(change_at + at, change.to(change_at.dtype.element_ty), mask=inside)


@triton.jit
def _sweep_step(
    work_at, keep_at, factor_at, errors_at, works, keeps, factors, errors_apart, columns, out,
    factor_row, factor_column, kept, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    work_at += layer * works
    keep_at += layer * keeps
    factor_at += layer * factors
    errors_at += layer * errors_apart
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = column[:, None].to(tl.int64) * out + row[None, :]
    inside = (column < columns)[:, None] & (row < out)[None, :]
    work = tl.load(work_at + at, mask=inside, other=0.0)
    inverse = 1 / tl.load(factor_at + column * (factor_row + factor_column), mask=column < columns, other=1.0)
    keep = tl.zeros((COLUMNS, BLOCK), dtype=tl.int32)
    if WIDTH == 0:
        keep += tl.load(keep_at + at, mask=inside, other=0).to(tl.int32)
    errors = tl.zeros((COLUMNS, BLOCK), dtype=tl.float32)
    for current in range(COLUMNS):
        if WIDTH > 0:  # noqa: SIM102 (decided when compiling: a remainder by zero must not be compiled)
            if current % WIDTH == 0:
                score = work * inverse[:, None]
                score = tl.abs(score)  # in the order of its square, which float32 may not hold
                beaten = tl.zeros((COLUMNS, BLOCK), dtype=tl.int32)
                for place in range(WIDTH):
                    other = tl.sum(tl.where((column == current + place)[:, None], score, 0.0), axis=0)[None, :]
                    earlier = (column > current + place)[:, None]
                    beaten += ((other > score) | ((other == score) & earlier)).to(tl.int32)
                group = ((column >= current) & (column < current + WIDTH))[:, None]
                keep = tl.where(group & (beaten < kept), 1, keep)
        here = (column == current)[:, None]
        weight = tl.sum(tl.where(here, work, 0.0), axis=0)
        kept_here = tl.sum(tl.where(here, keep, 0), axis=0)
        scale = tl.sum(tl.where(column == current, inverse, 0.0), axis=0)
        error = tl.where(kept_here > 0, 0.0, weight * scale)
        later = (column > current) & (column < columns)
        factor = tl.load(factor_at + current * factor_row + column * factor_column, mask=later, other=0.0)
        work -= factor[:, None] * error[None, :]
        errors = tl.where(here, error[None, :], errors)
    tl.store(work_at + at, work, mask=inside)
    tl.store(errors_at + at, errors, mask=inside)
    if WIDTH > 0:
        tl.store(keep_at + at, keep.to(tl.uint8), mask=inside)


@triton.jit
def _best_pairs(
    gram_at, s_at, regrow_at, prune_at, bound_at, order_at, best_at, p_at, k_at,
    WIDTH: tl.constexpr, TRIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * WIDTH
    lowest, p, k, start = 0.0, 0, 0, 0
    reach = tl.load(bound_at + row)
    # In the order of their bounds: behind the first that is not below the best pair found, no p has a better one.
    while reach < lowest:
        place = start + tl.arange(0, TRIED)
        inside = place < WIDTH
        tried = tl.load(order_at + row + place, mask=inside, other=0)
        scale = -2 * tl.load(s_at + row + tried, mask=inside, other=0.0)
        value, other = tl.full((TRIED,), float("inf"), tl.float32), tl.zeros((TRIED,), tl.int32)
        for first in range(0, WIDTH, BLOCK):
            column = first + tl.arange(0, BLOCK)
            there = column < WIDTH
            added = tl.load(prune_at + row + column, mask=there, other=float("inf"))
            s = tl.load(s_at + row + column, mask=there, other=0.0)
            pairs = inside[:, None] & there[None, :]
            gram = tl.load(gram_at + tried[:, None] * WIDTH + column[None, :], mask=pairs, other=0.0)
            change = gram * s[None, :] * scale[:, None] + added[None, :]
            smallest, at = tl.min(change, axis=1, return_indices=True)
            other = tl.where(smallest < value, first + at, other)
            value = tl.minimum(smallest, value)
        value += tl.load(regrow_at + row + tried, mask=inside, other=float("inf"))
        smallest, at = tl.min(value, axis=0, return_indices=True)
        if smallest < lowest:
            chosen = tl.arange(0, TRIED) == at
            lowest = smallest
            p = tl.sum(tl.where(chosen, tried, 0), axis=0).to(tl.int32)
            k = tl.sum(tl.where(chosen, other, 0), axis=0)
        start += TRIED
        reach = tl.load(bound_at + row + start, mask=start < WIDTH, other=float("inf"))
    tl.store(best_at + tl.program_id(0), lowest)
    tl.store(p_at + tl.program_id(0), p)
    tl.store(k_at + tl.program_id(0), k)


@triton.jit
def _combine(a_at, b_at, c_at, d_at, a, b, c, d, low_at, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = a * tl.load(a_at + at, mask=inside, other=0.0).to(tl.float32)
    total += b * tl.load(b_at + at, mask=inside, other=0.0).to(tl.float32)
    total += c * tl.load(c_at + at, mask=inside, other=0.0).to(tl.float32)
    total += d * tl.load(d_at + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(low_at + at, total.to(low_at.dtype.element_ty), mask=inside)
