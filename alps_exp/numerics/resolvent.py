"""(H + ρI)⁻¹ for many ρ: what ADMM needs of the Gram matrix.

Exactly, that is a Cholesky factorisation and an inverse for every ρ. But as a function of log ρ, each eigenvalue's
1 / (λ + ρ) is analytic within a distance π of the real axis, so over a span of a factor 15 the polynomial through four
Chebyshev nodes is within 6 % of it, whatever the spectrum: four inverses serve a whole run, and every other ρ costs one
pass over them. That is as good as exact for what they are used for, corrections to ADMM's iterate. An
eigendecomposition serves every ρ too, but takes 4.6 s at 20480 inputs on an H100.

On a GPU a product takes a fraction of a factorisation's time, and one inverse X = (H + cI)⁻¹ from the middle of the
span serves all of it: (H + ρI)⁻¹ = X (I + (ρ - c)X)⁻¹, and the second factor is nearly a polynomial of degree 3 in X.
The best one leaves T₄(2cX - I) / T₄((c + ρ) / (c - ρ)) of each eigenvalue, with Chebyshev's polynomial T₄: 2.3 % at the
ends of the span, and less between them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..base.clock import Stopwatch
from ..base.errors import UserError
from .kernels import kernel_for
from .precision import EIGHT, fast_products, full_precision, halves
from .triangular import inverse_cholesky, lower_gram, symmetric_product, triangular_inverse

NODES = 4
# What powers are multiplied by: most entries of an inverse are far below what half precision holds with all its digits.
_LIFT = 1024.0
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
        self._half: Tensor | None = None
        self._half_rho: float | None = None
        self._eight: tuple[Tensor, Tensor] | None = None
        self._eight_rho: float | None = None
        self._span: int | None = None
        self._powers = multiplies(gram.device) and not elsewhere
        self._basis: list[Tensor] = []  # what (H + ρI)⁻¹ is a weighted sum of
        self._timed = True
        self.seconds = 0.0

    @property
    def size(self) -> int:
        """Entries of H."""
        return self._gram.numel()

    def untimed(self) -> Resolvent:
        """The same with a basis of its own, and without waiting for the device to tell the time."""
        own = copy.copy(self)
        own._timed, own._basis = False, [part.clone() for part in self.basis(self._start)]
        own._rho = own._half_rho = own._eight_rho = None  # nothing is taken from before
        return own

    def covers(self, rho: float) -> bool:
        """Whether ρ lies in the first span."""
        return self._place(rho)[0] == 0

    def basis(self, rho: float) -> list[Tensor]:
        """What (H + ρI)⁻¹ is a weighted sum of in the span in which ρ lies."""
        span, _ = self._place(rho)
        if span != self._span:
            self._basis = []  # free the former span's before making new ones
            self._basis = self._multiplied(span) if self._powers else self._made(span)
            self._span = span
        return self._basis

    def at(self, rho: float) -> Tensor:
        """(H + ρI)⁻¹ in the precision of H."""
        if rho != self._rho:
            watch = Stopwatch(self._gram.device) if self._timed else None
            self._low = None
            self._inverse = None  # free the former ρ's before making this one
            self._inverse = inverse(self._gram, rho, self._name) if self._exact else self._interpolate(rho)
            self._rho = rho
            self.seconds += watch.lap("resolvent") if watch is not None else 0.0
        return self._inverse

    def low_at(self, rho: float, dtype: torch.dtype) -> Tensor:
        """The same, rounded to a lower precision."""
        full = self.at(rho)
        if self._low is None or self._low.dtype != dtype:
            self._low = full.to(dtype)
        return self._low

    def half_at(self, rho: float, unit: float) -> Tensor:
        """The same in float16, times ρ and a number: ρ(H + ρI)⁻¹ has no entries above 1 and many tiny ones."""
        if rho != self._half_rho:
            watch = Stopwatch(self._gram.device) if self._timed else None
            self._half = None  # free the former ρ's before making this one
            combine = kernel_for(self._gram.device, "combine")
            if combine is None or self._exact:
                self._half = self.at(rho).mul(rho * unit).half()
            else:
                basis = self.basis(rho)
                self._half = combine(basis, [rho * unit * weight for weight in self._weights(rho)], torch.float16)
            self._half_rho = rho
            self.seconds += watch.lap("resolvent") if watch is not None else 0.0
        return self._half

    def eight_at(self, rho: float, lift: float, unit: float) -> tuple[Tensor, Tensor]:
        """ρ(H + ρI)⁻¹ as its part off the diagonal, times `unit` in float8, and its diagonal (in,) in float32. Off the
        diagonal of a matrix between 0 and I nothing is above ½.

        Args:
            rho: ρ, of one H (in, in).
            lift: of `half_at`, from which it is made.
            unit: at most 512.
        """
        if rho != self._eight_rho:
            half = self.half_at(rho, lift)
            self._eight = None  # free the former ρ's before making this one
            scaled = half * (unit / lift)
            diagonal = scaled.diagonal().float() / unit
            scaled.diagonal().zero_()
            self._eight, self._eight_rho = (scaled.to(EIGHT), diagonal), rho
        return self._eight

    def free(self) -> None:
        """Give the memory back; the next `at` starts afresh."""
        self._rho = self._half_rho = self._eight_rho = self._span = None
        self._inverse = self._half = self._low = self._eight = None
        self._basis = []

    def _interpolate(self, rho: float) -> Tensor:
        basis, weights = self.basis(rho), self._weights(rho)
        result = basis[0].to(self._gram.dtype) * weights[0]
        for part, weight in zip(basis[1:], weights[1:], strict=True):
            result.add_(part, alpha=weight)
        return result

    def _weights(self, rho: float) -> list[float]:
        span, at = self._place(rho)
        return _in_powers(rho, self._middle(span)) if self._powers else _between_nodes(at)

    def _place(self, rho: float) -> tuple[int, float]:
        """The span in which ρ lies, and where in it."""
        position = math.log(rho / self._start) / math.log(_SPAN)
        span = math.floor(position + 1e-9)
        return span, position - span

    def _made(self, span: int) -> list[Tensor]:
        places = [_place(k) for k in range(NODES)]
        elsewhere, self._elsewhere = self._elsewhere if span == 0 else {}, {}
        own = [k for k in range(NODES) if k not in elsewhere]
        rhos = {k: self._start * _SPAN ** (span + places[k]) for k in own}
        if _small(self._gram) and not elsewhere:
            return list(_inverses(self._gram, list(rhos.values()), self._name))
        nodes = {k: inverse(self._gram, rho, self._name) for k, rho in rhos.items()}
        for k, wait in elsewhere.items():
            made = wait()
            nodes[k] = inverse(self._gram, self._start * _SPAN ** places[k], self._name) if made is None else made
        return [nodes[k] for k in range(NODES)]

    def _middle(self, span: int) -> float:
        return self._start * _SPAN ** (span + 0.5)

    def _multiplied(self, span: int) -> list[Tensor]:
        """s, s², s³, s⁴ of s = cX, whose entries are below 1, times `_LIFT`, where the device has it in half precision:
        TF32's mantissa at twice its rate."""
        middle = self._middle(span)
        powers = [inverse(self._gram, middle, self._name).mul_(middle * _LIFT)]
        if halves(self._gram.device):
            powers[0] = powers[0].half()
        for _ in range(1, NODES):
            powers.append(symmetric_product(powers[-1], powers[0], 1 / _LIFT))
        return powers


