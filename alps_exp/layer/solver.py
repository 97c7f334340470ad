"""What every pruning method is: a value with hyperparameters that maps a LayerProblem and a Pattern to a Solution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ..patterns import Pattern
from .inputs import Inputs
from .method import Method
from .problem import LayerProblem


@dataclass(frozen=True, eq=False)
class Solution:
    """A pruned layer.

    Attributes:
        weight: (out, in), zero outside the support.
        support: (out, in) bool, the kept positions; a kept weight may itself be zero.
        status: "exact" (closed form), "converged", "max_iterations" (it ended before it converged), or "fixed" (the
            method always makes the iterations that it is given).
        iterations: iterations of the method's main loop, 0 for closed forms.
        seconds: wall time by phase of the method.
        stats: what else the method reports (ρ, swaps, the mode that ran), JSON values only.
    """

    weight: Tensor
    support: Tensor
    status: str = "exact"
    iterations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    stats: dict = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weight."""
        return 1 - float(self.weight.count_nonzero()) / self.weight.numel()


@dataclass(frozen=True)
class Solver(Method, ABC):
    """Base of all layer methods. A solver holds hyperparameters only: it never prints, never touches a model, never
    changes its problem and never moves anything to another device.
    """

    def misfit_of_experts(self, names: Collection[str]) -> str | None:
        return None

    def parts(self, device: torch.device) -> int:
        """Into how many parts the work on the Gram matrix alone divides, where other processes may do some of it; 0
        where one had better do all."""
        return 0

    def make_parts(self, inputs: Inputs, indices: Sequence[int]) -> list[Tensor]:
        """Some of these parts, from the Gram matrix; another process's `solve_group` takes them from
        `Inputs.elsewhere`."""
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    @final
    def solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        """Prune one layer; see `solve_group`."""
        return self.solve_group([problem], [pattern])[0]

    @final
    def solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        """Prune layers that are fed by the same input (one Gram matrix), sharing what can be shared.

        Raises:
            UserError: statistics that are missing, a pattern that the method cannot keep or that does not fit a layer,
                or a layer that it cannot solve.
        """
        self._check(problems, patterns)
        return self._solve_group(problems, patterns)

    @final
    def solve_alike(
        self, groups: Sequence[Sequence[LayerProblem]], patterns: Sequence[Pattern]
    ) -> list[list[Solution]]:
        """Prune several groups of layers that have the same shapes, such as the experts of a mixture: one after the
        other, or together where the method knows how.

        Args:
            groups: each as of `solve_group`.
            patterns: of the layers of each group, the same in all.

        Raises:
            UserError: as of `solve_group`.
        """
        for problems in groups:
            self._check(problems, patterns)
        return self._solve_alike(groups, patterns) if len(groups) > 1 else [self._solve_group(groups[0], patterns)]

    def _check(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> None:
        for problem, pattern in zip(problems, patterns, strict=True):
            problem.require(self.statistics)
            if self.prunes:
                self.check_pattern(pattern)
                pattern.check(tuple(problem.weight.shape), problem.name)

    @abstractmethod
    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        """What a method is: `solve_group` after its checks."""

    def _solve_alike(
        self, groups: Sequence[Sequence[LayerProblem]], patterns: Sequence[Pattern]
    ) -> list[list[Solution]]:
        """`solve_alike` after its checks, of more than one group."""
        return [self._solve_group(problems, patterns) for problems in groups]


@dataclass(frozen=True)
class LayerSolver(Solver):
    """Base of methods that treat each layer by itself, also those that share an input."""

    @final
    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        return [self._solve(problem, pattern) for problem, pattern in zip(problems, patterns, strict=True)]

    @abstractmethod
    def _solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        """Prune one layer whose statistics and pattern were checked."""
