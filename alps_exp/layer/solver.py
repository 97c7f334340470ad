"""What every pruning method is: a value with hyperparameters that maps a LayerProblem and a Pattern to a Solution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from ..base.errors import UserError
from ..patterns import Pattern
from .problem import LayerProblem, Statistics


@dataclass(frozen=True, eq=False)
class Solution:
    """A pruned layer.

    Attributes:
        weight: (out, in), zero outside the support.
        support: (out, in) bool, the kept positions; a kept weight may itself be zero.
        status: "exact" (closed form), "converged" or "max_iterations".
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
class Solver(ABC):
    """Base of all layer methods. A solver holds hyperparameters only: it never prints, never touches a model, never
    changes its problem and never moves anything to another device.

    Class attributes:
        statistics: what it must know of the inputs.
        selection: the set of weights among which scores compete, as the record states it (unstructured patterns).
        prunes: False for the dense baseline, which leaves the model as it is and needs no loop.
        kinds: the kinds of patterns that it can keep (`Pattern.kind`); None is all.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    selection: ClassVar[str] = "layer"
    prunes: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str] | None] = frozenset({"unstructured", "nm"})

    def flops(self, rows: int, width: int) -> float:
        """Floating-point operations of one layer's matrix products, for the estimates of plan=true; 0 where memory
        bandwidth decides."""
        return 0.0

    def parts(self) -> int:
        """Into how many parts the work on the Gram matrix alone divides, where other processes may do some of it."""
        return 0

    def make_parts(self, problem: LayerProblem, indices: Sequence[int]) -> list[Tensor]:
        """Some of these parts, from the Gram matrix; another process's `solve_group` takes them from
        `LayerProblem.elsewhere`."""
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise UserError unless the method can keep this kind of pattern."""
        if self.kinds is not None and pattern.kind not in self.kinds:
            raise UserError(
                f"{type(self).__name__} cannot keep sparsity {pattern.written}: it takes "
                f"{', '.join(sorted(self.kinds))}"
            )

    def for_layers(self, patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]]) -> Solver:
        """The solver for these layers of a model, asked for before anything is calibrated.

        Args:
            patterns: layer name → pattern, for every layer that is to be pruned.
            shapes: layer name → (out, in), for these and perhaps others.

        Raises:
            UserError: a layer or a pattern that the method cannot keep.
        """
        for pattern in dict.fromkeys(patterns.values()):
            self.check_pattern(pattern)
        return self

    def digests(self) -> dict[str, str]:
        """What of the files that the method reads decides about results, by name."""
        return {}

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
        for problem, pattern in zip(problems, patterns, strict=True):
            problem.require(self.statistics)
            if self.prunes:
                self.check_pattern(pattern)
                pattern.check(tuple(problem.weight.shape), problem.name)
        return self._solve_group(problems, patterns)

    @abstractmethod
    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        """What a method is: `solve_group` after its checks."""


@dataclass(frozen=True)
class LayerSolver(Solver):
    """Base of methods that treat each layer by itself, also those that share an input."""

    @final
    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        return [self._solve(problem, pattern) for problem, pattern in zip(problems, patterns, strict=True)]

    @abstractmethod
    def _solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        """Prune one layer whose statistics and pattern were checked."""
