"""Triton kernels that take the kept entries of a weight out, one after the other, and put them back.

Which entries they are is a bit per entry, and per block of entries the number of kept ones before it: an eighth of the
memory that numbers of the entries take at 70 % sparsity. The counterpart in torch is `training.masters.Places`; results
are equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


class Bits:
    """Which entries of a weight are kept.

    Args:
        mask: bool, any shape, with one kept entry at least.

    Attributes:
        count: how many entries are kept.
        nbytes: memory that this takes.
    """

    def __init__(self, mask: Tensor) -> None:
        flat = mask.reshape(-1)
        self._size = flat.numel()
        blocks = torch.nn.functional.pad(flat, (0, -self._size % _BLOCK)).view(-1, _BLOCK)
        counts = blocks.sum(1)
        self._before = counts.cumsum(0) - counts
        self.count = int(counts.sum())
        shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
        self._bits = (blocks.view(-1, 8).to(torch.uint8) << shifts).sum(1, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return self._bits.nbytes + self._before.nbytes

    def pick(self, tensor: Tensor, into: Tensor) -> Tensor:
        """Write the kept entries of a contiguous tensor into the first `count` of `into`, in its dtype."""
        return self._run(_pick, tensor, into, ADD=False)

    def add(self, tensor: Tensor, into: Tensor) -> Tensor:
        """Add them there."""
        return self._run(_pick, tensor, into, ADD=True)

    def put(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Write `values` to the kept entries of a contiguous tensor, in its dtype; the others stay as they are."""
        return self._run(_put, values, tensor)

    def _run(self, kernel, source: Tensor, target: Tensor, **options) -> Tensor:
        if not (source.is_contiguous() and target.is_contiguous()):
            raise ValueError("entries are taken from and put into contiguous tensors")
        with torch.cuda.device_of(target):
            kernel[(len(self._before),)](
                source, target, self._bits, self._before, self._size, BLOCK=_BLOCK, num_warps=4, **options
            )
        return target


@triton.jit
def _places(bits, before, size, BLOCK: tl.constexpr):
    """Places of a block's entries, whether they are kept, and their places among the kept ones."""
    block = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK)
    places = block * BLOCK + inside
    kept = (tl.load(bits + places // 8).to(tl.int32) >> (inside % 8)) & 1
    return places, kept != 0, tl.load(before + block) + tl.cumsum(kept, 0) - kept


@triton.jit
def _pick(source, target, bits, before, size, BLOCK: tl.constexpr, ADD: tl.constexpr):
    places, kept, packed = _places(bits, before, size, BLOCK)
    value = tl.load(source + places, mask=kept).to(target.dtype.element_ty)
    if ADD:
        value += tl.load(target + packed, mask=kept)
    tl.store(target + packed, value, mask=kept)


@triton.jit
def _put(source, target, bits, before, size, BLOCK: tl.constexpr):
    places, kept, packed = _places(bits, before, size, BLOCK)
    tl.store(target + places, tl.load(source + packed, mask=kept).to(target.dtype.element_ty), mask=kept)
