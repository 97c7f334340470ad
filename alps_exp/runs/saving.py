"""The pruned model as a `transformers` folder, read back before it counts.

config.json and generation_config.json are the checkpoint's, but for what is no longer true of the weights. These are
in the checkpoint's dtype where that holds them exactly, otherwise in the dtype that they were pruned in.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from ..base.errors import UserError
from ..base.files import replacing, write_json
from ..base.memory import free_host
from ..base.redaction import without_paths
from ..checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, Entry, listed, match, tied_names
from ..checkpoints.hub import first_line
from ..checkpoints.packed import pack_folder, packed_entries, packed_size, read_tensors
from ..model import loading
from ..model.blocks import BlockModel
from ..pruning.rows import LayerRow
from ..pruning.store import ProgressStore, write_tensors
from .card import base_of, card
from .naming import command_of
from .record import FILE, RunRecord
from .settings import Settings
from .shrinking import ShrunkModel


def save(
    model: BlockModel,
    tokenizer,
    settings: Settings,
    record: RunRecord,
    directory: Path,
    store: ProgressStore | None = None,
) -> Path:
    """Write the pruned model as a `transformers` folder (model, tokenizer, record) at `directory`/model.

    With save=packed, the weights are in the form of `packed`, and the record says how much smaller that is; with
    save=shrunk, the channels and heads that left are not there. The folder
    appears whole or not at all, once what it holds was compared with the model; an earlier one is replaced. That of a
    streamed model is made of the store's shards, without a copy of them where the dtype is the same.

    Raises:
        UserError: not enough space.
        RuntimeError: what was written is not the model.
    """
    target, packed = directory / "model", settings.save == "packed"
    if settings.save == "shrunk":
        before, model, store = model.size, ShrunkModel(model, settings.patterns), None
        record.saved = {"format": "shrunk", "dense_bytes": before, "shrunk_bytes": model.size}
    dtype = _saved_dtype(model) if settings.own_dtype else model.model.dtype
    if settings.own_dtype and dtype != (own := getattr(model.model, "own_dtype", dtype)):
        record.warnings.append(
            f"the model was saved in {_name(dtype)} although its checkpoint is in {_name(own)}: that cannot hold the "
            f"weights as they were solved and evaluated; dtype={_name(own)} prunes and saves in it"
        )
    size = _size(model, store, record.layers if packed else None, dtype)
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UserError(f"saving needs {size / 1e9:.1f} GB in {directory}, {free / 1e9:.1f} GB are free: make space")
    with replacing(target) as temporary:
        temporary.mkdir()
        with _stored_as(model, dtype):
            if model.source is None:
                model.model.save_pretrained(temporary)
            else:
                _assemble(model, store, temporary, dtype)
        _write_configurations(model.model, temporary, dtype)
        if packed:
            record.saved = pack_folder(temporary)
        tokenizer.save_pretrained(temporary)
        record.warnings += _verify(model, store, temporary, packed, settings.model.source.trust_remote_code)
        complete = dataclasses.replace(record, status="complete")
        if settings.push is None:
            complete.write(temporary)
        else:
            _describe(complete.to_dict(), settings, temporary)
    return target


def _describe(record: dict, settings: Settings, folder: Path) -> None:
    """Record and model card of what others will read: without paths of this machine."""
    base, licence = base_of(settings.configuration.content["model"], settings.model.source.path)
    write_json(folder / FILE, without_paths(record))
    (folder / "README.md").write_text(card(record, base, licence, command_of()), encoding="utf-8")


def rehearse(config, tokenizer, what: str) -> None:
    """Save what transformers may refuse to save, before hours of work depend on it.

    Args:
        config: the model's configuration, and
        tokenizer: its tokenizer.
        what: how to speak of the model.

    Raises:
        UserError: it is refused.
    """
    for part, name in ((config, "config.json"), (tokenizer, "tokenizer")):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                part.save_pretrained(scratch)
            except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
                raise UserError(
                    f"{name} of {what} can be loaded and not saved again ({first_line(error)}): mend it, or give "
                    "save=false"
                ) from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _saved_dtype(model: BlockModel) -> torch.dtype:
    """The checkpoint's dtype if it holds every weight exactly, as after a method that only takes weights away."""
    own, now = getattr(model.model, "own_dtype", model.model.dtype), model.model.dtype
    if own == now:
        return now

    def exact(tensors: Iterator[Tensor]) -> bool:
        return all(torch.equal(tensor.to(own).to(now), tensor) for tensor in tensors if tensor.dtype == now)

    outside = (tensor for tensor in model.model.parameters() if not tensor.is_meta)
    blocks = range(len(model)) if model.source is not None else ()
    return own if exact(outside) and all(exact(model.source.take(index).values()) for index in blocks) else now


