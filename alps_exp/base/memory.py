"""How much memory is free, on the host and on a device."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_host() -> int:
    """Bytes that this process can still take without swapping: what the system has left, or its control group."""
    import psutil

    return min([psutil.virtual_memory().available, *_left_in_group()])


def _left_in_group() -> list[int]:
    """Bytes left of a container's limit, where there is one (version 2 or 1 of control groups)."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            cap, current = (_CGROUP / limit).read_text().strip(), int((_CGROUP / used).read_text())
            cache = _file_cache((_CGROUP / limit).with_name("memory.stat"))
        except (OSError, ValueError):
            continue
        return [] if cap == "max" else [max(int(cap) - current + cache, 0)]
    return []


def _file_cache(stat: Path) -> int:
    """Bytes of cached files, which count as used and are given up first."""
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))


def free_device(device: torch.device) -> int:
    """Bytes free on the device; the host's for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host()


def trim_host() -> None:
    """Give freed host memory back to the system, where the C library can (glibc).

    It keeps what was freed between blocks that are in use: without this, the process of a streamed model was seen to
    grow with every block.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
