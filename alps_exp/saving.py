"""The pruned model as a `transformers` folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from .blocks import BlockModel
from .checkpoint import INDEX, SINGLE, tied_names
from .errors import UserError
from .packed import pack_folder, packed_size
from .progress_store import ProgressStore, write_tensors
from .record import LayerRow, RunRecord


def save(model: BlockModel, tokenizer, record: RunRecord, directory: Path, store: ProgressStore | None = None) -> Path:
    """Write the pruned model as a `transformers` folder (model, tokenizer, record) at `directory`/model.

    With save=packed, the weights are in the form of `packed`, and the record says how much smaller that is. The folder
    appears whole or not at all; an earlier one is replaced. That of a streamed model is made of the store's shards,
    without a copy of them.

    Raises:
        UserError: not enough space.
    """
    target = directory / "model"
    packed = record.config["save"] == "packed"
    size, free = _size(model, store, record.layers if packed else None), shutil.disk_usage(directory).free
    if size > free:
        raise UserError(f"saving needs {size / 1e9:.1f} GB in {directory}, {free / 1e9:.1f} GB are free: make space")
    temporary = Path(tempfile.mkdtemp(prefix=".model-", dir=directory))
    try:
        if model.source is None:
            model.model.save_pretrained(temporary)
        else:
            _assemble(model, store, temporary)
        if packed:
            record.saved = pack_folder(temporary)
        tokenizer.save_pretrained(temporary)
        dataclasses.replace(record, status="complete").write(temporary)
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _size(model: BlockModel, store: ProgressStore | None, packed: Sequence[LayerRow] | None) -> float:
    """Bytes to write: of a streamed model the blocks are on the disk already; what is packed is there dense first.

    Args:
        packed: the pruned layers, where they are to be packed.
    """
    size = model.size
    if model.source is not None and store is not None:
        size -= sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    if packed is not None:
        item = model.model.dtype.itemsize
        less = sum(math.prod(row.shape) * item - packed_size(row.shape, row.sparsity, item) for row in packed)
        size += model.size - less
    return size


def _assemble(model: BlockModel, store: ProgressStore | None, folder: Path) -> None:
    """A sharded checkpoint: one file with what lies outside the blocks, and one per block."""
    network, total = model.model, len(model) + 1
    again = {name for names in tied_names(network) for name in names[1:]}
    outside = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith(f"{model.prefix}.") and name not in again
    }
    network.save_pretrained(folder, state_dict=outside)
    files = [folder / f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    (folder / SINGLE).replace(files[0])
    for index, file in enumerate(files[1:]):
        if store is not None and store.shard(index).is_file():
            _link(store.shard(index), file)
        else:
            tensors = model.source.take(index)
            write_tensors(file, {f"{model.name(index)}.{name}": tensor for name, tensor in tensors.items()})
    places, size = {}, 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file.name)
        size += file.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
