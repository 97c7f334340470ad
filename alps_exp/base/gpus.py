"""A GPU for each process of a sweep that has several: `device=auto` in a worker takes one of its own."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import torch

from .files import lock

# Index and the descriptor of its lock: at most one, for as long as the process lives.
_claims: list[tuple[int, int]] = []


def claim() -> int | None:
    """Index of this process's GPU, which becomes torch's current one; None without a choice of several.

    Processes on one machine take different ones, whatever sweep they belong to; when all are taken they are shared
    evenly. A claim holds until the process ends, however it ends.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return None
    if not _claims:
        _claims.append(_lock(_names(count), Path(tempfile.gettempdir())))
        torch.cuda.set_device(claimed())
    return claimed()


def claimed() -> int | None:
    """The index that `claim` gave this process."""
    return _claims[0][0] if _claims else None


def _names(count: int) -> list[str]:
    """What the visible GPUs are called on the machine: indices differ where others are hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [name.strip() for name in visible] if len(visible) == count else [str(index) for index in range(count)]


def _lock(names: list[str], folder: Path) -> tuple[int, int]:
    """Index of the first GPU with the fewest processes, and the descriptor whose lock says that it is taken."""
    for turn in itertools.count():
        for index, name in enumerate(names):
            path = folder / f"alps_exp-{os.getuid()}-gpu-{name}-{turn}.lock"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if lock(descriptor) is not False:
                return index, descriptor
            os.close(descriptor)
    raise AssertionError("there is always another turn")
