"""Programs that a model wrote, run to see whether they pass their tests: what HumanEval and its like ask for.

Stands in for the hub's metric `code_eval`, which is code that is downloaded. A program runs in a process of its own, in
an empty folder, with an empty environment (no tokens), for seconds, and with bounded memory and files. That keeps
accidents away and is no sandbox: it may read this user's files and use the network. Hence `eval.run_code`.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from unittest import mock

from ..base.errors import UserError

SECONDS = 5.0
_BYTES = 4 << 30


def refuse_unless(allowed: bool, name: str) -> None:
    """Raise UserError for a task that runs what the model writes, unless the user has said that it may."""
    if not allowed:
        raise UserError(
            f"task {name} runs the programs that the model writes, on this machine and as this user: give "
            "eval.run_code=true where that does no harm (a container without network), or leave the task out"
        )


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends by itself, without an error, within the time."""
    sign = secrets.token_hex(16)  # which one that calls exit(0) does not print
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{program}\n__import__('sys').__stdout__.write('\\n{sign}')\n"],
            cwd=folder, env={"PATH": os.defpath, "HOME": folder}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=_bound,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode == 0 and said.endswith(sign.encode())


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def pass_at(passed: int, count: int, k: int) -> float:
    """Probability that one of k of `count` programs, of which `passed` do, passes (Chen et al., 2021)."""
    return 1.0 - math.comb(count - passed, k) / math.comb(count, k)


class CodeEval:
    """The part of the hub's metric `code_eval` that lm-eval's tasks call."""

    def compute(self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_):
        """Mean pass@k of each k over problems.

        Args:
            references: tests of each problem.
            predictions: programs for each problem, to be followed by its tests.
            k: each at most the number of programs.
        """
        found = [
            (sum(passes(f"{program}\n{test}") for program in programs), len(programs))
            for test, programs in zip(references, predictions, strict=True)
        ]
        return {f"pass@{each}": math.fsum(pass_at(*pair, each) for pair in found) / len(found) for each in k}, {}


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Around the loading of lm-eval's tasks, whose files ask the hub for the metric."""
    import evaluate

    load = evaluate.load
    with mock.patch.object(
        evaluate, "load", lambda path, *words, **more: CodeEval() if path == "code_eval" else load(path, *words, **more)
    ):
        yield
