"""Checkpoints in safetensors files, opened without reading their weights; `.bin` files are converted once.

Where a checkpoint's keys are not the model's names (prefixes left out or put in, renamed modules), transformers' own
table of renamings is used, so a checkpoint that it loads is read here alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import UserError
from .hub import first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint: the file it lies in, its shape and dtype (safetensors' name of it)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder's safetensors files by key.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the files that it names.

    Raises:
        UserError: neither is there, a file is missing, truncated or damaged (it is named), a key is not where the
            index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        wanted = indexed_files(folder, INDEX, SINGLE)
        for file, keys in wanted.items():
            entries = _entries(file)
            absent = sorted((keys or set()) - set(entries))
            if absent:
                raise UserError(f"{file} lacks {absent[0]}, which {INDEX} puts there; copy or download it again")
            self.entries |= {key: entry for key, entry in entries.items() if keys is None or key in keys}

    def read(self, wanted: Mapping[str, torch.dtype | None], pin: bool = False) -> dict[str, Tensor]:
        """Copies of tensors in host memory by key.

        Each file is mapped only while it is read, so that its pages do not stay with the process.

        Args:
            wanted: key → dtype to read it as, None for its own.
            pin: into page-locked memory, from which copies to a CUDA device run beside its work.

        Raises:
            UserError: a file cannot be read any more, or holds a dtype that is not supported.
        """
        tensors = {}
        by_file: dict[Path, list[str]] = {}
        for key in wanted:
            by_file.setdefault(self.entries[key].file, []).append(key)
        for file, keys in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in keys:
                        entry = self.entries[key]
                        if entry.dtype not in _DTYPES:
                            raise UserError(f"{file} stores {key} as {entry.dtype}: give an unquantised checkpoint")
                        dtype = wanted[key] or _DTYPES[entry.dtype]
                        tensors[key] = torch.empty(entry.shape, dtype=dtype, pin_memory=pin)
                        tensors[key].copy_(opened.get_tensor(key))
            except (OSError, SafetensorError) as error:
                raise UserError(_damaged(file, error)) from None
        return tensors

    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor, which transformers takes for the checkpoint's."""
        for entry in self.entries.values():
            if (dtype := _DTYPES.get(entry.dtype)) is not None and dtype.is_floating_point:
                return dtype
        return torch.float32


def indexed_files(folder: Path, index: str, single: str) -> dict[Path, set[str] | None]:
    """The checkpoint's files, each with the keys that the index puts into it (None without an index).

    Raises:
        UserError: no checkpoint, an index that cannot be read, or a file that it names and that is not there.
    """
    listing = folder / index
    if not listing.is_file():
        if not (folder / single).is_file():
            raise UserError(f"{folder} has neither {single} nor {index}: copy or download the checkpoint again")
        return {folder / single: None}
    try:
        places = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str] | None] = {}
        for key, name in places.items():
            if Path(name).name != name:
                raise ValueError(f"it names a file outside the folder, {name}")
            files.setdefault(folder / name, set()).add(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{listing} cannot be read ({first_line(error)}): copy or download it again") from None
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{folder} lacks {missing[0]}{more}, which {index} names: copy or download the checkpoint again"
        )
    return files


def _entries(file: Path) -> dict[str, Entry]:
    """The header of one file; safetensors checks that the offsets cover the file exactly."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
            return {key: Entry(file, tuple(s.get_shape()), str(s.get_dtype())) for key, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(_damaged(file, error)) from None


def _damaged(file: Path, error: Exception) -> str:
    reason = first_line(error).removeprefix("Error while deserializing header: ")
    return f"{file} is truncated or damaged ({reason}): copy or download it again"


def check_folder(folder: Path) -> None:
    """Refuse a local checkpoint whose files are missing, truncated or damaged, from headers and sizes alone."""
    if has_safetensors(folder):
        Checkpoint(folder)
    elif has_bin(folder):
        indexed_files(folder, BIN_INDEX, BIN_SINGLE)


def has_safetensors(folder: Path) -> bool:
    """Whether the folder holds weights in safetensors files."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def has_bin(folder: Path) -> bool:
    """Whether the folder holds weights in `.bin` files, which are pickles."""
    return (folder / BIN_INDEX).is_file() or (folder / BIN_SINGLE).is_file()


