"""(H + ρI)⁻¹ for many ρ: what ADMM needs of the Gram matrix.

Exactly, that is a Cholesky factorisation and an inverse for every ρ. But as a function of log ρ, each eigenvalue's
1 / (λ + ρ) is analytic within a distance π of the real axis, so over a span of a factor 15 the polynomial through four
Chebyshev nodes is within 6 % of it, whatever the spectrum: four inverses serve a whole run, and every other ρ costs one
pass over them. That is as good as exact for what they are used for, corrections to ADMM's iterate. An
eigendecomposition serves every ρ too, but takes 4.6 s at 20480 inputs on an H100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..base.clock import Stopwatch
from ..base.errors import UserError
from .kernels import kernels_for
from .precision import fast_products, full_precision, low_precision
from .triangular import inverse_cholesky, lower_gram, triangular_inverse

NODES = 4
_SPAN = 15.0
# Width up to which a single matrix's factorisations do not fill a GPU one by one.
_SMALL = 2048


class Resolvent:
    """(H + ρI)⁻¹, kept until another ρ is asked for: layers in lockstep share it.

    Args:
        gram: (…, in, in) H, symmetric positive definite; several are worked on at once, for one ρ.
        start: the first ρ; spans of interpolation begin there.
        exact: one factorisation for every ρ, no interpolation.
        name: the layer's, for messages; of several matrices a sequence with one for each.
        elsewhere: number of a node of the first span → function that waits for another process to make it.

    Attributes:
        seconds: wall time spent on factorisations and interpolation.
    """

    def __init__(
        self,
        gram: Tensor,
        start: float,
        exact: bool,
        name: str | Sequence[str] = "the layer",
        elsewhere: Mapping[int, Callable[[], Tensor | None]] | None = None,
    ) -> None:
        self._gram = gram
        self._name = name
        self._elsewhere = dict(elsewhere or {})
        self._start = start
        self._exact = exact
        self._rho: float | None = None
        self._inverse: Tensor | None = None
        self._low: Tensor | None = None
        self._span: int | None = None
        self._nodes: list[tuple[float, Tensor]] = []
        self.seconds = 0.0

    def at(self, rho: float) -> Tensor:
        """(H + ρI)⁻¹ in the precision of H."""
        if rho != self._rho:
            watch = Stopwatch(self._gram.device)
            self._low = None
            self._inverse = None  # free the former ρ's before making this one
            self._inverse = inverse(self._gram, rho, self._name) if self._exact else self._interpolate(rho)
            self._rho = rho
            self.seconds += watch.lap("resolvent")
        return self._inverse

    def low_at(self, rho: float, dtype: torch.dtype) -> Tensor:
        """The same, rounded to a lower precision."""
        full = self.at(rho)
        if self._low is None or self._low.dtype != dtype:
            self._low = full.to(dtype)
        return self._low

    def free(self) -> None:
        """Give the memory back; the next `at` starts afresh."""
        self._rho = self._inverse = self._low = self._span = None
        self._nodes = []

    def _interpolate(self, rho: float) -> Tensor:
        position = math.log(rho / self._start) / math.log(_SPAN)
        span = math.floor(position + 1e-9)
        if span != self._span:
            self._nodes = []  # free the former span's before making new ones
            self._nodes = self._made(span)
            self._span = span
        at = position - span
        weights = [
            math.prod((at - other) / (place - other) for other, _ in self._nodes if other != place)
            for place, _ in self._nodes
        ]
        nodes = [node for _, node in self._nodes]
        low, kernels = low_precision(self._gram.device), kernels_for(self._gram.device)
        if kernels is not None:
            full, self._low = kernels.combine(nodes, weights, low)
            return full
        result = nodes[0] * weights[0]
        for node, weight in zip(nodes[1:], weights[1:], strict=True):
            result.add_(node, alpha=weight)
        return result

    def _made(self, span: int) -> list[tuple[float, Tensor]]:
        places = [_place(k) for k in range(NODES)]
        elsewhere, self._elsewhere = self._elsewhere if span == 0 else {}, {}
        own = [k for k in range(NODES) if k not in elsewhere]
        rhos = {k: self._start * _SPAN ** (span + places[k]) for k in own}
        if _small(self._gram) and not elsewhere:
            return list(zip(places, _inverses(self._gram, list(rhos.values()), self._name), strict=True))
        nodes = {k: inverse(self._gram, rho, self._name) for k, rho in rhos.items()}
        for k, wait in elsewhere.items():
            made = wait()
            nodes[k] = inverse(self._gram, self._start * _SPAN ** places[k], self._name) if made is None else made
        return [(places[k], nodes[k]) for k in range(NODES)]


def first_node(gram: Tensor, start: float, index: int, name: str = "the layer") -> Tensor:
    """The node of the first span with this number, from 0 to NODES - 1, as `Resolvent` makes it."""
    return inverse(gram, start * _SPAN ** _place(index), name)


def _place(index: int) -> float:
    """Chebyshev nodes of the first kind on [0, 1], in units of the span."""
    return 0.5 - 0.5 * math.cos(math.pi * (index + 0.5) / NODES)


def inverse(gram: Tensor, rho: float, name: str | Sequence[str] = "the layer") -> Tensor:
    """(H + ρI)⁻¹ by Cholesky, of each H (…, in, in), whose names are given where there are several.

    Raises:
        UserError: H + ρI is not positive definite.
    """
    if _small(gram):
        return _inverses(gram, [rho], name)[0]
    damped = gram.clone()
    damped.diagonal().add_(rho)
    factor, info = torch.linalg.cholesky_ex(damped)
    _check(info, name)
    del damped
    if not gram.is_cuda:
        return torch.cholesky_inverse(factor)
    with fast_products(gram.device):
        lower = triangular_inverse(factor)
        del factor
        return lower_gram(lower)


def _small(gram: Tensor) -> bool:
    """Whether matrices are so small that a GPU factorises several at once, or there are several."""
    return gram.ndim > 2 or (gram.is_cuda and gram.shape[-1] <= _SMALL)


def _inverses(gram: Tensor, rhos: Sequence[float], name: str | Sequence[str]) -> Tensor:
    """(ρ, …, in, in) (H + ρI)⁻¹ for each ρ, by one batch of factorisations."""
    damped = torch.stack([gram] * len(rhos))
    for part, rho in zip(damped, rhos, strict=True):
        part.diagonal(dim1=-2, dim2=-1).add_(rho)
    with full_precision():
        lower, failed = inverse_cholesky(damped)
    _check(failed, name)
    with fast_products(gram.device):
        return torch.matmul(lower.mT, lower, out=damped)


def _check(failed: Tensor, name: str | Sequence[str]) -> None:
    if bool(failed.any()):
        if not isinstance(name, str):
            name = name[int(failed.reshape(-1, len(name)).any(0).nonzero()[0])]
        raise UserError(
            f"{name}: the Gram matrix is not positive semi-definite: pass XᵀX summed in float32 or better, undamped, "
            "or raise method.damping"
        )
