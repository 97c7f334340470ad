"""SparseSwaps: exchange a kept and a pruned weight of a row, always the best pair (Zimmer et al., 2025).

    R    (in, in)    Gram matrix scaled to a unit diagonal; 0 for dead inputs
    s    (out, in)   weight scaled alike: s_j = W_j √G_jj
    P, K             the pruned and the kept inputs of a row; its loss is s_Pᵀ R_PP s_P
    c    (out, in)   correlation of every input with the row's lost output: c = R_:P s_P

To keep p of P again and to prune k of K instead changes the loss by

    Δ_pk = a_p + b_k - 2 s_p s_k R_pk,   a_p = s_p² - 2 s_p c_p,   b_k = s_k² + 2 s_k c_k.

Each step makes the swap of smallest Δ in every row, or in every row among the pairs that share a group of the N:M
pattern, and c ← c - s_p R_:p + s_k R_:k. A row stops when no swap lowers its loss by more than rounding, or after
`max_swaps`. A weight may come and go several times. Values stay those of the dense weight.

The search is exact, and looks at few of the |P||K| pairs. With r_p the largest |R_pk| of input p, no pair of p is below
a_p + min_k (b_k - t |s_k|), t = 2 r_p |s_p|. That minimum falls with t, so its value at the next larger of a few t
is a bound. The pruned weights are tried in the order of their bounds until the next bound is above the best pair found.

Differences from the paper, all deliberate:
- the first mask may be that of any method here, and rows keep the counts that it gave them.
- N:M swaps are searched over all groups of a row, one a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alps_exp.base.checks import one_of, require
from alps_exp.base.clock import Stopwatch
from alps_exp.base.errors import UserError
from alps_exp.layer import registry
from alps_exp.layer.problem import LayerProblem, Statistics, power_of_two
from alps_exp.layer.scaled import ScaledGram
from alps_exp.layer.solver import Solution, Solver
from alps_exp.numerics.kernels import kernel_for
from alps_exp.patterns import Pattern

NO_STARTS = ("dense", "given", "sparseswaps")
# Values of t at which bounds are computed, pruned weights tried at once, and numbers that one try may hold (0.25 GB).
_BOUNDS, _TRIED, _BATCH = 16, 8, 1 << 26


@dataclass(frozen=True)
class SparseSwaps(Solver):
    """SparseSwaps with its hyperparameters.

    Attributes:
        start: the method of conf/method that finds the first mask, a layer at a time, by its own defaults.
        max_swaps: per row.
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"unstructured", "nm", "hierarchical"})
    unplanned: ClassVar[str] = "swaps"

    start: str = "wanda"
    max_swaps: int = 100

    def __post_init__(self) -> None:
        one_of("method.start", self.start, [name for name in registry.methods() if name not in NO_STARTS])
        require("method.max_swaps", self.max_swaps, int, 0, float("inf"))
        if not isinstance(registry.solver(self.start), Solver):
            raise UserError(
                f"method.start={self.start} prunes blocks or the model as a whole, and masks are found layer by layer "
                "here: give another start, such as wanda"
            )

    @property
    def statistics(self) -> Statistics:
        return registry.solver(self.start).statistics | Statistics.GRAM

    @property
    def selection(self) -> str:
        return registry.solver(self.start).selection

    def check_pattern(self, pattern: Pattern) -> None:
        super().check_pattern(pattern)
        registry.solver(self.start).check_pattern(pattern)

    def flops(self, rows: int, width: int) -> float:
        return registry.solver(self.start).flops(rows, width) + 2 * rows * width**2  # of c at the start

    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        starts = registry.solver(self.start).solve_group(problems, patterns)
        watch = Stopwatch(problems[0].weight.device)
        scaled = ScaledGram(problems[0].inputs, damping=0.0)
        solutions = []
        for problem, pattern, start in zip(problems, patterns, starts, strict=True):
            weight = scaled.scale(problem.weight / power_of_two(float(problem.weight.abs().max())))
            weight /= weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
            find = _Pairs(scaled.gram) if pattern.swaps is None else _GroupPairs(scaled.gram, pattern.swaps)
            support, swaps = _swapped(weight, start.support, scaled.gram, find, self.max_swaps)
            most = int(swaps.max())
            solutions.append(
                Solution(
                    weight=problem.weight.masked_fill(~support, 0),
                    support=support,
                    status="converged" if most < self.max_swaps else "max_iterations",
                    iterations=most,
                    seconds={**start.seconds, "swaps": watch.lap("swaps")},
                    stats={"start": self.start, "swaps": int(swaps.sum())},
                )
            )
        return solutions


