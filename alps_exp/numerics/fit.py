"""The best weights on a fixed support, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fit_on_support(
    multiply: Callable[[Tensor], Tensor],
    dense: Tensor,
    support: Tensor,
    start: Tensor,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, list[int] | int]:
    """Conjugate gradients on a fixed support: min tr((W - Ŵ) H (W - Ŵ)ᵀ) over Ŵ zero outside `support`.

    All rows at once, each with its own step sizes. No preconditioner: H is meant to have a unit diagonal, for which
    Jacobi's is the identity.

    Args:
        multiply: A (…, out, in) ↦ AH with H symmetric positive definite, in float32's precision: TF32 was seen to make
            the iteration diverge where one direction dominates H (inputs far off zero).
        dense: (out, in) W, or (layers, out, in), each layer with an H and an end of its own.
        support: bool, of the same shape.
        start: of the same shape, zero outside the support.
        iterations: at most this many products with H after the first.
        tolerance: stop once an iteration lowers the objective by less than this fraction of it.

    Returns:
        Ŵ and the number of iterations made, of each layer where there are several.
    """
    weight, eps = start, torch.finfo(start.dtype).eps
    delta = dense - weight
    gradient = multiply(delta)
    objective = (delta * gradient).sum((-2, -1))
    residual = gradient.mul_(support)
    direction = residual
    energy = residual.square().sum(-1)
    if several := dense.ndim > 2:
        going = torch.ones_like(objective, dtype=torch.bool)
        steps = torch.full_like(objective, iterations, dtype=torch.int)
    for step in range(iterations):
        product = multiply(direction).mul_(support)
        curvature = (direction * product).sum(-1)
        # Less is rounding of H: where inputs are dependent, its directions of no curvature would get steps of any size.
        steep = curvature > eps * direction.square().sum(-1)
        steep = steep & going[..., None] if several else steep
        alpha = torch.where(steep, energy / curvature, 0.0)
        weight = torch.addcmul(weight, alpha[..., None], direction)
        decrease = (alpha * energy).sum(-1)
        objective = objective - decrease
        enough = decrease > tolerance * objective
        if several:
            steps, going = steps.masked_fill(going & ~enough, step + 1), going & enough
        if not bool(going.any() if several else enough):
            break
        residual = torch.addcmul(residual, alpha[..., None], product, value=-1)
        fresh = residual.square().sum(-1)
        beta = torch.where(energy > 0, fresh / energy, 0.0)
        direction = torch.addcmul(residual, beta[..., None], direction)
        energy = fresh
    return weight, steps.tolist() if several else step + 1 if iterations else 0
