"""The Gram matrix of a layer's inputs, damped and scaled to a unit diagonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import Inputs

_PER_INPUT = ("diagonal", "dead")


class ScaledGram:
    """H = E(G + λ₂I)E with unit diagonal, E = diag(G + λ₂I)^-½.

    Args:
        inputs: those whose Gram matrix it is; or several of one width, whose matrices are then stacked along a first
            dimension, as are the weights here.
        damping: λ₂ over mean(diag G).

    Attributes:
        gram: (…, in, in) H.
        dead: (…, 1, in) bool; without the dimension of size 1 for a single matrix.
    """

    def __init__(self, inputs: Inputs | Sequence[Inputs], damping: float) -> None:
        if isinstance(inputs, Inputs):
            gram, diagonal, self.dead = inputs.gram, inputs.diagonal, inputs.dead
            ridge = damping * float(diagonal.mean())
        else:
            gram = torch.stack([one.gram for one in inputs])
            diagonal, self.dead = (torch.stack([getattr(one, name) for one in inputs])[:, None] for name in _PER_INPUT)
            ridge = damping * diagonal.mean(-1, keepdim=True)
        self._e = (diagonal + ridge).masked_fill(self.dead, 1.0).rsqrt()
        # What was stacked is this object's own.
        gram = gram.mul_(self._e) if gram.ndim == 3 else gram * self._e
        self.gram = gram.mul_(self._e[..., None] if gram.ndim == 2 else self._e.mT)
        self.gram.diagonal(dim1=-2, dim2=-1).fill_(1.0)

    def scale(self, weight: Tensor) -> Tensor:
        """E⁻¹W, without the dead inputs."""
        return (weight / self._e).masked_fill(self.dead, 0)

    def unscale(self, weight: Tensor) -> Tensor:
        """The inverse of `scale`; dead inputs stay zero."""
        return (weight * self._e).masked_fill(self.dead, 0)
