"""`.bin` checkpoints (pickles, as older hub repositories hold) as safetensors, converted once.

They are read with `weights_only`, so nothing in them is executed, and memory-mapped, so that a checkpoint larger than
the machine's memory is converted too. The copies are kept in the hub's cache of assets, as those of GGUF files are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..base.errors import UserError
from ..base.files import sha256, write_json
from .checkpoint import BIN_INDEX, INDEX, Entry, fingerprint, has_bin, weight_files
from .gguf_files import made_once
from .hub import first_line

# Part of the folder's name: raise it whenever `_convert` writes something else than before.
_CONVERSION = 1
_SHARD_BYTES = 2 << 30
_NOT_COPIED = (".bin", ".h5", ".msgpack", ".pt", ".pth", ".ot")


def safetensors_folder(folder: Path) -> Path:
    """The folder itself if its weights are safetensors, otherwise that of the converted copy of its `.bin` files.

    Raises:
        UserError: no weights, files that cannot be read without executing them, or a cache that cannot be written.
    """
    if not has_bin(folder):
        return folder
    from huggingface_hub import cached_assets_path

    name = f"{folder.resolve().name}-{sha256(json.dumps(fingerprint(folder), sort_keys=True))[:16]}-{_CONVERSION}"
    try:
        cache = cached_assets_path("alps_exp", namespace="bin", subfolder="converted")
        target = cache / name
        made_once(target, lambda scratch: _convert(folder, scratch))
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot convert the .bin files of {folder} ({first_line(error)}): make room, or set HF_ASSETS_CACHE to a "
            "writable folder"
        ) from None
    return target


def bin_entries(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder's `.bin` files by key, without reading their values where the file is a zip archive.

    Raises:
        UserError: files that are damaged, that hold more than tensors, or that hold different tensors of one key.
    """
    entries: dict[str, Entry] = {}
    for file in weight_files(folder)[1]:
        found = {key: Entry.of(file, tensor) for key, tensor in _load(file, "meta").items()}
        _refuse_differing(entries, found, folder)
        entries |= found
    return entries


def _refuse_differing(known: dict[str, Entry], found: dict[str, Entry], folder: Path) -> None:
    """A key in two files: transformers takes the later one's tensor, whatever the index says."""
    for key in sorted(set(known) & set(found)):
        former, later = known[key].file, found[key].file
        if not torch.equal(_load(former)[key], _load(later)[key]):
            raise UserError(
                f"{former.name} and {later.name} in {folder} hold different {key}: files of several checkpoints lie "
                "there; copy or download one into a folder of its own"
            )


def _convert(folder: Path, target: Path) -> None:
    """Write the weights to `target` in shards of bounded size, with everything else that is small beside them."""
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        if shard:
            number += 1
            name = f"model-{number:05d}.safetensors"
            save_file(shard, target / name, metadata={"format": "pt"})
            places.update(dict.fromkeys(shard, name))
            shard.clear()

    bin_entries(folder)
    for file in weight_files(folder)[1]:
        for key, tensor in _load(file).items():
            if key in places or key in shard:
                continue
            if sum(t.nbytes for t in shard.values()) + tensor.nbytes > _SHARD_BYTES:
                flush()
            # A copy: tied weights share their storage, which safetensors refuses.
            shard[key] = tensor.detach().clone().contiguous()
        flush()
    write_json(target / INDEX, {"metadata": {}, "weight_map": places})
    for other in folder.iterdir():
        if other.is_file() and other.suffix not in _NOT_COPIED and other.name != BIN_INDEX:
            shutil.copyfile(other, target / other.name)


def _load(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file by key, mapped into memory, or on the meta device their shapes alone."""
    try:
        try:
            loaded = torch.load(file, map_location=device, weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files older than torch 1.6 are not zip archives and cannot be mapped
                raise
            loaded = torch.load(file, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever torch's reader stumbles on
        why = first_line(error).partition(". ")[0]  # next comes advice to run the code in the file
        raise UserError(
            f"{file} is truncated, damaged, or holds more than weights ({why}): copy or download it again"
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file} holds a {type(loaded).__name__} and no weights by name: give another checkpoint")
    return {key: tensor for key, tensor in loaded.items() if isinstance(tensor, Tensor)}
