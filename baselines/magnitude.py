"""Magnitude pruning: keep the weights of largest |W|, compared over the whole layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alps_exp.base.clock import Stopwatch
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.layer.solver import LayerSolver, Solution
from alps_exp.patterns import Pattern


@dataclass(frozen=True)
class Magnitude(LayerSolver):
    """Needs no data. Kept weights keep their values."""

    statistics: ClassVar[Statistics] = Statistics.NONE
    selection: ClassVar[str] = "layer"
    kinds: ClassVar[frozenset[str] | None] = None  # whatever a pattern can choose by scores

    def _solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        watch = Stopwatch(problem.weight.device)
        support = pattern.keep(problem.weight.abs(), "layer")
        weight = problem.weight.masked_fill(~support, 0)
        watch.lap("selection")
        return Solution(weight=weight, support=support, seconds=watch.seconds)
