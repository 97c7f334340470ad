"""Inverses of triangular matrices by halves, so that nearly all of the work are matrix products.

On an H200 at 20480 that is several times as fast as `solve_triangular`, and half of each product that is known to
vanish is not made. Of many small matrices the factorisation itself is made by halves, all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Below this a library routine is as fast.
_SMALL = 1024
# Of many matrices at once, the largest that a library routine factorises.
_LEAF = 256


Product = Callable[[Tensor, Tensor], Tensor]


def triangular_inverse(factor: Tensor, product: Product = torch.matmul) -> Tensor:
    """L⁻¹ of a lower triangular matrix: [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [-B⁻¹CA⁻¹, B⁻¹]].

    Args:
        factor: (n, n) L; its upper triangle is not read.
        product: of two matrices; by default in the precision that the process allows float32 products.
    """
    out = torch.zeros(factor.shape, dtype=factor.dtype, device=factor.device)  # row-major, whatever L is
    _invert(factor, out, product)
    return out


def _invert(factor: Tensor, out: Tensor, product: Product) -> None:
    size = len(factor)
    if size <= _SMALL:
        out.diagonal().fill_(1.0)
        out.copy_(torch.linalg.solve_triangular(factor, out, upper=False))
        return
    half = size // 2
    _invert(factor[:half, :half], out[:half, :half], product)
    _invert(factor[half:, half:], out[half:, half:], product)
    middle = _times_lower(factor[half:, :half], out[:half, :half], product)
    torch.neg(product(out[half:, half:], middle), out=out[half:, :half])


def _times_lower(left: Tensor, lower: Tensor, product: Product) -> Tensor:
    """left @ lower, without the product by the block of zeros above the diagonal."""
    half = lower.shape[1] // 2
    return torch.cat([product(left, lower[:, :half]), product(left[:, half:], lower[half:, half:])], 1)


def lower_gram(lower: Tensor) -> Tensor:
    """LᵀL of a lower triangular matrix, a third of the full product's work.

    With L = [[A, 0], [C, B]] that is [[AᵀA + CᵀC, CᵀB], [BᵀC, BᵀB]].

    Args:
        lower: (n, n), zeros above the diagonal.
    """
    out = torch.empty_like(lower)
    _gram(lower, out)
    return out


def _gram(lower: Tensor, out: Tensor) -> None:
    size = len(lower)
    if size <= _SMALL:
        torch.matmul(lower.T, lower, out=out)
        return
    half = size // 2
    _gram(lower[:half, :half], out[:half, :half])
    _gram(lower[half:, half:], out[half:, half:])
    corner = lower[half:, :half]
    out[:half, :half].addmm_(corner.T, corner)
    torch.matmul(lower[half:, half:].T, corner, out=out[half:, :half])
    out[:half, half:].copy_(out[half:, :half].T)


def symmetric_product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """scale · AB of symmetric matrices of which one is a polynomial in the other, so that AB is symmetric, too: of
    a large one only the part below the diagonal is made, and mirrored.

    Args:
        left, right: (…, n, n).
    """
    size = left.shape[-1]
    out = torch.empty_like(left)
    if left.ndim > 2:
        return torch.baddbmm(out, left, right, beta=0, alpha=scale)
    if size <= 2 * _SMALL:
        return torch.addmm(out, left, right, beta=0, alpha=scale)
    step = max(_SMALL, size // 8)
    for begin in range(0, size, step):
        end = min(begin + step, size)
        own = out[begin:end, :end]
        torch.addmm(own, left[begin:end], right[:, :end], beta=0, alpha=scale, out=own)
        out[:begin, begin:end].copy_(out[begin:end, :begin].T)
    return out


def inverse_cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ of positive definite matrices LLᵀ, all at once and without L.

    With A = [[P, ·], [Q, R]] and P = MMᵀ, the corner of L is QM⁻ᵀ =: C, the rest is that of R - CCᵀ =: NNᵀ, and
    L⁻¹ = [[M⁻¹, 0], [-N⁻¹CM⁻¹, N⁻¹]].

    Args:
        matrices: (…, n, n), overwritten; only the lower triangles count.

    Returns:
        L⁻¹ (…, n, n), and (…) whether there is none, as a number other than 0.
    """
    out = torch.zeros_like(matrices)
    return out, _factorise(matrices, out)


def _factorise(matrices: Tensor, out: Tensor) -> Tensor:
    size = matrices.shape[-1]
    if size <= _LEAF:
        factor, failed = torch.linalg.cholesky_ex(matrices)
        eye = torch.eye(size, dtype=out.dtype, device=out.device).expand_as(factor)
        out.copy_(torch.linalg.solve_triangular(factor, eye, upper=False))
        return failed
    half = -(-size // 2 // _LEAF) * _LEAF if size > 2 * _LEAF else size // 2
    first, second = slice(None, half), slice(half, None)
    failed = _factorise(matrices[..., first, first], out[..., first, first])
    upper = out[..., first, first]
    corner = matrices[..., second, first] @ upper.mT
    matrices[..., second, second] -= corner @ corner.mT
    failed = failed | _factorise(matrices[..., second, second], out[..., second, second])
    out[..., second, first] = -(out[..., second, second] @ (corner @ upper))
    return failed
