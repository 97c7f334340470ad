"""How many threads a run computes with, on a machine that may have other work.

torch takes one thread for every core. Where others use the cores too, each of its products waits for the thread that
was put off, and a block was seen to take twenty times as long; one thread for every core that is free does not wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_SHORTEST = 0.3  # seconds of looking, in which a core counts 30 ticks
_SPARE = 0.3  # a core of which others use so much is free all the same
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class _Look:
    """Seconds that were computed until now: on the cores that this process may use, by itself, by its control group."""

    at: float
    cores: int
    busy: float
    own: float
    group: float | None

    @classmethod
    def now(cls) -> _Look | None:
        """None where the system does not tell."""
        try:
            mine = os.sched_getaffinity(0)
            tick = os.sysconf("SC_CLK_TCK")
            lines = (line.split() for line in (_PROC / "stat").read_text().splitlines() if line.startswith("cpu"))
            counts = {line[0]: [int(number) for number in line[1:]] for line in lines}
            # user, nice, system, interrupts and what the machine below has taken; not idle, nor waiting for a disk.
            busy = sum(sum(counts[f"cpu{core}"][place] for place in (0, 1, 2, 5, 6, 7)) for core in mine) / tick
        except (AttributeError, OSError, ValueError, LookupError):
            return None
        return cls(time.monotonic(), len(mine), busy, time.process_time(), _used_by_group())


_first: list[_Look] = []


def begin() -> None:
    """Begin to look at what others compute, at the start of a command: `free_cores` then needs no time of its own."""
    if not _first and (look := _Look.now()) is not None:
        _first.append(look)


def free_cores() -> float | None:
    """Cores that others leave to this process, at most those that it may use; None where the system does not tell."""
    begin()
    if not _first:
        return None
    before = _first[0]
    if (wait := before.at + _SHORTEST - time.monotonic()) > 0:
        time.sleep(wait)
    now = _Look.now()
    if now is None:
        return None
    seconds, own = now.at - before.at, now.own - before.own
    free = now.cores - (now.busy - before.busy - own) / seconds
    if (quota := _quota()) is not None:
        others = (now.group - before.group - own) / seconds if now.group is not None and before.group is not None else 0
        free = min(free, quota - max(0.0, others))
    return max(0.0, min(free, float(now.cores)))


@dataclass(frozen=True)
class Choice:
    """How many threads there are, and why.

    Attributes:
        threads: of torch.
        own: those that torch would take by itself.
        free: cores that others leave; None where it was not asked.
    """

    threads: int
    own: int
    free: float | None = None

    @property
    def line(self) -> str | None:
        """What to tell; None where torch's own number stays."""
        if self.free is None or self.threads >= self.own:
            return None
        return (
            f"threads: {self.threads} instead of {self.own}, since other work leaves {self.free:.1f} cores free "
            "(threads=N or OMP_NUM_THREADS=N sets another number)"
        )


def settle(asked: int | str) -> Choice:
    """Give torch its number of threads.

    Args:
        asked: a number, or "auto": what the environment's OMP_NUM_THREADS says, otherwise one for every core that was
            free when this process first asked, so that the runs of a sweep have the same.
    """
    import torch

    own = _own()
    if asked != "auto":
        choice = Choice(int(asked), own)
    elif automatic(asked) and (free := _free()) is not None:
        choice = Choice(max(1, min(own, int(free + _SPARE))), own, round(free, 1))
    else:
        choice = Choice(own, own)
    torch.set_num_threads(choice.threads)
    return choice


def automatic(asked: int | str) -> bool:
    """Whether neither the configuration nor the environment says how many."""
    return asked == "auto" and not any(os.environ.get(name) for name in _VARIABLES)


@cache
def _own() -> int:
    import torch

    return torch.get_num_threads()


@cache
def _free() -> float | None:
    return free_cores()


def _quota() -> float | None:
    """Cores that a container's limit allows (versions 2 and 1 of control groups); None without one."""
    found = []
    for folder in _own_groups():
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            try:
                limit, period = " ".join((folder / file).read_text() for file in files).split()
                if limit != "max" and int(limit) > 0:
                    found.append(int(limit) / int(period))
            except (OSError, ValueError):
                continue
    return min(found, default=None)


def _used_by_group() -> float | None:
    for folder in _own_groups():
        try:
            if (folder / "cpu.stat").is_file() and (folder / "cpu.max").is_file():
                fields = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
                return int(fields["usage_usec"]) / 1e6
            return int((folder / "cpuacct.usage").read_text()) / 1e9
        except (OSError, ValueError, LookupError):
            continue
    return None


def _own_groups() -> Iterator[Path]:
    """This process's control groups and those above them; in a container their root is its own."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _GROUPS / controllers if controllers else _GROUPS
        folder = root / path.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))
