"""Statistics of calibration inputs on disk, shared by the runs of a sweep that have the same inputs.

Runs share the inputs of the first block whatever their method and sparsity; with propagate=dense, those of all blocks.
They also share what passes over the dense model have told (`calibration.sensitivity`).

    RUNS/.statistics/DIGEST/identity.json              what these statistics are of, by name
    RUNS/.statistics/DIGEST/block-00003.safetensors    the sums of one block, a group of layers after the other
    RUNS/.statistics/DIGEST/dense.safetensors          what one pass over the dense model has told of every layer

RUNS is the folder of the runs' directories. DIGEST covers everything that decides the numbers: checkpoint, code,
versions, device, dtype, tokens, windows per forward, and the layers that are pruned. Files appear whole
(`base.files.replacing`) and carry a checksum over their set, their block and their content. A file whose checksum is
wrong is ignored, and its block is collected again. A process that uses a set holds a shared lock on its folder. Sets
without a lock are removed when room is needed, the least recently used first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.errors import UserError
from ..base.files import leftovers, lock, replacing, sha256
from ..layer.inputs import Inputs, Statistics
from .capture import Group
from .sensitivity import Sensitivity

FOLDER = ".statistics"
AUTO_GB = 10.0
_ATTEMPTS = 1000  # to hold a folder that other processes may remove at that moment


class NoSharing:
    """A run whose statistics are its own."""

    notes: tuple[str, ...] = ()

    def holds(self, index: int) -> bool:
        """Nothing is here."""
        return False

    def load(self, index: int, device: torch.device, needed: bool = False) -> None:
        """Nothing is here."""

    def collected(self, index: int, needed: Statistics) -> Statistics:
        """What the run needs."""
        return needed

    def keep(self, index: int, groups: list[Group]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is held."""


class SharedSet:
    """One set of statistics below the folder of all, which this process holds until it is closed.

    Args:
        root: the folder of all sets.
        identity: everything that decides the statistics, by name.
        limit: bytes that all sets may take.

    Attributes:
        notes: why something was not kept, in words.
    """

    def __init__(self, root: Path, identity: Mapping[str, str], limit: float) -> None:
        text = json.dumps(dict(identity), sort_keys=True)
        self.notes: list[str] = []
        self._root, self._limit = root, limit
        self._folder = root / sha256(text)[:32]
        self._descriptor = _hold(self._folder)
        try:
            if not (file := self._folder / "identity.json").exists():
                with replacing(file) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Release the set's lock."""
        os.close(self._descriptor)

    def path(self, name: str) -> Path:
        """A file of the set."""
        return self._folder / name

    def make_room(self, size: int) -> bool:
        """Remove unused sets, the least recently used first, until `size` bytes fit; whether they do."""
        if size > self._limit:
            self.notes.append(
                f"statistics of a block, {size / 1e9:.2g} GB, were not kept for other runs (statistics_cache)"
            )
            return False
        # Whatever else lies here is not ours to remove.
        folders = (path for path in self._root.iterdir() if re.fullmatch(r"[0-9a-f]{32}", path.name))
        sets = sorted((path for path in folders if path.is_dir() and not path.is_symlink()), key=_used)
        total = sum(map(_size, sets))
        for path in sets:
            if total + size <= self._limit:
                break
            if path != self._folder:
                total -= _remove(path)
        if total + size > self._limit:
            self.notes.append(
                f"statistics beyond {self._limit / 1e9:g} GB were not kept for other runs (statistics_cache)"
            )
        return total + size <= self._limit


