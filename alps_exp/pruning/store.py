"""The finished blocks of a run on disk: for each a shard with its weights and a journal with its rows.

    DIR/.progress/run.json                   what the blocks belong to: configuration, code, versions, checkpoint
    DIR/.progress/block-00003.safetensors    all weights of a block, pruned
    DIR/.progress/block-00003.json           its rows and seconds, the shard's checksum, and a checksum of its own

Files appear whole (`base.files.replacing`), the journal after its shard. A block counts as finished if both exist and
both checksums hold; anything else that a killed run leaves is removed and computed again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.errors import UserError
from ..base.files import file_sha256, lock, read_json, replacing, sha256, write_json
from .rows import FinishedBlock, LayerRow

FOLDER = ".progress"


class HeldError(UserError):
    """Another process is at work in the run's directory."""


class ProgressStore:
    """The finished blocks of one run.

    Class attributes:
        keeps: finished blocks outlast the process (of `NoStore` they do not).

    Args:
        directory: the run's own.
        identity: what must be the same for the blocks to be used again, by name: configuration, code, versions, ….
        writes: whether this process writes; of those that work together one does.

    Attributes:
        finished: the blocks that an earlier attempt left, from the first one on without a gap.
        ladder: measures against lack of device memory, by name; kept for later attempts (`keep_ladder`).
        attempts: how often the run was begun, this time included.
        threads: numbers of threads of the attempts whose blocks are here, this one included.
    """

    keeps = True

    def __init__(self, directory: Path, identity: Mapping[str, object], writes: bool = True) -> None:
        self.folder = directory / FOLDER
        self.writes = writes
        self.identity = dict(identity)
        self.finished: list[FinishedBlock] = []
        self.ladder: dict = {}
        self.attempts = 0
        self.threads: list[int] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._pending: Future | None = None

    def differences(self) -> list[str]:
        """How this run's identity differs from that of an earlier attempt, one text per entry; empty without one."""
        earlier = (_read(self.folder / "run.json") or {}).get("identity")
        if earlier is None:
            return []
        now = json.loads(json.dumps(self.identity))
        return [
            f"{name} {_shown(earlier.get(name))} → {_shown(now.get(name))}"
            for name in sorted(earlier.keys() | now.keys())
            if earlier.get(name) != now.get(name)
        ]

    def unfinished(self) -> int:
        """How many blocks an interrupted run has left here, whatever it was a run of."""
        return len(list(self.folder.glob("block-*.json")))

    def earlier_threads(self) -> int | None:
        """With how many threads all finished blocks were made; None if with different numbers."""
        counts = (_read(self.folder / "run.json") or {}).get("threads", [])
        return counts[0] if len(counts) == 1 else None

    def open(self) -> None:
        """Take over what is finished, and remove what was cut short."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = _read(self.folder / "run.json") or {}
        if state.get("identity") is None and any(self.folder.iterdir()):
            self.clear()  # without it nobody knows what the blocks belong to
            self.folder.mkdir()
        self.ladder = state.get("ladder", {})
        self.attempts = state.get("attempts", 0) + 1
        while (block := self._load(len(self.finished))) is not None:
            self.finished.append(block)
        self.threads = sorted({*(state.get("threads", []) if self.finished else []), torch.get_num_threads()})
        known = {self._name(index) for index in range(len(self.finished))}
        for file in self.folder.iterdir():
            if file.name.startswith(".") or (file.name.startswith("block-") and file.stem not in known):
                file.unlink()
        self._write_state()

    def shard(self, index: int) -> Path:
        """Where a block's weights lie once it is finished."""
        return self.folder / f"{self._name(index)}.safetensors"

    def intact(self, index: int) -> bool:
        """Whether a finished block's weights are on the disk as they were written."""
        return self._load(index) is not None

    def finish(self, index: int, tensors: Mapping[str, Tensor], block: FinishedBlock) -> None:
        """Write a block in the background, after the one before it is on the disk.

        Args:
            index: the block.
            tensors: its weights in host memory by name inside the block; they must not change any more.
            block: its rows.

        Raises:
            OSError and others: the block before it could not be written.
        """
        self.wait()
        if self.writes:
            self._pending = self._writer.submit(self._write, index, dict(tensors), block)

    def wait(self) -> None:
        """Return once all that was given is on the disk.

        Raises:
            OSError and others: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the pending write, even after an error.

        Its tensors may be the model's own memory, which the next run of the sweep overwrites.
        """
        self._writer.shutdown()

    def keep_ladder(self, measures: Mapping) -> None:
        """Remember the measures against lack of memory for a later attempt."""
        self.ladder = dict(measures)
        if self.writes:
            self._write_state()

    def remember(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Keep what was found before the first block, for later attempts: tensors in host memory, and a text."""
        if self.writes:
            file = self.folder / f"{name}.safetensors"
            write_tensors(file, tensors)
            write_json(self.folder / f"{name}.json", _sealed(text=text, tensors=file_sha256(file)))

    def recall(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """What an earlier attempt has kept under this name; None where it has not."""
        body, file = _read(self.folder / f"{name}.json"), self.folder / f"{name}.safetensors"
        if body is None or not file.is_file() or file_sha256(file) != body["tensors"]:
            return None
        return load_file(file), body["text"]

    def file(self, name: str) -> Path:
        """Where something else may be kept as long as the run is not complete."""
        return self.folder / name

    def clear(self) -> None:
        """Remove all of it."""
        self.finished = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, index: int) -> str:
        return f"block-{index:05d}"

    def _write_state(self) -> None:
        state = {"identity": self.identity, "ladder": self.ladder, "attempts": self.attempts, "threads": self.threads}
        write_json(self.folder / "run.json", _sealed(**state))

    def _write(self, index: int, tensors: dict[str, Tensor], block: FinishedBlock) -> None:
        shard = self.shard(index)
        write_tensors(shard, tensors)
        body = {**dataclasses.asdict(block), "shard": file_sha256(shard)}
        write_json(self.folder / f"{self._name(index)}.json", _sealed(**body))

    def _load(self, index: int) -> FinishedBlock | None:
        journal, shard = _read(self.folder / f"{self._name(index)}.json"), self.shard(index)
        if journal is None or not shard.is_file() or file_sha256(shard) != journal["shard"]:
            return None
        rows = [LayerRow(**row) for row in journal["rows"]]
        others = ("seconds", "sizes", "drift", "finish", "fallbacks")
        return FinishedBlock(rows, *(journal[name] for name in others))


class NoStore:
    """A run that keeps nothing: a model that is pruned in memory only."""

    finished: tuple[FinishedBlock, ...] = ()
    ladder: Mapping = MappingProxyType({})
    keeps = writes = False

    def finish(self, index: int, tensors: Mapping[str, Tensor], block: FinishedBlock) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """Nothing is on its way."""

    def keep_ladder(self, measures: Mapping) -> None:
        """Nothing."""

    def remember(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Nothing."""

    def recall(self, name: str) -> None:
        """Nothing is kept."""

    def file(self, name: str) -> None:
        """Nowhere."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears whole or not at all, and stays when the power goes."""
    # Tensors that share their storage with others are refused by safetensors.
    own = {
        name: tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in tensors.items()
    }
    seen: set[int] = set()
    for name, tensor in own.items():
        if tensor.data_ptr() in seen:
            own[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    with replacing(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt"})


def _seal(body: Mapping) -> str:
    return sha256(json.dumps(body, sort_keys=True))


def _sealed(**body) -> dict:
    plain = json.loads(json.dumps(body))
    return {**plain, "sha256": _seal(plain)}


def _read(path: Path) -> dict | None:
    """A sealed JSON file's content; None where there is none, or where it is not as it was written."""
    try:
        body = read_json(path)
        seal = body.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return body if seal == _seal(body) else None


def _shown(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)[:120]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run's directory for the length of the context; when the process dies, the system releases it.

    The directory itself is locked, so that no file is left in it. A file system without locks has none.

    Raises:
        HeldError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if lock(descriptor) is False:
            raise HeldError(
                f"another process is at work in {directory}: wait for it, or give another directory with "
                "hydra.run.dir=DIR"
            )
        yield
    finally:
        os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Whether another process holds the directory now."""
    try:
        with locked(directory):
            return False
    except HeldError:
        return True
    except FileNotFoundError:
        return False
