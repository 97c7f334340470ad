"""Wanda: keep the weights of largest |W_ij| ‖X_:j‖, compared within each output row (Sun et al., ICLR 2024).

X (tokens, in) is the calibration input, so ‖X_:j‖ = √G_jj. An input that was always zero scores 0 and goes first. Kept
weights keep their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alps_exp.base.clock import Stopwatch
from alps_exp.layer.problem import LayerProblem, Statistics, power_of_two
from alps_exp.layer.solver import LayerSolver, Solution
from alps_exp.patterns import Pattern


@dataclass(frozen=True)
class Wanda(LayerSolver):
    """One pass, no weight update, no hyperparameters."""

    statistics: ClassVar[Statistics] = Statistics.DIAGONAL
    selection: ClassVar[str] = "row"
    kinds: ClassVar[frozenset[str] | None] = None  # whatever a pattern can choose by scores

    def _solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        watch = Stopwatch(problem.weight.device)
        support = pattern.keep(wanda_score(problem), "row")
        weight = problem.weight.masked_fill(~support, 0)
        watch.lap("selection")
        return Solution(weight=weight, support=support, seconds=watch.seconds)


def wanda_score(problem: LayerProblem) -> Tensor:
    """(out, in) |W_ij| ‖X_:j‖₂, over a power of two that keeps it within float32."""
    norms = problem.diagonal.sqrt()
    return problem.weight.abs() * (norms / power_of_two(float(norms.max())))
