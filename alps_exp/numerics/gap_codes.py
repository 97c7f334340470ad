"""A pruned matrix in gap codes: the kept entries of each row in order, and by how much each is further to the right.

A row's entries are values with a code of 3, 4 or 8 bits: code + 1 columns from the entry before (from column -1 at the
row's start). A gap too wide for a code is crossed by entries of value 0. Eight entries are a group; a row's last group
is filled up with zeros. The work of a product is per kept entry, and 3 bits cost 19 % of a 16-bit value, where a bit
mask costs 12.5 % at half of the entries kept and 62.5 % at a tenth.

On CUDA the products are kernels of gap_codes.cu; elsewhere the matrix is unpacked first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..base.errors import first_line
from .nvrtc import Kernel

BITS = (3, 4, 8)
GROUP = 8
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# The fastest found on an H100: rows of activations beyond which unpacking the matrix for one dense product is faster
# than passes of eight, by bits; a block's threads, the groups that each has in flight, the threads of a multiprocessor.
FEW_ROWS = {3: 8, 4: 16, 8: 16}
_THREADS, _AHEAD, _RESIDENT = 512, 2, 1024
_BEYOND = 16  # bytes of zeros after the codes: kernels read words of 4 bytes, the last of which may lie beyond the end
_SPAN = 4096  # bytes of a row that a warp unpacks at a time, SPAN in gap_codes.cu


@dataclass(frozen=True)
class GapCodes:
    """A matrix (rows, cols).

    Attributes:
        values: (groups · 8,) in the matrix' dtype.
        codes: (bytes,) uint8: `bits` bytes a group, the first entry's code in the lowest bits; a few zeros at the end.
        starts: (rows + 1,) int32: the first group of each row, and the number of groups.
        bits: of a code.
        cols: columns.
    """

    values: Tensor
    codes: Tensor
    starts: Tensor
    bits: int
    cols: int

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.values.nbytes + self.codes.nbytes + self.starts.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return len(self.starts) - 1, self.cols

    def between(self, begin: int, end: int) -> GapCodes:
        """The rows from `begin` to before `end`, in the same memory: `starts` goes on to count from its first group."""
        return GapCodes(self.values, self.codes, self.starts[begin : end + 1], self.bits, self.cols)


def encode(matrix: Tensor) -> GapCodes:
    """The matrix in the codes that take the fewest bytes, on its device.

    Both zeros count as 0, which no sum is changed by; NaN is kept.

    Args:
        matrix: (rows, cols) of a dtype in `KINDS`; cols a multiple of 8.
    """
    rows, cols = matrix.shape
    row, column = matrix.nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    gap = torch.where(first, column, column - column.roll(1) - 1)
    sizes = {bits: (len(gap) + int((gap >> bits).sum())) * (matrix.itemsize + bits / 8) for bits in BITS}
    bits = min(sizes, key=sizes.__getitem__)
    widest = (1 << bits) - 1

    entries = (gap >> bits) + 1  # those that cross a gap, and the kept one
    per_row = entries.new_zeros(rows).index_add_(0, row, entries)
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=matrix.device)
    starts[1:] = ((per_row + GROUP - 1) // GROUP).cumsum(0)
    groups = int(starts[-1])
    place = entries.cumsum(0) - 1 + (starts[:-1] * GROUP - per_row.cumsum(0) + per_row)[row]
    values = torch.zeros(groups * GROUP, dtype=matrix.dtype, device=matrix.device)
    values[place] = matrix[row, column]
    codes = torch.full((groups * GROUP,), widest, dtype=torch.uint8, device=matrix.device)
    codes[place] = (gap & widest).to(torch.uint8)
    filling = starts[1:, None] * GROUP - 1 - torch.arange(GROUP - 1, device=matrix.device)
    codes[filling[filling >= (starts[:-1] * GROUP + per_row)[:, None]]] = 0

    packed = torch.zeros(groups, dtype=torch.int64, device=matrix.device)
    for entry in range(GROUP):
        packed |= codes[entry::GROUP].long() << (bits * entry)
    stored = torch.zeros(groups * bits + _BEYOND, dtype=torch.uint8, device=matrix.device)
    stored[: groups * bits] = packed.view(torch.uint8).view(groups, 8)[:, :bits].reshape(-1)
    coded = GapCodes(values, stored, starts.int(), bits, cols)
    if matrix.is_cuda:  # a product may read weights before it waits for the kernels before it
        torch.cuda.synchronize(matrix.device)
    return coded


def stack(parts: Sequence[GapCodes]) -> GapCodes:
    """The matrix of these, one below the other.

    Args:
        parts: of equal width, bits and dtype.
    """
    first, sizes = parts[0], [len(part.values) // GROUP for part in parts]
    if any((part.cols, part.bits, part.values.dtype) != (first.cols, first.bits, first.values.dtype) for part in parts):
        raise ValueError("matrices in one stack want equal widths, bits and dtypes")
    begin = 0
    starts = [first.starts[:1]]
    for part, size in zip(parts, sizes, strict=True):
        starts.append(part.starts[1:] + begin)
        begin += size
    ends = [part.codes[: size * part.bits] for part, size in zip(parts, sizes, strict=True)]
    codes = torch.cat([*ends, first.codes.new_zeros(_BEYOND)])
    stacked = GapCodes(torch.cat([part.values for part in parts]), codes, torch.cat(starts), first.bits, first.cols)
    if codes.is_cuda:  # as in encode
        torch.cuda.synchronize(codes.device)
    return stacked


def decode(coded: GapCodes) -> Tensor:
    """The dense matrix, -0 being 0; by the kernel where it runs, else by torch."""
    if usable(coded.values.device):
        return _unpacked(coded)
    rows, cols = coded.shape
    first, last = int(coded.starts[0]), int(coded.starts[-1])
    values = coded.values[first * GROUP : last * GROUP]
    packed = torch.zeros(last - first, 8, dtype=torch.uint8, device=values.device)
    packed[:, : coded.bits] = coded.codes[first * coded.bits : last * coded.bits].view(-1, coded.bits)
    shifts = coded.bits * torch.arange(GROUP, device=packed.device)
    # 8 · 8 bits fill a 64-bit word, whose sign the mask takes away.
    steps = ((packed.view(torch.int64) >> shifts) & ((1 << coded.bits) - 1)).flatten() + 1
    column = steps.cumsum(0)
    counts = coded.starts.diff().long() * GROUP
    row = torch.repeat_interleave(torch.arange(rows, device=packed.device), counts)
    begin = torch.cat([column.new_zeros(1), column])[(coded.starts[:-1].long() - first) * GROUP]
    column -= begin[row] + 1
    kept = values != 0
    dense = torch.zeros(rows, cols, dtype=values.dtype, device=packed.device)
    dense[row[kept], column[kept]] = values[kept]
    return dense


def product(x: Tensor, coded: GapCodes, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, summed in float32 at least.

    Args:
        x: (n, cols) in the matrix' dtype and on its device.
        coded: W, (rows, cols).
        bias: (rows,) in the same dtype, or None.

    Returns:
        (n, rows).

    Raises:
        TypeError: another dtype: the kernels read bits as they are.
    """
    given = [item.dtype for item in (x, bias) if item is not None]
    if any(dtype != coded.values.dtype for dtype in given):
        raise TypeError(f"a product with {coded.values.dtype} weights wants the same of its inputs, not {given}")
    if torch.compiler.is_compiling():
        return _product(x, coded.values, coded.codes, coded.starts, coded.bits, bias)
    return _multiplied(x, coded, bias)  # without the dispatcher, which takes longer than the kernel


