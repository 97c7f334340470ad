"""Dense: no pruning, the reference that every other run is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.layer.solver import LayerSolver, Solution
from alps_exp.patterns import Pattern


@dataclass(frozen=True)
class Dense(LayerSolver):
    """Returns the weight as it is, whatever the pattern."""

    statistics: ClassVar[Statistics] = Statistics.NONE
    selection: ClassVar[str] = "none"
    prunes: ClassVar[bool] = False

    def _solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        return Solution(weight=problem.weight, support=torch.ones_like(problem.weight, dtype=torch.bool))
