"""ADMM with penalty 1 between a weight that follows the loss and one that has the zeros (Boža, 2024).

    H    (in, in)    Gram matrix scaled to a unit diagonal, plus λI, λ = damping · the mean of the diagonal
    W    (out, in)   dense weight, scaled alike
    B    (out, in)   ADMM's unconstrained copy of the weight
    Z    (out, in)   its copy with zeros
    U    (out, in)   dual variable of B = Z

One iteration:  Z ← B + U on the support,  U ← U + B - Z,  B ← (WH + Z - U)(H + I)⁻¹.  The result is B + U on the
last support. A dead input has 0 on the scaled diagonal, and its weights go.

B is computed as W + (Z - U - W)(H + I)⁻¹, the same in exact arithmetic: what is multiplied is a difference from W, and
WH is not needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layer.problem import LayerProblem, power_of_two
from ..layer.scaled import ScaledGram
from ..numerics.precision import Multiplier
from ..numerics.resolvent import inverse

# The paper's.
DAMPING, ITERATIONS = 0.1, 20


class PlainAdmm:
    """This iteration on layers that share a Gram matrix.

    Args:
        problem: any of these layers.
        damping: λ over the mean of the scaled Gram matrix's diagonal.

    Raises:
        UserError: H + I is not positive definite.
    """

    def __init__(self, problem: LayerProblem, damping: float) -> None:
        self._scaled = ScaledGram(problem.inputs, damping=0.0)
        ridge = damping * float((~self._scaled.dead).double().mean())
        resolvent = inverse(self._scaled.gram, 1 + ridge, problem.name)
        self._scaled.gram = None  # of large layers it takes gigabytes
        self._multiply = Multiplier(resolvent, exact=problem.weight.dtype == torch.float64)

    def __call__(
        self,
        dense: Tensor,
        select: Callable[[int, Tensor], Tensor],
        iterations: int,
        look: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Z and its support, (out, in) each.

        Args:
            dense: (out, in) W, not scaled.
            select: number of the iteration, from 0, and |B + U| (out, in) ↦ the support (out, in), bool.
            iterations: at least 1.
            look: called in every iteration with Z, not scaled, and the support.
        """
        # Exact factors that bring the weights near 1.
        factor = power_of_two(float(dense.abs().max()))
        scaled = self._scaled.scale(dense / factor)
        unit = power_of_two(float(scaled.abs().max()))
        scaled /= unit
        total = scaled  # B + U
        for iteration in range(iterations):
            support = select(iteration, total.abs())
            if look is not None:
                look(self._scaled.unscale(total.masked_fill(~support, 0) * unit) * factor, support)
            dual = total.masked_fill(support, 0)
            total = self._multiply(total - 2 * dual - scaled).add_(scaled).add_(dual)
        support = support & ~self._scaled.dead
        weight = self._scaled.unscale(total.masked_fill_(~support, 0) * unit) * factor
        return weight, support
