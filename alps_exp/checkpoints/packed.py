"""Pruned weights in less space: which weights are kept, one bit each, and their values.

A packed folder is a `transformers` folder (config.json, tokenizer) whose weights lie in `packed-….safetensors` instead
of `model….safetensors`, described by `packed.json`:

    {"format": "alps_exp.checkpoints.packed", "version": 2, "files": ["packed-00001-of-00001.safetensors"],
     "tensors": {NAME: {"shape": [out, in], "dtype": "bfloat16", "scheme": "bitmask"}}}

A tensor NAME is stored by its scheme. Entries are counted in row-major order of the tensor as the checkpoint holds it.

    bitmask   NAME.mask (⌈size / 8⌉,) uint8: bit k mod 8 of byte k div 8, from the lowest, says whether entry k is kept;
              NAME.values (kept,): the kept entries in order
    2:4       NAME.values (size / 2,): two entries of every four consecutive ones, in order;
              NAME.indices (⌈size / 8⌉,) uint8: four places of 2 bits a byte, from the lowest, for two groups of four
    blocks    NAME.groups, uint8: which tiles of `rows` × `columns` hold something (`grouping.py`); what is stored of
              these, (tiles, rows · columns), by the scheme `inner`: dense (NAME.values as they are), bitmask or 2:4.
              Whole outputs and inputs are tiles; so are the outer groups of hierarchical patterns
    shared    NAME.groups, uint8: which four of `columns` inputs are used by `rows` outputs; what is stored of these,
              (out, 4 · in / columns), by the scheme `inner`: V:N:M
    (none)    tensors that are not listed (embeddings, norms, biases, weights with few zeros) are stored as they are

Kept is whatever is not +0: -0 and NaN come back bit for bit. In "2:4", a group with fewer than two such entries is
filled up with zeros. Both take one bit per weight beside the values; "2:4" has the regular values that sparse
matrix units want. A general N:M layer is stored as a bitmask. Of all schemes the smallest is taken. Without tensors in
"blocks" or "shared", the version is 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..base.errors import UserError
from ..base.files import read_json, write_json
from .checkpoint import PACKED as FILE
from .checkpoint import Entry, has_bin, has_weights, weight_files
from .grouping import LAYOUTS, layout_of

_FORMAT, _VERSIONS = "alps_exp.checkpoints.packed", (1, 2)
_PARTS = ("values", "mask", "indices", "groups")
_DTYPES = {"float64": torch.int64, "float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}
_DTYPE_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# More weights kept than this share of a 2:4 layer's: below it (1:4 is also 2:4) filled groups would cost too much.
_FULL_GROUPS = 0.75
# Outputs that show how a whole matrix is stored: the tallest blocks are looked for in as many.
_SEVERAL = 128


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every byte of a mask, two groups of four bits: does it fit 2:4, filled up to two a group, and its indices."""
    fits, filled, indices = np.zeros(16, bool), np.zeros(16, np.uint8), np.zeros(16, np.uint8)
    for first, second in reversed(list(combinations(range(4), 2))):
        full = 1 << first | 1 << second
        for nibble in (0, 1 << first, 1 << second, full):
            # Going through the pairs backwards, the last that can hold the nibble is the first in order.
            fits[nibble], filled[nibble] = True, full
        indices[full] = first | second << 2
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    return fits[low] & fits[high], filled[low] | filled[high] << 4, indices[low] | indices[high] << 4


