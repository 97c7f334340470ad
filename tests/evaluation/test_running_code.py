"""Tasks that run what the model writes: not without a word of the user, and by themselves as far as processes go."""

from __future__ import annotations

import time

import pytest
import tiny_tasks
from lm_eval.api.model import LM

from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.evaluation import running_code, task_names, tasks
from alps_exp.runs.naming import config_hash
from alps_exp.runs.settings import resolve

ROWS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def {name}(n):\n    """Return n {sign} 1."""\n',
        "canonical_solution": f"    return n {sign} 1\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {value}\n",
        "entry_point": name,
    }
    for number, (name, sign, value) in enumerate((("more", "+", 2), ("less", "-", 0)))
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("code")
    tiny_tasks.write(root / "humaneval" / "test.jsonl", ROWS)
    return str(root)


class Writer(LM):
    """Writes the same to every prompt."""

    def generate_until(self, requests):
        return ["    return n + 1\n" for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.mark.slow
def test_programs(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert running_code.passes("import os\nassert 'HF_TOKEN' not in os.environ and os.listdir() == []")
    assert not running_code.passes("assert False") and not running_code.passes("exit(0)")
    start = time.perf_counter()
    assert not running_code.passes("while True: pass", seconds=0.3) and time.perf_counter() - start < 5
    assert [running_code.pass_at(1, 4, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]


@pytest.mark.slow
def test_a_task_that_runs_code_is_scored_by_its_tests(source):
    loaded, _ = task_names.load(["humaneval"], None, source, run_code=True)
    step = tasks.Pass("", ("humaneval",), loaded, {}, {}, {}, {"humaneval": 0})
    with task_names.calling_lm_eval():
        (row,) = tasks._rows(step, tasks._evaluate(step, Writer(), True), "auto")
    assert (row["dataset"], row["metric"], row["value"]) == ("humaneval", "pass@1 (create_test)", 0.5)
    assert row["shown"] and row["better"] == "higher" and row["samples"] == 2


@pytest.mark.slow
def test_without_permission_it_is_refused_and_the_permission_changes_no_run(tiny_llama, source):
    words = [*tiny_tasks.settings(tiny_llama, source), "eval.tasks=[humaneval]"]
    with pytest.raises(UserError, match=r"humaneval runs the programs that the model writes.*eval\.run_code=true"):
        resolve(compose(words))
    assert config_hash(compose(words)) == config_hash(compose([*words, "eval.run_code=true"]))
