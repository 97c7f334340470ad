"""A GPU for each process, with a number of GPUs that is made up."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from alps_exp.base import gpus
from alps_exp.base.checks import parse_device


def _work(connection, folder: Path, visible: str) -> None:
    """Say which GPU this process has, and end when told to."""
    chosen: list[int] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 3)
    patch.setattr(torch.cuda, "set_device", chosen.append)
    patch.setattr("tempfile.gettempdir", lambda: str(folder))
    patch.setenv("CUDA_VISIBLE_DEVICES", visible)
    answer = gpus.claim(), gpus.claim(), str(parse_device("auto")), str(parse_device("cuda")), chosen
    connection.send(answer)
    connection.recv()


class Worker:
    """A process that claims a GPU."""

    def __init__(self, folder: Path, visible: str = "") -> None:
        self.connection, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_work, args=(other, folder, visible), daemon=True)
        self.process.start()
        assert self.connection.poll(60)
        self.index, *self.rest = self.connection.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.mark.slow
def test_processes_take_one_each_and_share_evenly(tmp_path):
    workers = [Worker(tmp_path) for _ in range(4)]
    try:
        assert [worker.index for worker in workers] == [0, 1, 2, 0]
        for worker in workers:
            name = f"cuda:{worker.index}"
            assert worker.rest == [worker.index, name, name, [worker.index]]
        workers[1].kill()  # and what it had is free again
        workers += [Worker(tmp_path), Worker(tmp_path, "2,5,7"), Worker(tmp_path, "2,5,7"), Worker(tmp_path)]
        # Of GPUs 2, 5 and 7 the first is taken by a process that sees all; then 1 has fewer processes than 0.
        assert [worker.index for worker in workers[4:]] == [1, 1, 2, 1]
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_taken_where_there_is_no_choice(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert gpus.claim() is None and gpus.claimed() is None
    assert str(parse_device("auto")) == ("cuda" if count else "cpu")