def products(x: Tensor, coded: GapCodes, sizes: Sequence[int], bias: Tensor | None = None) -> Sequence[Tensor]:
    """`product` with each of the matrices of a stack; views of one result where a kernel made it.

    Args:
        x: (n, cols), as in `product`.
        coded: the stack.
        sizes: rows of the matrices.
        bias: (rows of all,) or None.

    Returns:
        (n, rows) of each.
    """
    if torch.compiler.is_compiling() or _is_few(x, coded) or x.dtype != coded.values.dtype:
        return product(x, coded, bias).split(list(sizes), 1)
    # One wide product would be no faster, and what follows would read its parts with gaps between their rows.
    parts = decode(coded).split(list(sizes))
    biases = [None] * len(parts) if bias is None else bias.split(list(sizes))
    return [linear(x, *pair) for pair in zip(parts, biases, strict=True)]


@torch.library.custom_op("alps_exp::gap_product", mutates_args=())
def _product(x: Tensor, values: Tensor, codes: Tensor, starts: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    return _multiplied(x, GapCodes(values, codes, starts, bits, x.shape[1]), bias)


@_product.register_fake
def _(x: Tensor, values: Tensor, codes: Tensor, starts: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(starts) - 1)


def _multiplied(x: Tensor, coded: GapCodes, bias: Tensor | None) -> Tensor:
    if not _is_few(x, coded):
        return linear(x, decode(coded), bias)
    x = x.contiguous()
    return _few(x if x.data_ptr() % 16 == 0 else x.clone(), coded, bias)  # it is read 16 bytes at a time


def _is_few(x: Tensor, coded: GapCodes) -> bool:
    """Whether the kernel multiplies so many rows of activations, and runs."""
    if len(x) > FEW_ROWS[coded.bits] or not usable(x.device):
        return False
    return x.shape[1] * x.element_size() <= _shared(x.device) - 1024


def _few(x: Tensor, coded: GapCodes, bias: Tensor | None) -> Tensor:
    """The product by the kernel, which takes 1, 2, 4 or 8 rows of activations at a time, as shared memory allows."""
    rows, cols = coded.shape
    result = x.new_empty(len(x), rows)
    most = min(8, 2 ** int(math.log2(_shared(x.device) / ((cols + GROUP) * x.element_size()))))
    pairs = [(x, result)] if len(x) <= most else zip(x.split(most), result.split(most), strict=True)
    for part, into in pairs:
        batch = 1 << (len(part) - 1).bit_length()
        threads = _RESIDENT if batch == 8 else _THREADS  # eight rows leave shared memory for one block
        kernel = _kernel("product", x.device, x.dtype, coded.bits, batch, threads)
        shared = (cols + GROUP) * batch * x.element_size()
        arguments = [coded.values, coded.codes, coded.starts, part, bias, into, rows, cols, len(part)]
        blocks = min(-(-rows * 32 // threads), _processors(x.device) * _RESIDENT // threads)
        kernel(blocks, threads, arguments, shared, early=_early(x.device))
    return result


def _unpacked(coded: GapCodes) -> Tensor:
    rows, cols = coded.shape
    dense = torch.empty(rows, cols, dtype=coded.values.dtype, device=coded.values.device)
    kernel = _kernel("unpack", dense.device, dense.dtype, coded.bits, 1, _THREADS)
    arguments = [coded.values, coded.codes, coded.starts, dense, rows, cols]
    kernel(-(-rows * 32 // _THREADS), _THREADS, arguments, _THREADS // 32 * _SPAN)
    return dense


@cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run on the device; a warning says why not where they should."""
    if device.type != "cuda":
        return False
    try:
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("they need an NVIDIA card of compute capability 8.0 or more")
        ones = torch.eye(8, dtype=torch.float16, device=device)
        coded = encode(ones)
        if not all(torch.equal(_few(x, coded, None), x) for x in (ones[:1], ones)):  # both sizes of blocks
            raise RuntimeError("they give wrong products")
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"packed weights are unpacked for each product, since kernels do not run ({first_line(error)})",
            stacklevel=2,
        )
        return False
    return True


@cache
def _kernel(name: str, device: torch.device, dtype: torch.dtype, bits: int, batch: int, threads: int) -> Kernel:
    defines = {
        "W": bits,
        "B": batch,
        "KIND": KINDS[dtype],
        "THREADS": threads,
        "BLOCKS": _RESIDENT // threads,  # more would leave each thread too few registers
        "P": _AHEAD,
        "PDL": int(_early(device)),
    }
    source = (Path(__file__).parent / "gap_codes.cu").read_text(encoding="utf-8")
    return Kernel(source, name, defines, device, _shared(device))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a block may take."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def _early(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it ends."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