class StatisticsCache(SharedSet):
    """The set of statistics that a run uses, and adds to.

    Args:
        root, identity, limit: as of `SharedSet`.
        dense: the inputs of all blocks are those of the dense model, not of the first one's only.
        needed: what the run collects of each input.
        held_out: whether it also collects the Gram matrix of held-out windows.
    """

    def __init__(
        self, root: Path, identity: Mapping[str, str], dense: bool, needed: Statistics, held_out: bool, limit: float
    ) -> None:
        self._dense, self._needed = dense, needed
        self._fields = _fields(needed) | ({"held_out"} if held_out else set())
        self._whole: dict[int, tuple] = {}  # block → state of its file when its checksum was last found to hold
        super().__init__(root, identity, limit)

    def holds(self, index: int) -> bool:
        """Whether everything that the run needs of a block's inputs is stored and undamaged."""
        if index and not self._dense:
            return False
        try:
            found = self._file(index).stat()
        except OSError:
            return False
        state = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._whole.get(index, ())[:3] != state:
            groups = _read(self._file(index))
            if groups is None:
                return False
            self._whole[index] = (*state, set.intersection(*(set(fields) for _, fields in groups)))
        return self._fields <= self._whole[index][3]

    def load(self, index: int, device: torch.device, needed: bool = False) -> list[Group] | None:
        """A block's groups of layers with the statistics that the run needs; None if they are not stored.

        Args:
            index: the block.
            device: where the tensors go.
            needed: `holds` has said that it is here, and it cannot be collected any more.

        Raises:
            UserError: it was needed and cannot be read.
        """
        groups = _read(self._file(index), device) if self.holds(index) else None
        if groups is None and needed:
            with suppress(OSError):
                self._file(index).unlink(missing_ok=True)
            raise UserError(
                f"{self._file(index)} was whole when the run started and cannot be read now: the same command goes on "
                "without it"
            )
        if groups is None:
            return None
        kept = self._fields | {"tokens", "sequences"}
        found = [
            (names, Inputs(**{key: fields[key] for key in fields if key in kept}, name=names[0]), fields.get("prior"))
            for names, fields in groups
        ]
        pools = {inputs.name: inputs for names, inputs, prior in found if prior == inputs.name}
        return [
            Group(names, inputs if prior is None else inputs.beside(pools[prior]))
            for names, inputs, prior in found
            if inputs.name not in pools
        ]

    def collected(self, index: int, needed: Statistics) -> Statistics:
        """What to collect of a block. With a Gram matrix that is kept also the moments, which then cost little more."""
        kept = Statistics.GRAM in self._needed and (self._dense or index == 0) and not self.notes
        return Statistics.ALL if kept else needed

    def keep(self, index: int, groups: list[Group]) -> None:
        """Add a block's statistics to the cached ones, unless no other run could use them or the limit is reached."""
        if (index and not self._dense) or self.notes or not groups:
            return
        known = {tuple(names): fields for names, fields in _read(self._file(index)) or ()}
        priors = {inputs.prior.name: inputs.prior for _, inputs in groups if inputs.prior is not None}
        # What all experts of a module have in common is stored once, as the prior of itself.
        pools = [Group([name], prior.beside(prior)) for name, prior in priors.items()]
        every = [*groups, *pools]
        merged = [(group.names, known.get(tuple(group.names), {}) | _kept(group.inputs)) for group in every]
        size = sum(value.nbytes for _, fields in merged for value in fields.values() if isinstance(value, Tensor))
        try:
            if self.make_room(size):
                _write(self._file(index), merged)
        except OSError as error:
            self.notes.append(f"statistics of block {index} and later ones were not kept for other runs: {error}")

    def _file(self, index: int) -> Path:
        return self.path(f"block-{index:05d}.safetensors")


class NoPasses:
    """Passes over the dense model are the run's own."""

    notes: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def found(self, what: str, own: Mapping[str, str], make: Callable[[], Sensitivity]) -> Sensitivity:
        """What `make` gives."""
        return make()


class PassCache:
    """What passes over the dense model tell, made once by the runs of a sweep.

    Args:
        root, limit: as of `SharedSet`.
        identity: what decides about all passes of this run's model here, by name.

    Attributes:
        notes: why something was not kept, in words.
        shared: passes whose results another run had kept.
    """

    def __init__(self, root: Path, identity: Mapping[str, str], limit: float) -> None:
        self.notes: list[str] = []
        self.shared: list[str] = []
        self._root, self._identity, self._limit = root, dict(identity), limit

    def found(self, what: str, own: Mapping[str, str], make: Callable[[], Sensitivity]) -> Sensitivity:
        """What a pass tells, from the disk or from `make`, the same to the bit.

        Args:
            what: the pass, in a word.
            own: all else that decides about it, by name.
            make: does it.
        """
        try:
            place = SharedSet(self._root, {**self._identity, **own, "pass": what}, self._limit)
        except OSError as error:
            self.notes.append(f"{what} are not shared with other runs: {error}")
            return make()
        try:
            file = place.path("dense.safetensors")
            if (kept := _read(file)) is not None:
                self.shared.append(what)
                return _told(kept)
            found = make()
            try:
                groups = _by_layer(found)
                tensors = (value for _, told in groups for value in told.values() if isinstance(value, Tensor))
                if place.make_room(sum(value.nbytes for value in tensors)):
                    _write(file, groups)
            except OSError as error:
                self.notes.append(f"{what} were not kept for other runs: {error}")
            self.notes += place.notes
            return found
        finally:
            place.close()


