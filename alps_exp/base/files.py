"""What the package does with files in one place each: whole replacement, JSON, digests, locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LEFTOVERS = ".*.tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file or folder written there takes the place of `path` at the end.

    A reader sees the old content or the new one, never a part, and the new one stays when the power goes. After an
    error the old content stays. What a killed process leaves is found by `leftovers`. Who may read the files is what
    the umask says, whatever wrote them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _open_to_readers(temporary)
        if temporary.is_dir():
            if path.exists():
                shutil.rmtree(path)  # a folder does not take the place of one that holds files
        else:
            _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        remove(temporary)


def leftovers(folder: Path, name: str = "") -> list[Path]:
    """What killed processes have left of `replacing` in a folder, of all files or of one name."""
    return list(folder.glob(f".{name}{_LEFTOVERS}" if name else _LEFTOVERS))


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _open_to_readers(path: Path) -> None:
    """Give a file, or those of a folder, the umask's permissions: safetensors makes its files for their owner alone."""
    probe = path.with_name(f"{path.stem}.umask.tmp")  # one of the `leftovers`, should this process be killed
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    """Write a value as JSON, whole or not at all (`replacing`)."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def read_json(path: Path, constant: Callable[[str], object] | None = None):
    """A file's JSON.

    Args:
        path: the file.
        constant: what becomes of NaN and Infinity, which are no JSON; floats without it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or not UTF-8.
    """
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)


def file_sha256(file: Path) -> str:
    """sha256 of a file's content, 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256(content: str | bytes) -> str:
    """sha256 of a text in UTF-8 or of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def lock(descriptor: int, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file or folder until the descriptor is closed in every process that has inherited it.

    The system releases it when these processes end, however they end, and no file is left behind.

    Args:
        descriptor: of the open file or folder.
        shared: with others that share it; otherwise alone.
        wait: until others let go of it.

    Returns:
        Whether it is locked; None on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
