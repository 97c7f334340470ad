"""Threads: as many as others leave, unless somebody says how many."""

from __future__ import annotations

import pytest
import torch

from alps_exp.base import threads
from alps_exp.base.threads import _Look


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of files: `looks` are (seconds, busy core seconds, own seconds) in turn, of 8 cores."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_GROUPS", tmp_path)
    monkeypatch.setattr(threads, "_first", [])
    monkeypatch.setattr(threads, "_own", lambda: 8)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    threads._free.cache_clear()
    before = torch.get_num_threads()

    def looks(*values: tuple[float, float, float], group: float | None = None):
        left = [_Look(at, 8, busy, own, group) for at, busy, own in values]
        monkeypatch.setattr(_Look, "now", classmethod(lambda cls: left.pop(0)))

    yield looks
    threads._free.cache_clear()
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("busy", "own", "count"),
    [(0, 0, 8), (10, 10, 8), (13, 10, 8), (40, 10, 5), (42, 10, 5), (80, 0, 1), (95, 5, 1)],
    ids=["idle", "itself", "a-little", "three-taken", "part-of-a-core", "full", "beyond"],
)
def test_one_for_every_core_that_others_leave(machine, busy, own, count):
    machine((0, 5, 1), (10, 5 + busy, 1 + own))
    choice = threads.settle("auto")
    assert choice.threads == torch.get_num_threads() == count
    assert (choice.line is None) == (count == 8)
    assert choice.line is None or f"threads: {count} instead of 8" in choice.line


def test_the_runs_of_a_process_have_the_same_number(machine):
    machine((0, 0, 0), (10, 60, 0))
    assert [threads.settle("auto").threads for _ in range(3)] == [2, 2, 2]  # a third look would raise


def test_what_the_user_says_counts(machine, monkeypatch):
    machine()  # any look would raise
    assert (threads.settle(3).threads, torch.get_num_threads()) == (3, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    choice = threads.settle("auto")
    assert choice.free is None and choice.line is None and not threads.automatic("auto")
    assert threads.settle(2).threads == 2


@pytest.mark.parametrize(("files", "cores"), [({"cpu.max": "150000 100000"}, 1.5), ({"cpu.max": "max 100000"}, None)])
def test_a_containers_limit(machine, monkeypatch, tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert threads._quota() == cores
    machine((0, 0, 0), (10, 0, 0), group=0.0)
    assert threads.settle("auto").threads == (1 if cores else 8)


def test_where_the_system_does_not_tell_torch_decides(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "_PROC", tmp_path / "none")
    assert threads.free_cores() is None
    assert threads.settle("auto").threads == 8


def test_this_machine_tells():
    free = threads.free_cores()
    assert free is None or 0 <= free <= 1024
