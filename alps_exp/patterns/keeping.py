"""Masks of exactly so many largest entries of a tensor, or of each of its rows; first entries first among equals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Entries up to which a GPU sorts in less time than it takes to look at counts on the way.
_SORTED = 1 << 20


def keep_largest(score: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` largest entries of the whole tensor, first entries first among equals."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    score = score.contiguous()
    if score.is_cuda and score.numel() <= _SORTED:
        return _first_largest(score.view(1, -1), count).view_as(score)
    threshold = _kth_largest(score.view(-1), count)
    mask = score >= threshold
    surplus = int(mask.count_nonzero()) - count
    if surplus:
        ties = (score == threshold).view(-1).nonzero().squeeze(1)
        mask.view(-1)[ties[len(ties) - surplus :]] = False
    return mask


def _kth_largest(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest entry (count from 1), exactly.

    Large inputs are first narrowed by the quantiles of a sample to the few entries near the threshold; the bracket is
    verified by counting, so the sample decides the time and never the result.

    Args:
        values: (n,) contiguous.
    """
    size = values.numel()
    if size > 1 << 15:
        # An odd stride, or the sample would hold a few columns only where the width is a power of two.
        sample = values[:: size // 8192 | 1].sort().values
        last = len(sample) - 1
        rank = (1 - count / size) * last
        margin = 5 * math.sqrt(count / size * (1 - count / size) * last) + 2  # five standard errors of a quantile
        low, high = sample[max(math.floor(rank - margin), 0)], sample[min(math.ceil(rank + margin), last)]
        above = values > high
        skipped = int(above.count_nonzero())
        near = values.masked_select((values >= low).logical_xor_(above))
        if skipped < count <= skipped + len(near):
            values, count = near, count - skipped
    if values.is_cuda:  # where selection is far slower than sorting
        return values.sort(descending=True).values[count - 1]
    return values.kthvalue(len(values) - count + 1).values


def keep_per_row(score: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` largest entries of each row, first entries first among equals."""
    width = score.shape[1]
    if width <= 8:
        # Rank by comparing every pair of columns: far cheaper than sorting millions of tiny rows. An entry's rank is
        # how many beat it; entry i starts from the i before it, which win all ties.
        columns = score.unbind(1)
        ranks = [torch.full(column.shape, i, dtype=torch.int8, device=score.device) for i, column in enumerate(columns)]
        for i in range(width):
            for j in range(i + 1, width):
                later_wins = (columns[j] > columns[i]).view(torch.int8)
                ranks[i] += later_wins
                ranks[j] -= later_wins
        return torch.stack([rank < count for rank in ranks], dim=1)
    if score.device.type == "cpu" and 0 < count < width:
        # Selecting takes a third of the time of sorting there; rows with ties at the threshold are sorted after all.
        mask = score >= score.kthvalue(width - count + 1, dim=1, keepdim=True).values
        tied = (mask.sum(1) > count).nonzero().squeeze(1)
        if len(tied):
            mask[tied] = _first_largest(score[tied], count)
        return mask
    return _first_largest(score, count)


def _first_largest(score: Tensor, count: int) -> Tensor:
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
