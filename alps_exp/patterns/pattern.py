"""Sparsity patterns: which supports are allowed.

A pattern answers one question, `keep(score)`: which entries survive. Counts are exact. Ties keep the entry that comes
first in row-major order, so a result depends on nothing but the scores.

    pattern          written        kept
    Unstructured(s)  0.7            a fraction 1 - s of each selection group (a layer, a row, a block of columns)
    NM(n, m)         "2:4", "1:4"   at most n of every m consecutive inputs of each output row
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..base.errors import UserError

Scope = Literal["layer", "row", "block"]


@dataclass(frozen=True)
class Pattern:
    """A set of allowed supports."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros that the pattern asks for."""
        raise NotImplementedError

    @property
    def group(self) -> int | None:
        """Width of the groups of consecutive inputs within which entries compete, None when the solver may choose."""
        raise NotImplementedError

    @property
    def slug(self) -> str:
        """The pattern as a word that is safe in file names and identifiers."""
        raise NotImplementedError

    def keep(self, score: Tensor, scope: Scope = "layer", level: float | None = None) -> Tensor:
        """Mask of the entries with the largest scores.

        Args:
            score: (out, in), any real dtype, no NaN. A block of columns of a layer is passed as its own matrix.
            scope: the selection group where the pattern leaves it open: "layer" and "block" compare all entries of
                `score` (they round differently), "row" those of one output row.
            level: another sparsity in place of the pattern's own, for schedules.

        Returns:
            (out, in) bool, True where kept.

        Raises:
            UserError: the width does not divide into the pattern's groups.
        """
        raise NotImplementedError

    def tracker(self) -> Tracker:
        """A cheaper `keep` (scope "layer") for the iterates of one layer, whose supports are not a result."""
        return Tracker(self)

    def check(self, shape: tuple[int, int], name: str = "the layer") -> None:
        """Raise UserError if a weight (out, in) of this shape cannot hold the pattern."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """A fraction `level` of zeros anywhere in the selection group.

    A layer keeps round((1 - s) * size) entries (ALPS's rule), a row loses floor(s * in) (Wanda's), a block of columns
    floor(s * size) (SparseGPT's).
    """

    level: float

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or not isinstance(self.level, (int, float)) or not 0 < self.level < 1:
            raise UserError(
                f"sparsity {self.level!r} is not allowed: give a fraction of zeros above 0 and below 1 (0.7), "
                'or a pattern N:M such as "2:4"; method=dense is the run without pruning'
            )

    @property
    def sparsity(self) -> float:
        return float(self.level)

    @property
    def group(self) -> None:
        return None

    @property
    def slug(self) -> str:
        return f"u{self.level:g}"

    def __str__(self) -> str:
        return f"{self.level:g}"

    def keep(self, score: Tensor, scope: Scope = "layer", level: float | None = None) -> Tensor:
        sparsity = self.sparsity if level is None else level
        if scope == "row":
            return _keep_per_row(score, score.shape[1] - _floor(sparsity * score.shape[1]))
        if scope == "block":
            return _keep_largest(score, score.numel() - _floor(sparsity * score.numel()))
        return _keep_largest(score, round((1 - sparsity) * score.numel()))

    def tracker(self) -> Tracker:
        return ThresholdTracker(self)


@dataclass(frozen=True)
class NM(Pattern):
    """At most `kept` of every `width` consecutive inputs of an output row (SparseGPT's and Wanda's codes count the
    removed ones instead, ALPS's the kept ones; the two readings agree on 2:4 and 4:8 only)."""

    kept: int
    width: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.width:
            raise UserError(
                f"sparsity {self.kept}:{self.width} is not allowed: N:M keeps N of every M consecutive weights, "
                "with 0 < N < M, as in 2:4"
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.width

    @property
    def group(self) -> int:
        return self.width

    @property
    def slug(self) -> str:
        return f"{self.kept}of{self.width}"

    def __str__(self) -> str:
        return f"{self.kept}:{self.width}"

    def keep(self, score: Tensor, scope: Scope = "layer", level: float | None = None) -> Tensor:
        self.check(score.shape)
        kept = self.kept if level is None else self.width - _floor(level * self.width)
        return _keep_per_row(score.reshape(-1, self.width), kept).reshape(score.shape)

    def tracker(self) -> Tracker:
        return Tracker(self, (self.kept, self.width))

    def check(self, shape: tuple[int, int], name: str = "the layer") -> None:
        if shape[1] % self.width:
            raise UserError(
                f"sparsity {self} does not fit {name}: its {shape[1]} inputs are not a multiple of {self.width}; "
                "choose another M or exclude it (layers.exclude=[...])"
            )


def parse_sparsity(value: float | str | Pattern) -> Pattern:
    """The pattern that a user wrote: 0.7, "0.7", "2:4".

    Raises:
        UserError: neither a fraction strictly between 0 and 1 nor N:M with 0 < N < M.
    """
    if isinstance(value, Pattern):
        return value
    text = str(value).strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    try:
        return Unstructured(float(text))
    except ValueError as error:
        if isinstance(error, UserError) and not float(text) > 1:
            raise
        hint = ' (a plain 2:4 in YAML is read as 124: quote it, "2:4")' if text.isdigit() else ""
        raise UserError(
            f"sparsity {value!r} is not allowed{hint}: give a fraction of zeros above 0 and below 1 (0.7), "
            'or a pattern N:M such as "2:4"; method=dense is the run without pruning'
        ) from None


def _floor(value: float) -> int:
    # 0.29 * 100 is 28.999999999999996 in binary; the user meant 29.
    return math.floor(value + 1e-6)


def _keep_largest(score: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` largest entries of the whole tensor, first entries first among equals."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    score = score.contiguous()
    threshold = _kth_largest(score.view(-1), count)
    mask = score >= threshold
    surplus = int(mask.count_nonzero()) - count
    if surplus:
        ties = (score == threshold).view(-1).nonzero().squeeze(1)
        mask.view(-1)[ties[len(ties) - surplus :]] = False
    return mask


class Tracker:
    """Selects the supports of a layer's successive iterates.

    Attributes:
        group: (N, M) where the rule is no more than the N largest of every M consecutive entries, the first among
            equals, so that a caller may apply it in a pass of its own.
    """

    def __init__(self, pattern: Pattern, group: tuple[int, int] | None = None) -> None:
        self._pattern = pattern
        self.group = group

    def __call__(self, score: Tensor) -> Tensor:
        """Mask of the entries to keep, of the pattern's count or nearly so."""
        return self._pattern.keep(score)

    def stride(self, score: Tensor) -> int | None:
        """Where the rule may be a threshold from a sample: every how many entries one is taken; otherwise None."""
        return None


class ThresholdTracker(Tracker):
    """Selects about the right number of largest entries of a slowly changing score, by a quantile of a fixed sample.

    The sampling error is corrected from call to call by the number that the last threshold kept, all on the device, so
    that after a few calls the counts are off by a few entries only. That matters: iterating with 0.8 % more entries
    than the result may have was seen to cost 13 % in loss.
    """

    def __init__(self, pattern: Pattern) -> None:
        super().__init__(pattern)
        self._drift: Tensor | None = None

    def stride(self, score: Tensor) -> int | None:
        size, wanted = score.numel(), 1 << 18 if score.is_cuda else 1 << 14
        if size < 4 * wanted or not 0 < self._count(size) < size:
            return None
        # An odd stride, or the sample would hold a few columns only where the width is a power of two.
        return size // wanted | 1

    def __call__(self, score: Tensor) -> Tensor:
        stride = self.stride(score)
        if stride is None:
            return self._pattern.keep(score)
        mask = score >= self.threshold(score.reshape(-1)[::stride])
        self.observe(mask.count_nonzero(), score.numel(), stride)
        return mask

    def threshold(self, sample: Tensor) -> Tensor:
        """0-dim: scores from here on are to be kept. To be followed by `observe`.

        Args:
            sample: every `stride`-th score.
        """
        if self._drift is None:
            self._drift = torch.zeros((), dtype=torch.float64, device=sample.device)
        rank = (self._pattern.sparsity * len(sample) + self._drift).clamp_(0, len(sample) - 1)
        # The rank stays on a GPU, which sorts as fast as it selects; a CPU has nothing to wait for and selects faster.
        return sample.sort().values[rank.long()] if sample.is_cuda else sample.kthvalue(int(rank) + 1).values

    def observe(self, kept: Tensor, size: int, stride: int) -> None:
        """Learn how many of `size` scores the last threshold kept (0-dim)."""
        self._drift += (kept - self._count(size)) / stride

    def _count(self, size: int) -> int:
        return round((1 - self._pattern.sparsity) * size)


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


def _keep_per_row(score: Tensor, count: int) -> Tensor:
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
