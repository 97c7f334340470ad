"""What counts as a checkpoint: its files, its tensors without their values, and what tells it from another.

There is one rule for the files with weights, transformers' own: model.safetensors, else the files that
model.safetensors.index.json names, else pytorch_model.bin, else those of its index; and after them this project's
packed form. Loading whole, streaming, the checks and the fingerprint all go by `weight_files`.

Where a checkpoint's keys are not the model's names (prefixes left out or put in, renamed modules), transformers' own
table of renamings is used, so a checkpoint that it loads is read here alike.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..base.errors import UserError
from ..base.files import read_json
from .hub import first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
PACKED = "packed.json"
# Before any other comes the first of these that is there, as in transformers.
PRECEDENCE = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)

# Files beside the weights that decide about results: configurations, tokenizers of all kinds, model code.
_DECIDING = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.py"),
    *(
        "vocab*",
        "merges*",
        "*.model",
        "*.tiktoken",
        "*.spm",
        "*.bpe",
        "*.codes",
        "*.tokenizer",
        "dict.txt",
        "tekken.json",
    ),
    *("emoji.json", "byte_maps.json", "*_vocab.json", "*.jinja", "chat_template*", "additional_chat_templates/*"),
)

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


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint: the file it lies in, its shape and dtype (safetensors' name of it)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, file: Path, tensor: Tensor) -> Entry:
        """That of a tensor, which may be on the meta device."""
        dtype = _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        return cls(file, tuple(tensor.shape), dtype)


class Checkpoint:
    """The tensors of a folder's safetensors files by key.

    Args:
        folder: holds model.safetensors, or without it model.safetensors.index.json and the files that it names.

    Raises:
        UserError: neither is there, a file is missing, truncated or damaged (it is named), a key is not where the
            index says, or two files hold different tensors of one key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        listing, wanted = weight_files(folder)
        if listing.name not in (SINGLE, INDEX):
            raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: copy or download the checkpoint again")
        for file, keys in wanted.items():
            entries = _entries(file)
            absent = sorted(keys - set(entries))
            if absent:
                raise UserError(f"{file} lacks {absent[0]}, which {INDEX} puts there; copy or download it again")
            # As transformers: all that the files hold, and of a key in two of them the later one's.
            for key in sorted(set(entries) & set(self.entries)):
                former = self.entries[key].file
                if not torch.equal(_tensor(former, key), _tensor(file, key)):
                    raise UserError(
                        f"{former.name} and {file.name} in {folder} hold different {key}: files of several checkpoints "
                        "lie there; copy or download one into a folder of its own"
                    )
            self.entries |= entries

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


def first_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """The dtype of the first floating-point tensor, which transformers takes for the checkpoint's."""
    dtypes = (_DTYPES.get(entry.dtype) for entry in entries.values())
    return next((dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point), torch.float32)


def weight_files(folder: Path) -> tuple[Path, dict[Path, set[str]]]:
    """The file or the index that a checkpoint is read by, and its files, each with the keys that an index puts there.

    Raises:
        UserError: no weights, an index that cannot be read, or a file that it names and that is not there.
    """
    listing = next((folder / name for name in PRECEDENCE if (folder / name).is_file()), None)
    if listing is None:
        broken = next((name for name in PRECEDENCE if (folder / name).is_symlink()), None)
        state = f"{broken} is a link that leads nowhere" if broken else f"none of {', '.join(PRECEDENCE)} is there"
        raise UserError(f"{folder} holds no weights ({state}): copy or download the checkpoint again")
    if listing.name in (SINGLE, BIN_SINGLE):
        return listing, {listing: set()}
    try:
        places = read_json(listing)["weight_map"]
        files: dict[Path, set[str]] = {}
        for key, name in sorted(places.items(), key=lambda place: place[1]):
            if Path(name).name != name:
                raise ValueError(f"it names a file outside the folder, {name}")
            files.setdefault(folder / name, set()).add(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{listing} cannot be read ({first_line(error)}): copy or download it again") from None
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{folder} lacks {missing[0]}{more}, which {listing.name} names: copy or download the checkpoint again"
        )
    return listing, files


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights that transformers reads."""
    return any((folder / name).is_file() for name in PRECEDENCE)


def has_bin(folder: Path) -> bool:
    """Whether the weights that transformers reads of the folder lie in `.bin` files, which are pickles."""
    return has_weights(folder) and weight_files(folder)[0].name in (BIN_SINGLE, BIN_INDEX)


def _tensor(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


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


def deciding_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that decide about results, in order: weights, configurations, tokenizer, model code."""
    files = {file for pattern in _DECIDING for file in folder.glob(pattern)}
    if has_weights(folder):
        listing, weights = weight_files(folder)
        files |= {listing, *weights}
    elif (folder / PACKED).is_file():
        files |= set(folder.glob("packed*"))
    return sorted(file for file in files if file.is_file())