_TOLD = ("outputs", "inputs", "scores", "exponents")


def _by_layer(found: Sensitivity) -> list[tuple[list[str], dict]]:
    told: dict[str, dict] = {}
    for field in _TOLD:
        for name, value in getattr(found, field).items():
            told.setdefault(name, {"tokens": found.tokens})[field] = value
    return [([name], fields) for name, fields in told.items()]


def _told(groups: list[tuple[list[str], dict]]) -> Sensitivity:
    fields = {field: {names[0]: told[field] for names, told in groups if field in told} for field in _TOLD}
    return Sensitivity(**fields, tokens=groups[0][1]["tokens"])


def _kept(inputs: Inputs) -> dict:
    """What is stored of an input: a diagonal only where it was summed alone."""
    tensors = inputs.tensors()
    if inputs.gram is not None:
        del tensors["diagonal"]
    prior = {"prior": inputs.prior.name} if inputs.prior is not None else {}
    return {**tensors, **prior, "tokens": inputs.tokens, "sequences": inputs.sequences}


def _fields(needed: Statistics) -> set[str]:
    """Names of the tensors of one input. The diagonal of a Gram matrix has other last digits than that summed alone."""
    found = {"gram"} if Statistics.GRAM in needed else {"diagonal"} if Statistics.DIAGONAL in needed else set()
    return found | ({"mean", "var"} if Statistics.MOMENTS in needed else set())


def _hold(folder: Path) -> int:
    """Make the folder if need be, remove what killed writers left, and return a descriptor with a shared lock on it.

    Raises:
        OSError: a file system without locks, no permission, or something in the folder's place that is none.
    """
    for _ in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            for path in (folder.parent, folder):
                if path.is_symlink() and not path.exists():
                    raise FileExistsError(f"{path} is a link that leads nowhere: remove it") from None
                if path.is_file():
                    raise FileExistsError(f"{path} is a file, where a folder is needed: remove it") from None
            continue  # removed by another process meanwhile
        try:
            if lock(descriptor) and _lies_there(descriptor, folder):  # no other process writes here
                for leftover in leftovers(folder):
                    leftover.unlink()
            if lock(descriptor, shared=True, wait=True) is None:
                raise OSError(f"{folder} is on a file system without locks")
            if _lies_there(descriptor, folder):
                os.utime(folder)
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OSError(f"{folder} disappears as often as it is made")


def _lies_there(descriptor: int, folder: Path) -> bool:
    """Whether the folder is still the one that was opened. Other processes may have removed it before it was locked,
    and made another in its place, which they use."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def _remove(folder: Path) -> int:
    """Remove a set unless a process uses it; return the number of bytes freed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return 0
    try:
        if not lock(descriptor) or not _lies_there(descriptor, folder):
            return 0
        size = _size(folder)
        shutil.rmtree(folder, ignore_errors=True)
        return size
    finally:
        os.close(descriptor)


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _read(file: Path, device: torch.device | None = None) -> list[tuple[list[str], dict]] | None:
    """A file's groups, on the host or a device; None where it cannot be read or is not as it was written."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            # Copied out of the mapped file, so that the time of reading it is spent here.
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        if metadata["sha256"] != _checksum(file, tensors, metadata["groups"]):
            return None
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None
    groups = json.loads(metadata["groups"])
    for key, tensor in tensors.items():
        number, _, field = key.partition(".")
        groups[int(number)][1][field] = tensor if device is None else tensor.to(device)
    return [(names, fields) for names, fields in groups]


def _checksum(file: Path, tensors: Mapping[str, Tensor], groups: str) -> str:
    """sha256 (hex) of which block of which set this is, and of all that the file says of it."""
    found = hashlib.sha256(f"{file.parent.name}/{file.name}\n{groups}\n".encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _write(file: Path, groups: list[tuple[list[str], dict]]) -> None:
    tensors, plain = {}, []
    for number, (names, fields) in enumerate(groups):
        own = {field: value for field, value in fields.items() if isinstance(value, Tensor)}
        tensors |= {f"{number}.{field}": value.detach().cpu().contiguous() for field, value in own.items()}
        plain.append((names, {field: value for field, value in fields.items() if field not in own}))
    text = json.dumps(plain)
    metadata = {"groups": text, "sha256": _checksum(file, tensors, text)}
    try:
        with replacing(file) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:  # its way to speak of a full disk
        raise OSError(str(error)) from error
