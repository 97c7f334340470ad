"""Low-precision matrix products, and near-float32 products built from three TF32 ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ..base.errors import first_line
from ..base.fallbacks import fell_back

EIGHT = torch.float8_e4m3fn
# Least width of the stripes that a symmetric matrix is multiplied by, where half of it is left out.
_STRIPE = 2048
# Entries from which on a sum is worth the passes that divide its products' factors.
_WORTH_PARTS = 1 << 22


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """float32 products through TF32 on CUDA (10 bits of mantissa), unchanged elsewhere."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the process allows elsewhere (TF32 is a process-wide switch)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def low_precision(device: torch.device) -> torch.dtype | None:
    """The dtype whose products this device makes several times faster than float32's, None where there is none."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and supported() else None


def halves(device: torch.device) -> bool:
    """Whether products of two matrices in float16 are made in float32 there, faster than those of float32 matrices."""
    return device.type == "cuda"


def eights(device: torch.device) -> bool:
    """Whether products of two matrices in float8 (e4m3) run there, at twice the rate of halves. Where a GPU that should
    have them does not, the record tells."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    if fault := _fault_of_eights(device):
        fell_back(f"products in float8 {fault}, so ALPS multiplies in float16, which is slower")
    return not fault


@cache
def _fault_of_eights(device: torch.device) -> str:
    values = (torch.arange(32 * 64, device=device) % 15 - 7.0).view(32, 64)
    try:
        found = eight_product(values.to(EIGHT), values.to(EIGHT), values.new_tensor(0.5))
    except torch.OutOfMemoryError:  # says nothing of the products: the next use tries again
        raise
    except RuntimeError as error:
        return f"do not run here ({first_line(error)})"
    right = torch.allclose(found.float(), values @ values.T / 2, rtol=1e-2, atol=1e-2)
    return "" if right else "are wrong here"


def eight_product(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """scale · left @ rightᵀ in bfloat16.

    Args:
        left: (rows, in) in float8, both dimensions multiples of 16.
        right: (out, in), likewise.
        scale: 0-dim float32 there.
    """
    one = torch.ones_like(scale)
    return torch._scaled_mm(left, right.T, scale, one, out_dtype=torch.bfloat16, use_fast_accum=True)


class Multiplier:
    """Products A ↦ A @ B with one matrix B, in nearly float32's precision and faster where there is TF32.

    With A = a + a' and B = b + b', the first terms exact in TF32's 10 bits of mantissa, three TF32 products
    ab + ab' + a'b leave out a'b' only, which is 2⁻²² of the whole: 2.4 times as fast as a float32 product on an H200.

    Args:
        matrix: (…, in, out) B.
        exact: multiply in B's own precision in any case.
    """

    def __init__(self, matrix: Tensor, exact: bool = False) -> None:
        self._matrix = matrix
        self._parts = None
        if not exact and _in_parts(matrix):
            self._parts = _split(matrix)

    def __call__(self, left: Tensor) -> Tensor:
        """left @ B, (…, rows, out)."""
        if self._parts is None:
            return left @ self._matrix
        high, low = self._parts
        left_high, left_low = _split(left)
        with fast_products(left.device):
            product = left_high @ low
            add = product.addmm_ if product.ndim == 2 else product.baddbmm_
            add(left_low, high)
            return add(left_high, high)


def nearly_product(left: Tensor, right: Tensor) -> Tensor:
    """(rows, in) @ (in, out) as a `Multiplier` makes it."""
    return Multiplier(right)(left)


def subtract_product(base: Tensor, left: Tensor, right: Tensor) -> None:
    """base -= left @ right of few columns and rows, in nearly float32's precision: the three TF32 products of a
    `Multiplier` side by side in one, which passes over `base` once.

    Args:
        base: (…, rows, out), overwritten.
        left: (…, rows, few).
        right: (…, few, out).
    """
    subtract = base.addmm_ if base.ndim == 2 else base.baddbmm_
    if base.numel() < _WORTH_PARTS or not _in_parts(base):
        subtract(left, right, alpha=-1)
        return
    (left, left_low), (right, right_low) = _split(left), _split(right)
    with fast_products(base.device):
        subtract(torch.cat([left, left, left_low], -1), torch.cat([right_low, right, right], -2), alpha=-1)


def _in_parts(matrix: Tensor) -> bool:
    has_tf32 = matrix.is_cuda and low_precision(matrix.device) == torch.bfloat16
    return has_tf32 and matrix.dtype == torch.float32


def quadratic(left: Tensor, matrix: Tensor) -> float:
    """tr(A B Aᵀ) of a symmetric B, in nearly float32's precision; summed in float64.

    On CUDA only the part of AB to which B's upper triangle contributes is made, half of it, by stripes.

    Args:
        left: (rows, n) A.
        matrix: (n, n) B.
    """
    size = len(matrix)
    if not matrix.is_cuda or size <= _STRIPE:
        return float(((left @ matrix) * left).sum(dtype=torch.float64))
    total, step = torch.zeros((), dtype=torch.float64, device=matrix.device), max(_STRIPE, -(-size // 8))
    for begin in range(0, size, step):
        end = min(begin + step, size)
        stripe = matrix[:end, begin:end].clone()
        stripe[:begin] *= 2
        total += (nearly_product(left[:, :end], stripe) * left[:, begin:end]).sum(dtype=torch.float64)
    return float(total)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(first, rest) with first + rest the matrix, exactly, and 10 bits of mantissa in the first."""
    first = (matrix.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return first, matrix - first