@contextmanager
def _stored_as(model: BlockModel, dtype: torch.dtype) -> Iterator[None]:
    """Parameters in memory in the dtype to save them in, for the length of the context, one after the other.

    A generation configuration that transformers loads and refuses to save is put aside, too.
    """
    network, now, generation = model.model, model.model.dtype, getattr(model.model, "generation_config", None)
    changed = [p for p in network.parameters() if p.dtype == now != dtype and not p.is_meta]
    try:
        for parameter in changed:
            parameter.data = parameter.data.to(dtype)
        if generation is not None:
            network.generation_config = GenerationConfig()
        yield
    finally:
        if generation is not None:
            network.generation_config = generation
        for parameter in changed:
            parameter.data = parameter.data.to(now)


def _size(
    model: BlockModel, store: ProgressStore | None, packed: Sequence[LayerRow] | None, dtype: torch.dtype
) -> float:
    """Bytes to write: of a streamed model the blocks are on the disk already; what is packed is there dense first.

    Args:
        packed: the pruned layers, where they are to be packed.
        dtype: to save in.
    """
    item = dtype.itemsize
    size = whole = model.size * item / model.model.dtype.itemsize
    if model.source is not None and store is not None and dtype == model.model.dtype:
        size -= sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    if packed is not None:
        less = sum(math.prod(row.shape) * item - packed_size(row.shape, row.sparsity, item) for row in packed)
        size += whole - less
    return size


def _write_configurations(network, folder: Path, dtype: torch.dtype) -> None:
    """What running needs otherwise than the checkpoint's configuration says is put back."""
    config = copy.deepcopy(network.config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = _name(dtype)
    if (cache := getattr(network, "own_use_cache", None)) is not None:
        config.use_cache = cache
    else:
        vars(config).pop("use_cache", None)
    if loading.is_untied(network):
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if network.can_generate():
        # Not by save_pretrained, which refuses what checkpoints come with, such as a temperature without sampling.
        network.generation_config.to_json_file(folder / "generation_config.json")


def _assemble(model: BlockModel, store: ProgressStore | None, folder: Path, dtype: torch.dtype) -> None:
    """A sharded checkpoint: one file with what lies outside the blocks, and one per block."""
    network, total, now = model.model, len(model) + 1, next(model.blocks.parameters()).dtype
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
        if store is not None and store.shard(index).is_file() and dtype == now:
            _link(store.shard(index), file)
        else:
            tensors = model.source.take(index)
            tensors = {n: t.to(dtype) if t.dtype == now else t for n, t in tensors.items()}
            write_tensors(file, {f"{model.name(index)}.{name}": tensor for name, tensor in tensors.items()})
    places, size = {}, 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file.name)
        size += file.stat().st_size
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _verify(model: BlockModel, store: ProgressStore | None, folder: Path, packed: bool, own_code: bool) -> list[str]:
    """Read back what was written, a tensor at a time, and compare it with the model bit for bit.

    A streamed model's shards that the folder shares with the store are compared with their checksums.

    Returns:
        In words what could not be compared.

    Raises:
        RuntimeError: files are missing, or hold something else.
    """
    network = model.model
    entries = packed_entries(folder) if packed else Checkpoint(folder).entries
    found = match(network, entries)
    own = {key: name for name, key in found.keys.items()}
    if not own_code:  # its code would run once more
        _same_model(network, folder)
    if wrong := [*found.missing, *found.strays.values()]:
        raise _unlike(folder, wrong)
    shards = {} if store is None or packed or model.source is None else _shared_shards(model, store, entries)
    for index in set(shards.values()):
        if not store.intact(index):
            raise _unlike(folder, [model.name(index)])
    expected = _in_memory(model)
    rest = (key for key in entries if entries[key].file not in shards)
    read = read_tensors(folder) if packed else ((key, _read(entries[key].file, key)) for key in rest)
    for key, tensor in read:
        if key in own and not _same_bits(tensor, expected(own[key])):
            raise _unlike(folder, [key])
    return _reload(model, folder, set(network.state_dict()) - set(found.keys), own_code) if found.converted else []