_FITS, _FILLED, _INDICES = _tables()
_IS_FILLED = _FITS & (np.arange(256) == _FILLED)
_FROM_INDICES = np.zeros(256, np.uint8)  # no mask has 0 bits in both groups: 0 stands for indices that are none
_FROM_INDICES[_INDICES[_IS_FILLED]] = np.arange(256, dtype=np.uint8)[_IS_FILLED]


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Tensors by name, for example one shard or one block, in packed form.

    Args:
        tensors: of any shape, dtype and device.

    Returns:
        What to store, by name, on the CPU, and the entries of packed.json for the tensors that got smaller.
    """
    stored, entries = {}, {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        mask = None
        if tensor.ndim >= 2 and dtype in _DTYPES:
            flat = tensor.view(-1)
            mask = (flat.view(_DTYPES[dtype]) != 0).numpy()
        kept = 0 if mask is None else int(np.count_nonzero(mask))
        if mask is None or kept * tensor.itemsize + len(mask) / 8 >= tensor.nbytes:
            stored[name] = tensor
            continue
        entry = {"shape": list(tensor.shape), "dtype": dtype}
        layout = layout_of(mask.reshape(-1, tensor.shape[-1]), tensor.itemsize)
        if layout is None:
            entry["scheme"], parts = _pack_flat(flat, mask, tensor.shape[-1])
        else:
            core = layout.core(flat.view(-1, tensor.shape[-1]))
            inner, parts = "dense", {"values": core.reshape(-1)}
            if kept * tensor.itemsize + core.numel() / 8 < core.nbytes:
                held = (parts["values"].view(_DTYPES[dtype]) != 0).numpy()
                inner, parts = _pack_flat(parts["values"], held, core.shape[1])
            parts["groups"] = torch.from_numpy(layout.stated)
            entry |= {"scheme": layout.scheme, "inner": inner, **layout.fields}
        stored |= {f"{name}.{part}": content for part, content in parts.items()}
        entries[name] = entry
    return stored, entries


def _pack_flat(flat: Tensor, mask: np.ndarray, width: int) -> tuple[str, dict[str, Tensor]]:
    """Scheme and parts of a matrix of this width, given row by row, with what is kept of it."""
    bits, kept = np.packbits(mask, bitorder="little"), int(np.count_nonzero(mask))
    if width % 4 == 0 and kept > _FULL_GROUPS * len(mask) / 2 and _FITS[bits].all():
        bits = _FILLED[bits]
        values = flat[torch.from_numpy(_unpacked_bits(bits, len(mask)))]
        return "2:4", {"values": values, "indices": torch.from_numpy(_INDICES[bits])}
    return "bitmask", {"values": flat[torch.from_numpy(mask)], "mask": torch.from_numpy(bits)}


def packed_size(shape: Sequence[int], sparsity: float, itemsize: int) -> float:
    """Bytes that `pack` makes at most of a weight with this fraction of zeros, names and header left out."""
    entries = math.prod(shape)
    return min(entries * itemsize, entries * ((1 - sparsity) * itemsize + 1 / 8))


def stored_size(tensor: Tensor) -> int:
    """Bytes that `pack` makes of a weight, names and header left out.

    Where the first outputs are best stored as a bitmask, and no output or input is without weights, so are the others
    taken to be: then nothing is packed to know it.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.ndim < 2 or dtype not in _DTYPES or not tensor.numel():
        return tensor.nbytes
    matrix = tensor.detach().reshape(-1, tensor.shape[-1])
    held = matrix.view(_DTYPES[dtype]) != 0
    flat = int(held.sum()) * tensor.itemsize + -(-tensor.numel() // 8)
    if flat < tensor.nbytes:
        some = pack({"": matrix[:_SEVERAL]})[1]
        plain = all(entry["scheme"] == "bitmask" for entry in some.values())
        if not plain or not bool(held.any(0).all() & held.any(1).all()):
            return sum(part.nbytes for part in pack({"": matrix})[0].values())
    return min(flat, tensor.nbytes)


def unpack(stored: Mapping[str, Tensor], entries: Mapping[str, Mapping]) -> dict[str, Tensor]:
    """The tensors that `pack` was given, bit for bit, as far as `stored` holds them.

    Raises:
        UserError: parts of a tensor are missing or do not fit its entry.
    """
    return dict(_unpack(stored, entries))


def _unpack(stored: Mapping[str, Tensor], entries: Mapping[str, Mapping]) -> Iterator[tuple[str, Tensor]]:
    parts = {f"{name}.{part}" for name in entries for part in _PARTS}
    for name in stored:
        if name not in parts:
            yield name, stored[name]
    for name, entry in entries.items():
        if f"{name}.values" in stored:
            yield name, _unpacked(name, entry, stored)


class _Stored(Mapping):
    """The tensors of an open file, each read when it is asked for."""

    def __init__(self, opened) -> None:
        self._opened, self._names = opened, set(opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _unpacked(name: str, entry: Mapping, stored: Mapping[str, Tensor]) -> Tensor:
    shape, scheme = entry["shape"], entry["scheme"]
    if scheme in LAYOUTS and min(shape) > 0:
        whole, groups = (math.prod(shape[:-1]), shape[-1]), stored.get(f"{name}.groups")
        fits = groups is not None and groups.dtype == torch.uint8 and entry["inner"] in ("dense", "bitmask", "2:4")
        layout = LAYOUTS[scheme].read(whole, entry, groups.numpy()) if fits else None
        if layout is not None:
            inner = {"shape": layout.size(whole), "dtype": entry["dtype"], "scheme": entry["inner"]}
            tensor = torch.zeros(whole, dtype=getattr(torch, entry["dtype"]))
            layout.restore(_unpacked_flat(name, inner, stored), tensor)
            return tensor.view(shape)
    return _unpacked_flat(name, entry, stored)


def _unpacked_flat(name: str, entry: Mapping, stored: Mapping[str, Tensor]) -> Tensor:
    values, shape, scheme = stored[f"{name}.values"], entry["shape"], entry["scheme"]
    size = math.prod(shape)
    if scheme == "dense" and values.shape == (size,) and str(values.dtype) == f"torch.{entry['dtype']}":
        return values.view(shape)
    bits = stored.get(f"{name}.{'indices' if scheme == '2:4' else 'mask'}")
    fits = scheme in ("2:4", "bitmask") and bits is not None and bits.dtype == torch.uint8 and min(shape) > 0
    fits = fits and bits.shape == (-(-size // 8),) and str(values.dtype) == f"torch.{entry['dtype']}"
    if fits:
        raw = bits.numpy()
        if scheme == "2:4":
            raw = _FROM_INDICES[raw]
            fits = bool(raw.all())
        mask = _unpacked_bits(raw, size)
        fits = fits and values.shape == (np.count_nonzero(mask),)
    if not fits:
        raise UserError(f"{name} is damaged: its parts do not fit its entry in {FILE}; copy or save the model again")
    tensor = torch.zeros(size, dtype=values.dtype)
    return tensor.masked_scatter_(torch.from_numpy(mask), values).view(shape)


def _unpacked_bits(bits: np.ndarray, size: int) -> np.ndarray:
    return np.unpackbits(bits, count=size, bitorder="little").view(bool)


def pack_folder(folder: Path) -> dict:
    """Turn the dense safetensors files of a `transformers` folder into packed ones, shard by shard.

    The dense files go once everything is written: until packed.json is there, the folder is the dense one, also after
    an interruption. For that long the disk holds both.

    Args:
        folder: with `model.safetensors`, or shards and their index.

    Returns:
        `format`, `dense_bytes` and `packed_bytes` of the weights' files, and their `ratio` (packed over dense).

    Raises:
        UserError: no dense safetensors files in the folder.
    """
    from safetensors.torch import load_file, save_file

    dense = sorted(weight_files(folder)[1]) if has_weights(folder) and not has_bin(folder) else []
    if not dense:
        raise UserError(f"{folder} has no model.safetensors to pack; give a folder that `save_pretrained` wrote")
    files, entries = [], {}
    for number, file in enumerate(dense, 1):
        stored, described = pack(load_file(file))
        files.append(f"packed-{number:05}-of-{len(dense):05}.safetensors")
        save_file(stored, folder / files[-1], metadata={"format": "pt"})
        entries |= described
    before, after = (sum(path.stat().st_size for path in paths) for paths in (dense, [folder / f for f in files]))
    version = 2 if any(entry["scheme"] in LAYOUTS for entry in entries.values()) else 1
    write_json(folder / FILE, {"format": _FORMAT, "version": version, "files": files, "tensors": entries})
    for path in [*dense, *folder.glob("model*.safetensors.index.json")]:
        path.unlink()
    return {"format": "packed", "dense_bytes": before, "packed_bytes": after, "ratio": after / before}


def is_packed(folder: Path) -> bool:
    """Whether the folder's weights are packed ones; any that transformers reads come first."""
    return (folder / FILE).is_file() and not has_weights(folder)


def pruned_names(folder: Path) -> list[str]:
    """Names of the tensors that a packed folder does not hold dense.

    Raises:
        UserError: packed.json is damaged or of another version.
    """
    return list(_description(folder)[1])


def packed_entries(folder: Path) -> dict[str, Entry]:
    """The tensors of a packed folder by name, of which nothing but names, shapes and dtypes is read.

    Raises:
        UserError: as `read_folder`, but for damage to the values.
    """
    from safetensors import SafetensorError, safe_open

    files, entries = _description(folder)
    parts = {f"{name}.{part}": name for name in entries for part in _PARTS}
    found = {}
    for file in (folder / name for name in files):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                    name = parts.get(key, key)
                    shape = entries[name]["shape"] if name in entries else opened.get_slice(key).get_shape()
                    dtype = entries[name]["dtype"] if name in entries else str(opened.get_slice(key).get_dtype())
                    found[name] = Entry(file, tuple(shape), _DTYPE_NAMES.get(dtype, dtype))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is missing or damaged ({error}); copy or save the model again") from None
    return found


def read_tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a packed folder, dense, on the CPU.

    Raises:
        UserError: as `read_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    file, entries = packed_entries(folder)[name].file, _description(folder)[1]
    try:
        with safe_open(file, framework="pt") as opened:
            stored = _Stored(opened)
            return _unpacked(name, entries[name], stored) if name in entries else stored[name]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged ({error}); copy or save the model again") from None


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a packed folder by name, dense, on the CPU.

    Raises:
        UserError: as `read_tensors`.
    """
    return dict(read_tensors(folder))


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a packed folder with their names, dense, on the CPU, one in memory at a time.

    Raises:
        UserError: packed.json is damaged or of another version, a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    files, entries = _description(folder)
    absent = set(entries)
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name, tensor in _unpack(_Stored(opened), entries):
                    absent.discard(name)
                    yield name, tensor
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file} is missing or damaged ({error}); copy or save the model again") from None
    if absent:
        raise UserError(f"{folder} lacks the tensor {min(absent)} that {FILE} names; copy or save the model again")


def _description(folder: Path) -> tuple[list[str], dict[str, dict]]:
    """Files and entries that packed.json names."""
    try:
        content = read_json(folder / FILE)
        if (found := (content["format"], content["version"]))[0] != _FORMAT or found[1] not in _VERSIONS:
            raise UserError(
                f"{folder / FILE} has format {found[0]!r}, version {found[1]!r}; this alps_exp reads {_FORMAT!r}, "
                f"versions {_VERSIONS[0]} and {_VERSIONS[1]}: update it, or save the model again"
            )
        if strange := {str(entry["dtype"]) for entry in content["tensors"].values()} - set(_DTYPES):
            raise ValueError(f"dtype {min(strange)}")
        files = [str(name) for name in content["files"]]
        entries = {
            str(name): {
                "shape": [int(n) for n in entry["shape"]],
                "dtype": str(entry["dtype"]),
                "scheme": str(entry["scheme"]),
                **({key: int(entry[key]) for key in ("rows", "columns")} if entry["scheme"] in LAYOUTS else {}),
                **({"inner": str(entry["inner"])} if entry["scheme"] in LAYOUTS else {}),
            }
            for name, entry in content["tensors"].items()
        }
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / FILE} is damaged ({type(error).__name__}); copy or save the model again") from None
    # Names from a file lead nowhere but into the folder.
    if strange := [name for name in files if not re.fullmatch(r"packed-\d+-of-\d+\.safetensors", name)]:
        raise UserError(f"{folder / FILE} names the file {strange[0]!r}, which is no part of a packed model")
    return files, entries
