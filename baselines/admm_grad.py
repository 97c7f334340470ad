"""ADMM-Grad: ADMM with penalty 1 while the sparsity grows step by step (Boža, TMLR 2024).

    min ‖XŴᵀ - XWᵀ‖² + λ‖Ŵ - W‖²   subject to   Ŵ in the pattern

The iteration and its glossary are in `alps_exp/methods/admm.py`. In the first `selections` iterations t = 0, 1, … the
support is chosen anew from |B + U| over the whole layer, so that of its weights are zero

    s_t = s - s(1 - (t + 1) / selections)³   (schedule: paper)

Under N:M the N largest of each M always survive, and the others go by one threshold over the layer; the last selection
leaves none of them. `schedule: code` is the released code: s in place of s_t where the pattern is unstructured; its
branch for N:M has the cubic schedule too, so that both are one there.

Differences from the released code, all deliberate:
- the paper's schedule is the default.
- exact counts: a layer keeps round((1 - s_t) · n) weights, the first among equals; there a threshold decides.
- any N:M, read as N kept; there 2:4 alone.
- inputs are scaled by √G_jj; there by √G_jj + 1e-8, which depends on the inputs' unit. Dead inputs lose their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from alps_exp.base.checks import one_of, require
from alps_exp.base.clock import Stopwatch
from alps_exp.base.errors import UserError
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.layer.solver import Solution, Solver
from alps_exp.layer.trace import Trace
from alps_exp.methods.admm import DAMPING, ITERATIONS, PlainAdmm
from alps_exp.patterns import Pattern, Unstructured
from alps_exp.patterns.keeping import keep_largest

SCHEDULES = ("paper", "code")


@dataclass(frozen=True)
class AdmmGrad(Solver):
    """ADMM-Grad with its hyperparameters.

    Attributes:
        schedule: how the sparsity grows, "paper" or "code".
        iterations: of ADMM.
        selections: the first iterations, in which the support is chosen; at most `iterations`.
        damping: λ over the mean of the scaled Gram matrix's diagonal.
        trace: record the loss of Z and the change of its support in every iteration.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    kinds: ClassVar[frozenset[str] | None] = None  # whatever is a projection
    selection: ClassVar[str] = "layer"

    schedule: str = "paper"
    iterations: int = ITERATIONS
    selections: int = 15
    damping: float = DAMPING
    trace: bool = False

    def __post_init__(self) -> None:
        one_of("method.schedule", self.schedule, SCHEDULES)
        require("method.iterations", self.iterations, int, 1, float("inf"))
        require("method.selections", self.selections, int, 1, float("inf"))
        require("method.damping", self.damping, float, 0, 10)
        one_of("method.trace", self.trace, (True, False))
        if self.selections > self.iterations:
            raise UserError(
                f"method.selections={self.selections} is not allowed with method.iterations={self.iterations}: the "
                "sparsity is reached at the last selection; give at most as many"
            )

    def flops(self, rows: int, width: int) -> float:
        # A Cholesky factorisation (n³/3), a triangular inverse and its Gram matrix (2/3 n³ each), and the iterations.
        return 5 / 3 * width**3 + self.iterations * 2 * rows * width**2

    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        watch = Stopwatch(problems[0].weight.device)
        admm = PlainAdmm(problems[0], self.damping)
        factorisation = watch.lap("factorisation") / len(problems)
        solutions = []
        for problem, pattern in zip(problems, patterns, strict=True):
            trace = Trace(problem) if self.trace else None
            look = None if trace is None else partial(trace.add, rho=1.0)
            weight, support = admm(problem.weight, self._selector(pattern), self.iterations, look)
            solutions.append(
                Solution(
                    weight=weight,
                    support=support,
                    status="fixed",
                    iterations=self.iterations,
                    seconds={"factorisation": factorisation, "admm": watch.lap("admm")},
                    stats={"schedule": self.schedule} | (trace.stats() if trace is not None else {}),
                )
            )
        return solutions

    def _selector(self, pattern: Pattern) -> Callable[[int, Tensor], Tensor]:
        """Function from the number of an iteration and a score (out, in) to the support."""
        support = None

        def select(iteration: int, score: Tensor) -> Tensor:
            nonlocal support
            if iteration < self.selections:
                support = self._keep(iteration, score, pattern)
            return support

        return select

    def _keep(self, iteration: int, score: Tensor, pattern: Pattern) -> Tensor:
        left = 1 - (iteration + 1) / self.selections
        anywhere = isinstance(pattern, Unstructured)
        if left == 0 or (self.schedule == "code" and anywhere):
            return pattern.keep(score)
        count = round((1 - pattern.sparsity * (1 - left**3)) * score.numel())
        if not anywhere:
            score = score.masked_fill(pattern.keep(score), torch.inf)
        return keep_largest(score, count)
