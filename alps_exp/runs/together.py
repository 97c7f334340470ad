"""Starts the processes of a team on this machine and waits for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..base.errors import UserError
from ..base.files import lock, read_json
from ..pruning.store import HeldError

FRESH = "fresh.pt"  # beside the request
_LOCK = ".team.lock"
_PATIENCE = 30.0  # seconds that processes of a killed run may take to end


def check(count: int, device: str) -> None:
    """Raise UserError where the key `devices` asks for more GPUs than there are; `device` is the key of that name."""
    if count > 1 and device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise UserError(f"devices={count}, and there are {torch.cuda.device_count()}: give at most that many")


def prune_together(
    content: Mapping, directory: Path, device: torch.device, count: int, fresh: torch.Tensor | None = None
) -> tuple[int | None, list[str]]:
    """Prune with several processes; the finished blocks are in the directory afterwards.

    Args:
        content: the configuration, which each process resolves for itself.
        directory: the run's.
        device: its type is that of the processes' devices.
        count: of processes.
        fresh: (windows, seqlen) text to distil on.

    Returns:
        Peak bytes on a device, the largest of all processes, None on CPUs; what they did in a plainer way than usual.

    Raises:
        UserError and RuntimeError: of the first process that failed; the others are stopped.
    """
    with _team_lock(directory) as held, tempfile.TemporaryDirectory(prefix=".team-", dir=directory) as folder:
        request = Path(folder) / "request.json"
        asked = {"config": content, "directory": str(directory), "device": device.type}
        request.write_text(json.dumps(asked), encoding="utf-8")
        if fresh is not None:
            torch.save(fresh, request.with_name(FRESH))
        port = _free_port()
        processes = [_start(request, rank, count, port, held) for rank in range(count)]
        try:
            return _wait(processes, request.parent)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outlast(directory: Path) -> None:
    """Return once no process of an earlier team is at work in a directory: those of a killed run take a moment to end.

    Raises:
        HeldError: some do not end.
    """
    if (directory / _LOCK).exists():
        with _team_lock(directory):
            pass


@contextmanager
def _team_lock(directory: Path) -> Iterator[int]:
    """A descriptor for the processes of a team to inherit, whose lock holds until the last of them has ended."""
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        deadline = time.monotonic() + _PATIENCE
        while lock(descriptor) is False:
            if time.monotonic() > deadline:
                raise HeldError(
                    f"processes of an earlier attempt are still at work in {directory} (alps_exp.runs.worker): end them"
                )
            time.sleep(0.1)
        yield descriptor
        (directory / _LOCK).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _start(request: Path, rank: int, size: int, port: int, held: int) -> subprocess.Popen:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place["OMP_NUM_THREADS"] = torch.get_num_threads()
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    # The processes find this package where this process has found it.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "alps_exp.runs.worker", str(request), str(os.getpid())]
    return subprocess.Popen(command, env=environment, pass_fds=[held])


def _wait(processes: list[subprocess.Popen], folder: Path) -> tuple[int | None, list[str]]:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed:
            break
        time.sleep(0.1)
    answers = [_answer(folder / f"answer-{rank}.json") for rank in range(len(processes))]
    for answer in answers:
        if answer.get("error") == "UserError":
            raise UserError(answer["message"])
    failed = [rank for rank, process in enumerate(processes) if process.poll()]
    # A process that lost the others only says so; the one that failed by itself is the more telling.
    failed.sort(key=lambda rank: "DistBackendError" in str(answers[rank]) or "Connection" in str(answers[rank]))
    for rank in failed:
        answer, status = answers[rank], processes[rank].returncode
        why = f"{answer['error']}: {answer['message']}" if answer else f"exit status {status}"
        error = RuntimeError(f"process {rank} of {len(processes)} failed ({why})")
        error.add_note(answer.get("trace", ""))
        raise error
    peak = max((answer["peak_device_bytes"] or 0 for answer in answers), default=0) or None
    return peak, list(dict.fromkeys(line for answer in answers for line in answer["fallbacks"]))


def _answer(path: Path) -> dict:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}