def _unlike(folder: Path, names: Iterable[str]) -> RuntimeError:
    return RuntimeError(
        f"what was saved is not the pruned model ({listed(names)} in {folder.name}) and was removed: the same command "
        "saves it again"
    )


def _same_model(network, folder: Path) -> None:
    """The written configuration makes a model of the same tensors, tied alike."""
    again = loading.resolve({"name": "local", "path": str(folder)}).skeleton
    one, other = (({n: tuple(t.shape) for n, t in each.state_dict().items()}) for each in (network, again))
    if type(again) is not type(network) or one != other:
        raise _unlike(folder, ["config.json"])
    if (head := network.get_output_embeddings()) is not None:
        tied = head.weight is network.get_input_embeddings().weight
        if tied != (again.get_output_embeddings().weight is again.get_input_embeddings().weight):
            raise _unlike(folder, ["config.json"])


def _shared_shards(model: BlockModel, store: ProgressStore, entries: Mapping[str, Entry]) -> dict[Path, int]:
    """Files of the folder that are the store's own, by the block that they hold."""
    files = {entry.file for entry in entries.values()}
    inodes = {(s.st_dev, s.st_ino): file for file in files if (s := file.stat())}
    found = {}
    for index in range(len(model)):
        if (shard := store.shard(index)).is_file() and (place := (shard.stat().st_dev, shard.stat().st_ino)) in inodes:
            found[inodes[place]] = index
    return found


def _in_memory(model: BlockModel) -> Callable[[str], Tensor]:
    """A function from the name of a tensor to the tensor; of a streamed model, one block at a time is read."""
    state, prefix = model.model.state_dict(), f"{model.prefix}."
    block = lru_cache(maxsize=1)(lambda index: model.source.take(index))

    def tensor(name: str) -> Tensor:
        if model.source is None or not name.startswith(prefix):
            return state[name]
        index, _, local = name.removeprefix(prefix).partition(".")
        return block(int(index))[local]

    return tensor


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


def _same_bits(stored: Tensor, expected: Tensor) -> bool:
    one, other = (t.to("cpu", expected.dtype).contiguous().view(-1).view(torch.uint8) for t in (stored, expected))
    return stored.shape == expected.shape and torch.equal(one, other)


def _reload(model: BlockModel, folder: Path, names: set[str], own_code: bool) -> list[str]:
    """Compare tensors that transformers stores in another layout, by loading the folder beside the model."""
    if 1.2 * model.size > free_host():
        return [f"{len(names)} saved tensors were not compared with the model's, since memory does not hold both"]
    written = loading.resolve({"name": "local", "path": str(folder), "trust_remote_code": own_code})
    state, again = model.model.state_dict(), loading.load_model(written, model.model.dtype).state_dict()
    if wrong := [name for name in names if not _same_bits(again[name], state[name])]:
        raise _unlike(folder, wrong)
    return []
