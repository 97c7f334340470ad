"""What several test files share: planted layers, counting rules, a stable reference selection, the command line."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from alps_exp.base.errors import UserError
from alps_exp.layer import registry
from alps_exp.layer.problem import LayerProblem
from alps_exp.layer.solver import Solver
from alps_exp.patterns import NM, Pattern
from alps_exp.runs import worker

ROOT = Path(__file__).parents[1]
PATTERNS = ("0.29", "0.5", "0.7", "0.9", "2:4", "4:8", "1:4", "2:3")


def planted_inputs(tokens: int, width: int, seed: int, sequences: int = 4) -> Tensor:
    """(tokens, width) float64 inputs as layers see them: correlated, of unequal scale, off zero, with a level that
    differs between sequences."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = max(width // 3, 1)
    scale = torch.exp(0.7 * normal(width))
    x = normal(tokens, rank) @ normal(rank, width) / rank**0.5 + 0.5 * normal(tokens, width)
    level = normal(sequences, width).repeat_interleave(tokens // sequences, 0)
    return (x + 0.3 * level + 0.4 * normal(width)) * scale


def planted(
    rows: int = 24, width: int = 48, tokens: int = 400, seed: int = 0, dtype=torch.float64, dead: tuple[int, ...] = ()
) -> LayerProblem:
    """A layer with planted inputs of 4 sequences; the inputs numbered in `dead` are always zero."""
    x = planted_inputs(tokens, width, seed)
    x[:, list(dead)] = 0
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return LayerProblem.from_inputs(weight.to(dtype), x, sequences=4, name="planted")


def selection_blocks(selection: str, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """The selection groups of an unstructured pattern as slices of a weight of this shape."""
    rows, width = shape
    if selection == "row":
        return [(slice(row, row + 1), slice(0, width)) for row in range(rows)]
    if match := re.fullmatch(r"block of (\d+) columns", selection):
        step = int(match[1])
        return [(slice(0, rows), slice(begin, min(begin + step, width))) for begin in range(0, width, step)]
    assert selection == "layer", f"a selection that no test knows: {selection}"
    return [(slice(0, rows), slice(0, width))]


def assert_exact(support: Tensor, pattern: Pattern, written: str, selection: str) -> None:
    """Every selection group of the support has exactly its count, by exact arithmetic on the pattern as written."""
    if isinstance(pattern, NM):
        kept, width = map(int, written.split(":"))
        assert (support.reshape(-1, width).sum(1) == kept).all()
        return
    level = Fraction(written)
    for rows, columns in selection_blocks(selection, tuple(support.shape)):
        part = support[rows, columns]
        if selection == "layer":
            assert abs(int(part.sum()) - (1 - level) * part.numel()) <= Fraction(1, 2)
        else:
            assert int((~part).sum()) == math.floor(level * part.numel())


def stable_top(score: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest entries of a vector, first entries first among equals, by a stable sort."""
    mask = np.zeros(score.shape, dtype=bool)
    mask[np.argsort(-score, kind="stable")[:count]] = True
    return mask


def methods_for_a_layer() -> list[str]:
    """The methods that need nothing but a layer; `given` needs a checkpoint, others a block or a model."""
    return [name for name in registry.methods() if name != "given" and isinstance(registry.solver(name), Solver)]


def process(*words: str, cwd: Path, module: str = "alps_exp", **environment: str) -> subprocess.CompletedProcess:
    """The command line as a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def records(directory: Path) -> list[dict]:
    """The records of the runs below a folder in which the command line was called."""
    return [json.loads(path.read_text()) for path in sorted((directory / "results" / "runs").glob("*/record.json"))]


def out_of_memory(monkeypatch, owner, name: str, when) -> None:
    """The method `name` of the class `owner` finds no memory whenever `when(self, *arguments)`."""
    original = getattr(owner, name)

    def failing(self, *arguments, **options):
        if when(self, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory (not really)")
        return original(self, *arguments, **options)

    monkeypatch.setattr(owner, name, failing)


@contextmanager
def interrupted(owner, name: str, at: int):
    """A run that ends with an error in the call number `at` of the function `name` of `owner`."""
    calls, original = itertools.count(1), getattr(owner, name)

    def failing(*arguments, **options):
        if next(calls) == at:
            raise RuntimeError("out of luck")
        return original(*arguments, **options)

    with mock.patch.object(owner, name, failing), pytest.raises(RuntimeError, match="out of luck"):
        yield


def parquet(path: Path, rows: list[str], column: str = "text") -> Path:
    """A parquet file of texts, as data sets of the hub are stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: rows, "number": list(range(len(rows)))}), path)
    return path


def refused(call, *words: str) -> str:
    """The message of the UserError that `call` raises: one line with all the words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    for word in words:
        assert word in message, f"{word!r} not in: {message}"
    return message


class Forked:
    """A process of a team that is forked from the tests' own, which has imported all that it needs.

    It takes the place of `together._start` where a test is not about starting. Nothing in it may go backwards: torch
    refuses gradients in a process that was forked behind others.
    """

    def __init__(self, request: Path, rank: int, size: int, port: int, held: int) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
                worker.main(request)
                os._exit(0)
            finally:
                os._exit(1)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Served:
    """A process of a team that is forked from one that has imported what it needs and computed nothing: in it, passes
    may go backwards."""

    def __init__(self, request: Path, rank: int, size: int, port: int, held: int) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["alps_exp.runs.run", "alps_exp.pruning.team", *_FAMILIES])
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
        self._process = server.Process(target=_serve, args=(environment, os.getcwd(), request))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


_FAMILIES = [f"transformers.models.{family}.modeling_{family}" for family in ("llama", "opt", "gpt2")]


def _serve(environment: dict[str, str], folder: str, request: Path) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    worker.main(request)


def interprets_loops() -> bool:
    """Whether Triton's interpreter takes loops to a bound given at run time: before 3.7 it made a number of an array
    of one entry, which NumPy refuses from 2.4 on."""

    def version(name: str) -> tuple[int, ...]:
        return tuple(map(int, metadata.version(name).split(".")[:2]))

    return version("triton") >= (3, 7) or version("numpy") < (2, 4)
