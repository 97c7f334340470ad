"""Checks of single values that name the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import gpus
from .errors import UserError, nearest


def require(key: str, value, kind: type, low: float, high: float, open_low: bool = False) -> None:
    """Raise UserError unless `value` is an int (or, for kind=float, a number) within [low, high] ((low, high])."""
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if number and (low < value if open_low else low <= value) and value <= high:
        return
    what = "a whole number" if kind is int else "a number"
    raise UserError(
        f"{key}={value!r} is not allowed: give {what} {'above' if open_low else 'from'} {low:g}"
        + (f" up to {high:g}" if high != float("inf") else "")
    )


def one_of(key: str, value, allowed: Iterable) -> None:
    """Raise UserError unless `value` is one of the allowed ones; 1 is not true, nor 0 false."""
    allowed = tuple(allowed)
    if not any(type(value) is type(known) and value == known for known in allowed):
        raise UserError(f"{key}={value!r} is not allowed; {nearest(str(value), map(str, allowed))}")


def parse_device(name: str) -> torch.device:
    """The device that a configuration names: auto, cpu, cuda or cuda:N; without N, the one that this process claimed.

    Raises:
        UserError: no such name, or no such device here.
    """
    text = str(name)
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and gpus.claimed() is not None:
        return torch.device("cuda", gpus.claimed())
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={text} is not allowed: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device={text}: {count} CUDA devices are available here; give device=auto or device=cpu")
    return device
