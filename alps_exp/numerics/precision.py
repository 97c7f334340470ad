"""Low-precision matrix products, and near-float32 products built from three TF32 ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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


class Multiplier:
    """Products A ↦ A @ B with one matrix B, in nearly float32's precision and faster where there is TF32.

    With A = a + a' and B = b + b', the first terms exact in TF32's 10 bits of mantissa, three TF32 products
    ab + ab' + a'b leave out a'b' only, which is 2⁻²² of the whole: 2.4 times as fast as a float32 product on an H200.

    Args:
        matrix: (…, in, in) B.
        exact: multiply in B's own precision in any case.
    """

    def __init__(self, matrix: Tensor, exact: bool = False) -> None:
        self._matrix = matrix
        self._parts = None
        has_tf32 = matrix.is_cuda and low_precision(matrix.device) == torch.bfloat16
        if not exact and has_tf32 and matrix.dtype == torch.float32:
            self._parts = _split(matrix)

    def __call__(self, left: Tensor) -> Tensor:
        """left @ B, (…, rows, in)."""
        if self._parts is None:
            return left @ self._matrix
        high, low = self._parts
        left_high, left_low = _split(left)
        with fast_products(left.device):
            product = left_high @ low
            add = product.addmm_ if product.ndim == 2 else product.baddbmm_
            add(left_low, high)
            return add(left_high, high)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(first, rest) with first + rest the matrix, exactly, and 10 bits of mantissa in the first."""
    first = (matrix.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return first, matrix - first