def fingerprint(folder: Path) -> dict[str, str]:
    """What tells one checkpoint from another without reading it all: per file a hash of its size and of samples.

    A safetensors file's header, with every name, shape and offset, is read whole; pieces from all over the weights tell
    a model from one that was trained or pruned on.
    """
    names = [folder / "config.json"]
    if has_safetensors(folder):
        names += sorted(indexed_files(folder, INDEX, SINGLE))
    elif has_bin(folder):
        names += sorted(indexed_files(folder, BIN_INDEX, BIN_SINGLE))
    names += sorted(folder.glob("packed*"))
    return {file.name: _digest(file) for file in names if file.is_file()}


def _digest(file: Path, pieces: int = 256, length: int = 1 << 14) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else 0
        digest.update(stream.read(min(header, size)))
        for piece in range(pieces):
            stream.seek(max(size - length, 0) * piece // (pieces - 1))
            digest.update(stream.read(length))
    return digest.hexdigest()[:16]


def model_keys(network: nn.Module, checkpoint: Checkpoint, what: str) -> dict[str, str]:
    """For every tensor of the model's state dict the checkpoint's key; tied weights may share one.

    Weights that the model ties but of which the checkpoint has different copies are untied, as transformers does.

    Args:
        network: a skeleton.
        checkpoint: its weights.
        what: how to speak of the checkpoint.

    Raises:
        UserError: weights are missing or have other shapes, or are converted and not only renamed by transformers.
    """
    targets = network.state_dict()
    keys: dict[str, str] = {}
    renamed = _renamer(network, targets)
    for key in checkpoint.entries:
        name, converted = renamed(key)
        if name in targets and converted:
            raise UserError(f"{what} stores {key} in a layout that transformers converts: load it whole, stream=false")
        if name in targets:
            keys.setdefault(name, key)
    for names in tied_names(network):
        present = [name for name in names if name in keys]
        same = [name for name in present if _same(checkpoint, keys[name], keys[present[0]])]
        for name in set(present) - set(same):
            _untie(network, name)
        keys |= {name: keys[same[0]] for name in names if same and (name in same or name not in present)}
    missing = sorted(set(targets) - set(keys))
    other = sorted(n for n, k in keys.items() if checkpoint.entries[k].shape != tuple(targets[n].shape))
    for names, problem in ((missing, "lacks the weights"), (other, "has other shapes for")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{what} {problem} {', '.join(names[:3])}{more} of {type(network).__name__}; copy or download the "
                "checkpoint again"
            )
    return keys


def _renamer(network: nn.Module, targets: Mapping[str, Tensor]) -> Callable[[str], tuple[str, bool]]:
    """A function from a checkpoint's key to the model's name for it and whether the tensor would be converted too."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(network)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    prefix = network.base_model_prefix

    def renamed(key: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if name not in targets and key in targets:
            name, pattern = rename_source_key(key, [], [], prefix, targets)
        return name, pattern is not None

    return renamed


def tied_names(network: nn.Module) -> list[list[str]]:
    """Groups of names under which one parameter appears."""
    groups: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if one == other or checkpoint.entries[one].shape != checkpoint.entries[other].shape:
        return one == other
    return torch.equal(*checkpoint.read({one: None, other: None}).values())


def _untie(network: nn.Module, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    module = network.get_submodule(owner)
    former = module._parameters[attribute]
    module._parameters[attribute] = nn.Parameter(torch.empty_like(former), requires_grad=False)
    getattr(network, "all_tied_weights_keys", {}).pop(name, None)


def assign(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of the model's parameters and buffers; the names of a tied weight get one parameter."""
    known: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = network.get_submodule(owner)
        if attribute in module._parameters:
            if id(tensor) not in known:
                known[id(tensor)] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[attribute] = known[id(tensor)]
        else:
            module._buffers[attribute] = tensor