def fingerprint(folder: Path) -> dict[str, str]:
    """What tells one checkpoint from another without reading it all: per file a hash of its size and of samples.

    A safetensors file's header, with every name, shape and offset, is read whole; pieces from all over the weights tell
    a model from one that was trained or pruned on. Files of up to 4 MB are read whole.
    """
    return {file.relative_to(folder).as_posix(): _digest(file) for file in deciding_files(folder)}


def _digest(file: Path, pieces: int = 256, length: int = 1 << 14) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= pieces * length:
            return hashlib.sha256(stream.read()).hexdigest()[:16]
        header = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else 0
        digest.update(stream.read(min(header, size)))
        for piece in range(pieces):
            stream.seek(max(size - length, 0) * piece // (pieces - 1))
            digest.update(stream.read(length))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Merged:
    """A tensor of the model that transformers makes of several of the checkpoint's (fused experts).

    Attributes:
        parts: pattern of its converter → the keys that match it, in the order in which they are merged.
        converter: transformers' own, of operations that need nothing but the tensors.
    """

    parts: dict[str, list[str]]
    converter: object

    @property
    def keys(self) -> list[str]:
        """All of them."""
        return [key for keys in self.parts.values() for key in keys]

    def made(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The model's tensor.

        Args:
            tensors: by key.
        """
        found = {pattern: [tensors[key] for key in keys] for pattern, keys in self.parts.items()}
        own = {"source_patterns": self.converter.source_patterns, "target_patterns": self.converter.target_patterns}
        for operation in self.converter.operations:
            found = operation.convert(found, **own)
        (value,) = found.values()
        return value[0] if isinstance(value, list) else value


@dataclass(frozen=True)
class Match:
    """A checkpoint's keys beside a model's names for the same tensors.

    Attributes:
        keys: name in the model's state dict → the checkpoint's key, where they differ by name at most.
        converted: likewise, where transformers converts the tensor too (fused experts); one key of several.
        merged: name in the model's state dict → how such a tensor is made of all its keys, where that is known.
        strays: what the model would call the checkpoint's other tensors → key, without those that the model's class
            knows as harmless (rotary frequencies, masks, heads for other tasks).
        missing: names that have no key, neither under another name of a tied weight, in order.
    """

    keys: dict[str, str]
    converted: dict[str, str]
    strays: dict[str, str]
    missing: list[str]
    merged: dict[str, Merged]


def match(network: nn.Module, keys: Iterable[str]) -> Match:
    """Compare a model's names with a checkpoint's keys, as transformers' `from_pretrained` does.

    Args:
        network: a model or a skeleton.
        keys: of the checkpoint.
    """
    targets = network.state_dict()
    from transformers.core_model_loading import dot_natural_key

    found = Match({}, {}, {}, [], {})
    renamed = _renamer(network, targets)
    for key in sorted(keys, key=dot_natural_key):  # in the order in which transformers merges them
        name, pattern, converter = renamed(key)
        converted = pattern is not None
        (found.strays if name not in targets else found.converted if converted else found.keys).setdefault(name, key)
        if converted and name in targets and _is_plain(converter):
            found.merged.setdefault(name, Merged({}, converter)).parts.setdefault(pattern, []).append(key)
    present = {*found.keys, *found.converted}
    present |= {name for names in tied_names(network) for name in names if present & set(names)}
    info = SimpleNamespace(missing_keys=set(targets) - present, unexpected_keys=set(found.strays))
    network._adjust_missing_and_unexpected_keys(info)
    strays = {name: key for name, key in found.strays.items() if name in info.unexpected_keys}
    return Match(found.keys, found.converted, strays, sorted(info.missing_keys), found.merged)


def model_keys(network: nn.Module, checkpoint: Checkpoint, what: str) -> tuple[dict[str, str], dict[str, Merged]]:
    """For every tensor of the model's state dict the checkpoint's key, or how it is made of several; tied weights may
    share a key.

    Weights that the model ties but of which the checkpoint has different copies are untied, as transformers does.

    Args:
        network: a skeleton.
        checkpoint: its weights.
        what: how to speak of the checkpoint.

    Raises:
        UserError: weights are missing or have other shapes, or are converted in a way that is not known.
    """
    targets = network.state_dict()
    found = match(network, checkpoint.entries)
    for name, key in found.converted.items():
        if name not in found.merged:
            raise UserError(f"{what} stores {key} in a layout that transformers converts: load it whole, stream=false")
    merged = {name: own for name, own in found.merged.items() if name not in found.keys}
    keys = found.keys
    for names in tied_names(network):
        present = [name for name in names if name in keys]
        same = [name for name in present if _same(checkpoint, keys[name], keys[present[0]])]
        for name in set(present) - set(same):
            _untie(network, name)
        keys |= {name: keys[same[0]] for name in names if same and (name in same or name not in present)}
    refuse_names(what, network, "lacks the weights", set(targets) - set(keys) - set(merged))
    shapes = {name: checkpoint.entries[key].shape for name, key in keys.items()}
    shapes |= {name: _merged_shape(own, checkpoint) for name, own in merged.items()}
    refuse_names(what, network, "has other shapes for", (n for n in shapes if shapes[n] != tuple(targets[n].shape)))
    return keys, merged


def _merged_shape(merged: Merged, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """None where the parts do not go together."""
    parts = {key: torch.empty(checkpoint.entries[key].shape, device="meta") for key in merged.keys}
    try:
        return tuple(merged.made(parts).shape)
    except (RuntimeError, ValueError):
        return None


def _is_plain(converter) -> bool:
    """Whether a converter makes one tensor by stacking, concatenating and transposing."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    known = (Concatenate, MergeModulelist, Transpose)
    return len(converter.target_patterns) == 1 and all(type(op) in known for op in converter.operations)


def refuse_names(what: str, network: nn.Module, problem: str, names: Iterable[str]) -> None:
    """Refuse a checkpoint that has this problem with some of the model's tensors, unless there are none.

    Raises:
        UserError: there are.
    """
    if names := sorted(names):
        raise UserError(
            f"{what} {problem} {listed(names)} of {type(network).__name__}; copy or download the checkpoint again"
        )


def listed(names: Iterable[str]) -> str:
    """The first three names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# What old checkpoints hold beside weights and models make themselves: tables of positions and constants of masks.
_MADE = re.compile(r"rotary_emb\.|inv_freq$|position_ids$|masked_bias$|num_batches_tracked$")
_QUANTISED = re.compile(r"scale|zero|absmax|quant|packed|g_idx|SCB|lut", re.IGNORECASE)
_FLOATS = ("F64", "F32", "F16", "BF16")


def check_tensors(network: nn.Module, entries: Mapping[str, Entry], prefix: str, blocks: int, what: str) -> list[str]:
    """Whether these are a model's weights, from names, shapes and dtypes alone.

    Args:
        network: a skeleton.
        entries: the checkpoint's tensors by key.
        prefix: name of the model's list of blocks, and
        blocks: how many there are.
        what: how to speak of the checkpoint.

    Returns:
        In words what was left out that may matter; empty as a rule.

    Raises:
        UserError: quantised tensors in the place of weights, tensors of the model's own modules that its configuration
            does not ask for (a bias, a norm, scales), or missing ones.
    """
    found, targets = match(network, entries), network.state_dict()
    for name, key in {**found.keys, **found.converted}.items():
        if targets[name].is_floating_point() and entries[key].dtype not in _FLOATS:
            raise UserError(
                f"{what} stores {key} as {entries[key].dtype} and names no quantization_config: its weights are "
                "quantised and cannot be pruned; give the unquantised checkpoint"
            )
    block = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")

    def owned(name: str) -> bool:
        inside, module = block.match(name), name.rpartition(".")[0]
        if inside is not None:
            return int(inside[1]) < blocks
        return any(target.rpartition(".")[0] == module for target in targets)

    strays = {name: key for name, key in found.strays.items() if not _made(name, entries[key])}
    if inner := [key for name, key in strays.items() if owned(name)]:
        quantised = any(_QUANTISED.search(key.rpartition(".")[2]) for key in inner)
        hint = (
            "they are scales of quantised weights: give the unquantised checkpoint"
            if quantised
            else ("config.json is not this checkpoint's: mend it, or take these tensors out")
        )
        raise UserError(
            f"{what} holds {listed(inner)}, which its configuration ({type(network).__name__}) has no place for; {hint}"
        )
    shapes = ((name, entries[key].shape) for name, key in found.keys.items())
    refuse_names(what, network, "has other shapes for", (n for n, shape in shapes if shape != tuple(targets[n].shape)))
    if not found.converted:  # of those that are converted only the first name is known
        refuse_names(what, network, "lacks the weights", found.missing)
    if not strays:
        return []
    beyond = sorted({int(place[1]) for name in strays if (place := block.match(name)) is not None})
    cause = (
        f" (config.json asks for {blocks} blocks, so that {beyond[0]} to {beyond[-1]} are left out)" if beyond else ""
    )
    return [
        f"{what} holds {len(strays)} tensors that its configuration does not ask for and that were left out: "
        f"{listed(strays.values())}{cause}"
    ]


def _made(name: str, entry: Entry) -> bool:
    mask = name.endswith("bias") and len(entry.shape) > 2
    return mask or entry.dtype == "BOOL" or _MADE.search(name) is not None


def _renamer(network: nn.Module, targets: Mapping[str, Tensor]) -> Callable[[str], tuple[str, str | None, object]]:
    """A function from a checkpoint's key to the model's name for it, and the pattern and the converter by which
    transformers would convert the tensor, too; None where it would not."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(network)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    prefix = network.base_model_prefix

    def renamed(key: str) -> tuple[str, str | None, object]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if name not in targets and key in targets:
            name, pattern = rename_source_key(key, [], [], prefix, targets)
        own = (c for c in converters if pattern in c.source_patterns and any(t in name for t in c.target_patterns))
        return name, pattern, next(own, None) if pattern is not None else None

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
    """Put tensors in the place of parameters and buffers, also on the meta device; a tied weight becomes one parameter.

    Args:
        network: the model, or a part of it.
        tensors: by name in its state dict, some or all; names with the same tensor share the parameter.

    Raises:
        RuntimeError: names or shapes that the network does not have.
    """
    buffers = {name for name, _ in network.named_buffers()}
    # load_state_dict takes parameters as they are; of a plain tensor it would make one for each of its names.
    made = {id(tensor): nn.Parameter(tensor, requires_grad=False) for tensor in tensors.values()}
    state = {name: tensor if name in buffers else made[id(tensor)] for name, tensor in tensors.items()}
    if unknown := network.load_state_dict(state, strict=False, assign=True).unexpected_keys:
        raise RuntimeError(f"{type(network).__name__} has no {listed(unknown)}")
