"""What every pruning method is: a value with hyperparameters that maps a LayerProblem and a Pattern to a Solution."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..patterns.pattern import Pattern
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
class Solver:
    """Base of all layer methods. A solver holds hyperparameters only: it never prints, never touches a model, never
    changes its problem and never moves anything to another device.

    Class attributes:
        statistics: what it must know of the inputs.
        selection: the set of weights among which scores compete, as the record states it (unstructured patterns).
        prunes: False for the dense baseline, which leaves the model as it is and needs no loop.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    selection: ClassVar[str] = "layer"
    prunes: ClassVar[bool] = True

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
        raise NotImplementedError

    def solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        """Prune one layer."""
        return self.solve_group([problem], [pattern])[0]

    def solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        """Prune layers that are fed by the same input (one Gram matrix), sharing what can be shared.

        A method overrides this one when it factorises the Gram matrix, `solve` otherwise.
        """
        return [self.solve(problem, pattern) for problem, pattern in zip(problems, patterns, strict=True)]


class Stopwatch:
    """Wall time by phase, waiting for the device where its work is asynchronous."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, phase: str) -> float:
        """Book the time since the last lap under `phase` and return it."""
        now = self._now()
        elapsed, self._last = now - self._last, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        return elapsed


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the process allows elsewhere (TF32 is a process-wide switch)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
