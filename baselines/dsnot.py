"""DSnoT: swap weights in and out of a mask so that each output keeps its mean (Zhang et al., ICLR 2024).

    S    (in,)       sum over tokens of x, averaged over sequences
    V    (in,)       variance of x over the tokens within each sequence, averaged over sequences
    a    (out, in)   contribution of a weight to the mean of its output: a_rj = W_rj S_j
    ε    (out,)      reconstruction error: sum of a over the pruned weights of the row

One swap of row r, which lowers |ε|:
    regrow   the pruned weight of largest a / V^p if ε > 0, of smallest otherwise;
    prune    unstructured: the kept weight of smallest Wanda score with a of the sign opposite to ε;
             N:M: the kept weight of smallest start score in the regrown weight's group, of either sign;
    ε += a_pruned - a_regrown.
A weight changes its state at most once. A row stops when |ε| <= threshold, after `max_swaps`, when it has no weight
left to regrow or to prune (N:M: a regrow candidate whose group has none left is passed over), and, with `same_sign`,
before the swap that would turn the sign that ε had at the start. Values stay those of the dense weight.

All rows advance together: the order in which a row regrows and prunes is fixed by the start, so sorting once leaves a
few pointers per row to move.

Differences from the released code, all deliberate:
- `same_sign` does what it says; there every value of the flag parses as true, which turns the test off.
- a row without candidates stops; there it goes on into weights of the wrong sign, off its sparsity at small widths.
- inputs of zero variance regrow first (dead ones count as 0); there they give infinities and NaN.
- attention and MLP alike; there attention alone by default.
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
from alps_exp.baselines.sparsegpt import reversed_cholesky
from alps_exp.baselines.wanda import wanda_score
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.layer.solver import Solution, Solver
from alps_exp.methods.alps import launches
from alps_exp.patterns import Pattern

STARTS = ("wanda", "magnitude", "sparsegpt")


@dataclass(frozen=True)
class DSnoT(Solver):
    """DSnoT with its hyperparameters.

    Attributes:
        start: score of the first mask: "wanda", "magnitude" or "sparsegpt" (W² / U_jj², without compensation).
        same_sign: stop a row before its error changes sign.
        max_swaps: per row.
        threshold: rows with |ε| up to this value are left alone.
        power: p, the exponent of the variance.
        damping: of the Gram matrix, for start="sparsegpt".
    """

    selection: ClassVar[str] = "row"
    kinds: ClassVar[frozenset[str] | None] = frozenset({"unstructured", "nm", "hierarchical"})
    unplanned: ClassVar[str] = "swaps"

    start: str = "wanda"
    same_sign: bool = True
    max_swaps: int = 50
    threshold: float = 0.1
    power: float = 1.0
    damping: float = 0.01

    def __post_init__(self) -> None:
        inf = float("inf")
        one_of("method.start", self.start, STARTS)
        if not isinstance(self.same_sign, bool):
            raise UserError(f"method.same_sign={self.same_sign!r} is not allowed: give true or false")
        require("method.max_swaps", self.max_swaps, int, 0, inf)
        require("method.threshold", self.threshold, float, 0, inf)
        require("method.power", self.power, float, 0, inf)
        require("method.damping", self.damping, float, 0, 10)

    @property
    def statistics(self) -> Statistics:
        return Statistics.ALL if self.start == "sparsegpt" else Statistics.MOMENTS

    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        return self._solve_batch([problems], patterns)[0]

    def _solve_alike(
        self, groups: Sequence[Sequence[LayerProblem]], patterns: Sequence[Pattern]
    ) -> list[list[Solution]]:
        # A row that has stopped waits for all others, which on a processor costs more than starting anew.
        if not launches(groups[0][0].weight.device):
            return super()._solve_alike(groups, patterns)
        return self._solve_batch(groups, patterns)

    def _solve_batch(
        self, groups: Sequence[Sequence[LayerProblem]], patterns: Sequence[Pattern]
    ) -> list[list[Solution]]:
        """Groups of layers of the same shapes and patterns: of all of them the rows advance together."""
        watch = Stopwatch(groups[0][0].weight.device)
        seconds, importances = {}, [None] * len(groups)
        if self.start == "sparsegpt":
            # 1 / U_jj, shared by all layers of one Gram matrix; dead inputs are worth nothing.
            for number, problem in enumerate(problems[0] for problems in groups):
                diagonal = reversed_cholesky(problem, self.damping).diagonal().flip(0)
                importances[number] = diagonal.masked_fill(problem.dead, 0)
            seconds["factorisation"] = watch.lap("factorisation") / len(groups) / len(patterns)
        columns = []
        for problems, pattern in zip(zip(*groups, strict=True), patterns, strict=True):
            scores = [self._start_score(*pair) for pair in zip(problems, importances, strict=True)]
            support, swaps = self._refine(problems, pattern, torch.cat(scores))
            swaps = swaps.view(len(problems), -1)
            most, every = swaps.amax(1).tolist(), swaps.sum(1).tolist()
            spent = {**seconds, "swaps": watch.lap("swaps") / len(problems)}
            columns.append(
                [
                    Solution(
                        weight=problem.weight.masked_fill(~own, 0),
                        support=own,
                        status="converged" if most[number] < self.max_swaps else "max_iterations",
                        iterations=most[number],
                        seconds=dict(spent),
                        stats={"start": self.start, "same_sign": self.same_sign, "swaps": every[number]},
                    )
                    for number, (problem, own) in enumerate(zip(problems, support.chunk(len(problems)), strict=True))
                ]
            )
        return [list(solutions) for solutions in zip(*columns, strict=True)]

    def _start_score(self, problem: LayerProblem, importance: Tensor | None) -> Tensor:
        """(out, in) score whose largest entries form the first mask."""
        if self.start == "wanda":
            return wanda_score(problem)
        if self.start == "magnitude":
            return problem.weight.abs()
        return problem.weight.abs() * importance  # in the order of its square, which float32 may not hold

    def _refine(self, problems: Sequence[LayerProblem], pattern: Pattern, score: Tensor) -> tuple[Tensor, Tensor]:
        """The refined support (rows, in) and the number of swaps of each row (rows,), of all rows of some layers of the
        same shape, which do not know of each other.

        Args:
            problems: the layers.
            pattern: of each.
            score: (rows, in) that the first mask is chosen by.
        """
        support = pattern.keep(score, "row")
        contributions, ratios = [], []
        for problem in problems:
            contribution = problem.weight * (problem.mean * (problem.tokens / problem.sequences))
            if bad := int((~torch.isfinite(contribution)).sum()):
                raise UserError(
                    f"{problem.name}: {bad} weights times their inputs' sums overflow {contribution.dtype}: check the "
                    "checkpoint's weights"
                )
            # A constant input regrows first: an infinite ratio becomes the largest finite one, a dead one's 0 / 0 is 0.
            contributions.append(contribution)
            ratios.append(torch.nan_to_num(contribution / problem.var**self.power, nan=0.0))
        contribution, ratio = torch.cat(contributions), torch.cat(ratios)
        order = ratio.masked_fill_(support, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        order = order[:, : int((~support[0]).sum())]  # every row has pruned as many
        if pattern.swaps is None:
            candidates = _BySign(torch.cat([wanda_score(problem) for problem in problems]), contribution, support)
        else:
            candidates = _ByGroup(score, support, pattern.swaps)
        swaps = self._swap(contribution, support, order, candidates)
        return support, swaps

    def _swap(self, contribution: Tensor, support: Tensor, order: Tensor, candidates: _BySign | _ByGroup) -> Tensor:
        """Swap until every row has stopped.

        Args:
            contribution: (out, in) a.
            support: (out, in) bool, changed in place.
            order: (out, pruned) the pruned inputs by falling a / V^p.
            candidates: the kept weights, in the order in which they may go.

        Returns:
            (out,) swaps of each row.
        """
        rows = torch.arange(len(support), device=support.device)
        error = contribution.masked_fill(support, 0).sum(1)
        first_sign = error.sign()
        swaps, top, bottom = torch.zeros_like(rows), torch.zeros_like(rows), torch.zeros_like(rows)
        last = order.shape[1] - 1
        active = torch.ones_like(rows, dtype=torch.bool)
        while True:
            active &= (error.abs() > self.threshold) & (swaps < self.max_swaps) & (top + bottom <= last)
            if not bool(active.any()):
                return swaps
            positive = error > 0
            regrow = order[rows, torch.where(positive, top, last - bottom).clamp(0, last)]
            prune, found = candidates.propose(rows, positive, regrow)
            after = error + contribution[rows, prune] - contribution[rows, regrow]
            if not candidates.skips:
                active &= found
            if self.same_sign:
                active &= ~found | (after * first_sign >= 0)
            swap = active & found
            candidates.take(rows, positive, regrow, swap)
            top += active & positive
            bottom += active & ~positive
            support[rows, regrow] |= swap
            support[rows, prune] &= ~swap
            error = torch.where(swap, after, error)
            swaps += swap


class _BySign:
    """Kept weights by rising Wanda score, those of negative and of positive contribution apart.

    One sort serves both: by the score with the sign of the contribution, both queues start in the middle and run
    outwards.
    """

    skips = False  # a row without a candidate stops

    def __init__(self, score: Tensor, contribution: Tensor, support: Tensor) -> None:
        eligible = support & (contribution != 0)
        key = torch.copysign(score, contribution).masked_fill_(~eligible, torch.inf)
        self._order = key.sort(dim=1, stable=True).indices
        negative = (eligible & (contribution < 0)).sum(1)
        self._down, self._up = negative - 1, negative
        self._end = eligible.sum(1)

    def propose(self, rows: Tensor, positive: Tensor, regrow: Tensor) -> tuple[Tensor, Tensor]:
        """(out,) the input that each row prunes next, and whether it has one."""
        found = torch.where(positive, self._down >= 0, self._up < self._end)
        place = torch.where(positive, self._down, self._up).clamp(0, self._order.shape[1] - 1)
        return self._order[rows, place], found

    def take(self, rows: Tensor, positive: Tensor, regrow: Tensor, swap: Tensor) -> None:
        """Move on in the rows that swapped."""
        self._down = self._down - (swap & positive).long()
        self._up = self._up + (swap & ~positive).long()


class _ByGroup:
    """Kept weights of the regrown weight's N:M group by rising start score."""

    skips = True  # a row whose group has no candidate left tries the next weight to regrow

    def __init__(self, score: Tensor, support: Tensor, width: int) -> None:
        self._width = width
        self._left = score.masked_fill(~support, torch.inf).view(len(score), -1, width)

    def propose(self, rows: Tensor, positive: Tensor, regrow: Tensor) -> tuple[Tensor, Tensor]:
        """(out,) the input that each row prunes next, and whether it has one."""
        group = regrow // self._width
        self._lowest = self._left[rows, group].min(dim=1)
        return group * self._width + self._lowest.indices, self._lowest.values < torch.inf

    def take(self, rows: Tensor, positive: Tensor, regrow: Tensor, swap: Tensor) -> None:
        """Strike the proposed weight in the rows that swapped."""
        left = self._lowest.values.masked_fill(swap, torch.inf)
        self._left[rows, regrow // self._width, self._lowest.indices] = left
