"""A GPU for each process, with a number of GPUs that is made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alps_exp import gpus
from alps_exp.checks import parse_device

ROOT = Path(__file__).parents[1]
# Says which GPU it has, and ends when its input does.
WORKER = """
import json, sys, torch
from alps_exp import gpus
from alps_exp.checks import parse_device
chosen = []
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 3)
torch.cuda.set_device = chosen.append
print(json.dumps([gpus.claim(), gpus.claim(), str(parse_device("auto")), str(parse_device("cuda")), chosen]), flush=True)
sys.stdin.read()
"""


def start(folder: Path, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **environment}
    return subprocess.Popen([sys.executable, "-c", WORKER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_processes_take_one_each_and_share_evenly(tmp_path):
    workers = [start(tmp_path) for _ in range(4)]
    try:
        answers = [json.loads(worker.stdout.readline()) for worker in workers]
        taken = [answer[0] for answer in answers]
        assert sorted(taken) == [0, 0, 1, 2]
        for index, again, auto, cuda, chosen in answers:
            assert (again, auto, cuda, chosen) == (index, f"cuda:{index}", f"cuda:{index}", [index])
        gone = taken.index(1)
        workers[gone].kill()  # and what it had is free again
        workers[gone].wait()
        workers.append(start(tmp_path))
        assert json.loads(workers[-1].stdout.readline())[0] == 1
        workers.append(start(tmp_path, CUDA_VISIBLE_DEVICES="2,5,7"))  # the 2 is taken by another sweep
        assert json.loads(workers[-1].stdout.readline())[0] == 1
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_taken_where_there_is_no_choice(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert gpus.claim() is None and gpus.claimed() is None
    assert str(parse_device("auto")) == ("cuda" if count else "cpu")