def multiplies(device: torch.device) -> bool:
    """Whether a product takes far less time there than a factorisation."""
    return device.type == "cuda"


def _between_nodes(at: float) -> list[float]:
    """Weights of the nodes' inverses at a place of the span, from 0 to 1."""
    places = [_place(k) for k in range(NODES)]
    return [math.prod((at - other) / (place - other) for other in places if other != place) for place in places]


def _in_powers(rho: float, middle: float) -> list[float]:
    """Weights of the powers of s = cX, X = (H + cI)⁻¹, for (H + ρI)⁻¹.

    With r = ρ/c and 1 + (r - 1)z = 0, that is X times (1 - T₄(2s - 1) / T₄(2z - 1)) / (1 + (r - 1)s),
    a division without remainder.
    """
    excess = rho / middle - 1
    if abs(excess) < 1e-6:
        return [1 / middle / _LIFT, *[0.0] * (NODES - 1)]
    residual = [1.0, -32.0, 160.0, -256.0, 128.0]  # T₄(2s - 1) by powers of s
    size = sum(value * (-1 / excess) ** power for power, value in enumerate(residual))
    numerator = [float(not power) - value / size for power, value in enumerate(residual)]
    weights, rest = [], 0.0
    for value in numerator[:-1]:
        rest = value - excess * rest
        weights.append(rest)
    return [weight / middle / _LIFT for weight in weights]


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
