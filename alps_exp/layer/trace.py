"""What the iterations of a method do, for its record: `method.trace=true`."""

from __future__ import annotations

from torch import Tensor

from ..numerics.precision import full_precision
from .problem import LayerProblem


class Trace:
    """One layer's iterations.

    Args:
        problem: the layer.
    """

    def __init__(self, problem: LayerProblem) -> None:
        self._problem = problem
        self._former: Tensor | None = None
        self._rows: list[tuple[float, float, float]] = []

    def add(self, weight: Tensor, support: Tensor, rho: float) -> None:
        """Account for an iteration.

        Args:
            weight: (out, in) with zeros, as it would be the result.
            support: (out, in) bool.
            rho: the penalty.
        """
        changed = 0 if self._former is None else int((support ^ self._former).sum())
        with full_precision():
            loss = self._problem.relative_loss(weight)
        self._rows.append((loss, changed / max(int(support.sum()), 1), rho))
        self._former = support.clone()

    def stats(self) -> dict:
        """For `Solution.stats`, a value per iteration: `loss` (relative, undamped), `change` (positions of the support
        that differ from those of the iteration before, over the kept ones), `rho`."""
        columns = zip(*self._rows, strict=True) if self._rows else ([], [], [])
        rounded = ([float(f"{value:.5g}") for value in column] for column in columns)
        return {"trace": dict(zip(("loss", "change", "rho"), rounded, strict=True))}
