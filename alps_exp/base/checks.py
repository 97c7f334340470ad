"""Checks of single values that name the key, the value and what is allowed."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, nearest

if TYPE_CHECKING:
    import torch

_NO_DEVICES = "device={}: {} CUDA devices are available here; give device=auto or device=cpu"
LARGEST = 2**63 - 1  # of the integers that torch and the tables take


def require(key: str, value, kind: type, low: float, high: float, open_low: bool = False) -> None:
    """Raise UserError unless `value` is an int (or, for kind=float, a number) within [low, high] ((low, high])."""
    if kind is int:
        high = min(high, LARGEST)
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if number and (low < value if open_low else low <= value) and value <= high:
        return
    what, low_end = "a whole number" if kind is int else "a number", "above" if open_low else "from"
    bounded = high not in (float("inf"), LARGEST) or (number and value > high)
    end = f" up to {high if kind is int else format(high, 'g')}" if bounded else ""
    raise UserError(f"{key}={value!r} is not allowed: give {what} {low_end} {low:g}{end}")


def one_of(key: str, value, allowed: Iterable) -> None:
    """Raise UserError unless `value` is one of the allowed ones; 1 is not true, nor 0 false."""
    allowed = tuple(allowed)
    if not any(type(value) is type(known) and value == known for known in allowed):
        raise UserError(f"{key}={value!r} is not allowed; {nearest(str(value), map(str, allowed))}")


def local_path(key: str, value) -> Path:
    """The path that a key names, whose end need not exist.

    Raises:
        UserError: no file can be of that name, or this user may not read it.
    """
    given = f"{key}={value}"
    try:
        path = Path(str(value)).expanduser()
    except RuntimeError:
        raise UserError(f"{given}: no such user; give the whole path") from None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(f"{given} links to {os.readlink(path)}, which is not there: give another path") from None
        return path
    except (OSError, ValueError) as error:
        raise UserError(f"{given} cannot be read ({getattr(error, 'strerror', error)}): give another path") from None
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UserError(f"{given} cannot be read: this user has no permission")
    return path


def check_device(name: str) -> None:
    """Raise UserError for what can be no device's name."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(name)):
        raise UserError(f"device={name} is not allowed: give auto, cpu, cuda or cuda:N")


def check_built(name: str) -> None:
    """Raise UserError for a GPU where the torch that is installed is built without, or no driver of its kind is here.

    Asks the package's version and the system's linker, not torch, so that it takes no time; `parse_device` knows more.
    """
    if not str(name).startswith("cuda"):
        return
    try:
        build = version("torch").partition("+")[2]
    except PackageNotFoundError:
        return
    if build == "cpu" or (build.startswith("cu") and sys.platform == "linux" and not _driver()):
        raise UserError(_NO_DEVICES.format(name, 0))


def _driver() -> bool:
    if any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
        return True  # whose library torch may find where the linker does not
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def parse_device(name: str) -> torch.device:
    """The device that a configuration names: auto, cpu, cuda or cuda:N; without N, the one that this process claimed.

    Raises:
        UserError: no such name, or no such device here.
    """
    check_device(name)
    import torch  # takes seconds, and the checks above are for values that are refused at once

    from . import gpus

    text = str(name)
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and gpus.claimed() is not None:
        return torch.device("cuda", gpus.claimed())
    device = torch.device(text)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(_NO_DEVICES.format(text, count))
    return device