def _swapped(
    weight: Tensor, support: Tensor, gram: Tensor, find: _Pairs | _GroupPairs, most: int
) -> tuple[Tensor, Tensor]:
    """The support after the swaps (out, in), and the number of swaps of each row (out,).

    Args:
        weight: (out, in) s.
        support: (out, in) bool.
        gram: (in, in) R.
        find: the best pair of each row.
        most: swaps per row.
    """
    support = support.clone()
    missing = weight.masked_fill(support, 0) @ gram
    swaps = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
    rows = torch.arange(len(weight), device=weight.device)
    rounding = 8 * torch.finfo(weight.dtype).eps
    for _ in range(most):
        s, c, kept = weight[rows], missing[rows], support[rows]
        product = 2 * s * c
        regrow = (s.square() - product).masked_fill_(kept, torch.inf)
        prune = (s.square() + product).masked_fill_(~kept, torch.inf)
        change, p, k = find(s, regrow, prune)
        here = torch.arange(len(rows), device=rows.device)
        size = sum(s[here, j].square() + product[here, j].abs() for j in (p, k))
        gains = change < -rounding * size
        rows, p, k = rows[gains], p[gains], k[gains]
        if not len(rows):
            break
        support[rows, p], support[rows, k] = True, False
        swaps[rows] += 1
        step = weight[rows, k][:, None] * gram[k]
        missing[rows] += step.addcmul_(weight[rows, p][:, None], gram[p], value=-1)
    return support, swaps


class _Pairs:
    """The best pair of each row, of all that there are."""

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram
        off = gram.abs()
        off.fill_diagonal_(0)
        self._largest = off.amax(1)
        self._kernel = kernel_for(gram.device, "best_pairs")

    def __call__(self, s: Tensor, regrow: Tensor, prune: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest Δ, p and k, (rows,) each; Δ is not below 0 where no swap lowers the loss.

        Args:
            s: (rows, in).
            regrow: (rows, in) a, infinite outside P.
            prune: (rows, in) b, infinite outside K.
        """
        bound = self._bounds(s, regrow, prune)
        if self._kernel is not None and s.dtype == torch.float32:
            return self._kernel(self._gram, s, regrow, prune, bound)
        best = torch.zeros(len(s), dtype=s.dtype, device=s.device)
        p, k = torch.zeros_like(best, dtype=torch.long), torch.zeros_like(best, dtype=torch.long)
        tried = min(_TRIED, s.shape[1])
        while True:
            lowest, places = bound.topk(tried, largest=False)
            open_ = (lowest[:, 0] < best).nonzero().squeeze(1)
            if not len(open_):
                return best, p, k
            for rows in open_.split(max(_BATCH // (tried * s.shape[1]), 1)):
                self._try(rows, places[rows], s, regrow, prune, (best, p, k))
            bound[open_] = bound[open_].scatter(1, places[open_], torch.inf)

    def _bounds(self, s: Tensor, regrow: Tensor, prune: Tensor) -> Tensor:
        """(rows, in) numbers that no pair of a pruned weight is below."""
        slope = (2 * s.abs() * self._largest).masked_fill_(regrow == torch.inf, 0)
        unit = slope.amax(1, keepdim=True) / _BOUNDS
        at = [(prune - number * unit * s.abs()).amin(1) for number in range(_BOUNDS + 1)]
        number = (slope / unit.clamp_min(torch.finfo(s.dtype).tiny)).ceil_().clamp_(0, _BOUNDS).long()
        return torch.stack(at, dim=1).gather(1, number).add_(regrow)

    def _try(self, rows: Tensor, places: Tensor, s: Tensor, regrow: Tensor, prune: Tensor, found: tuple) -> None:
        """Put the best pairs of these pruned weights into `found` where they are better.

        Args:
            rows: (rows,) of the others' first dimension.
            places: (rows, tried) pruned weights.
        """
        best, p, k = found
        scale = -2 * s[rows].gather(1, places)
        change = self._gram[places].mul_(s[rows][:, None, :]).mul_(scale[:, :, None]).add_(prune[rows][:, None, :])
        value, other = change.min(dim=2)
        value, place = value.add_(regrow[rows].gather(1, places)).min(dim=1, keepdim=True)
        better = value[:, 0] < best[rows]
        at, place, value = rows[better], place[better], value[better, 0]
        best[at] = value
        p[at], k[at] = (of[better].gather(1, place)[:, 0] for of in (places, other))


class _GroupPairs:
    """The best pair of each row, of those in one group of consecutive inputs."""

    def __init__(self, gram: Tensor, width: int) -> None:
        self._width = width
        count = len(gram) // width
        # (groups, width, width): the blocks of R on its diagonal.
        self._blocks = gram.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def __call__(self, s: Tensor, regrow: Tensor, prune: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As that of `_Pairs`."""
        parts = max(_BATCH // (s.shape[1] * self._width), 1)
        found = [self._best(*part) for part in zip(*(t.split(parts) for t in (s, regrow, prune)), strict=True)]
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    def _best(self, s: Tensor, regrow: Tensor, prune: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, regrow, prune = (t.view(len(s), -1, self._width) for t in (s, regrow, prune))
        change = self._blocks * s[:, :, None, :] * (-2 * s[:, :, :, None])
        change += prune[:, :, None, :]
        change += regrow[:, :, :, None]
        best, place = change.flatten(1).min(dim=1)
        group, pair = place // self._width**2, place % self._width**2
        first = group * self._width
        return best, first + pair // self._width, first + pair % self._width
