"""The Gram matrix of a layer's inputs, damped and scaled to a unit diagonal."""

from __future__ import annotations

from torch import Tensor

from .problem import LayerProblem


class ScaledGram:
    """H = E(G + λ₂I)E with unit diagonal, E = diag(G + λ₂I)^-½.

    Args:
        problem: any of the layers that share the Gram matrix, which is there.
        damping: λ₂ over mean(diag G).
    """

    def __init__(self, problem: LayerProblem, damping: float) -> None:
        self.dead = problem.dead
        ridge = damping * float(problem.diagonal.mean())
        diagonal = (problem.diagonal + ridge).masked_fill(self.dead, 1.0)
        self._e = diagonal.rsqrt()
        self.gram = problem.gram * self._e * self._e[:, None]
        self.gram.diagonal().fill_(1.0)

    def scale(self, weight: Tensor) -> Tensor:
        """E⁻¹W, without the dead inputs."""
        return (weight / self._e).masked_fill(self.dead, 0)

    def unscale(self, weight: Tensor) -> Tensor:
        """The inverse of `scale`; dead inputs stay zero."""
        return (weight * self._e).masked_fill(self.dead, 0)
