"""Sweeps whose runs are made by other processes, which may die; and two sweeps of one grid at once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": [
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ],
}
# A method that kills its process.
DEADLY = """
import os, signal
from dataclasses import dataclass
from alps_exp.baselines.magnitude import Magnitude

@dataclass(frozen=True)
class Deadly(Magnitude):
    def solve(self, problem, pattern):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def words(tiny_opt, text_file) -> list[str]:
    local = ["model=local", f"model.path={tiny_opt}", "data=local", f"data.path={text_file}", "device=cpu"]
    return ["-m", *local, "nsamples=2", "seqlen=32", "eval.windows=2", "eval.sample_tokens=0"]


def start(folder: Path, words: list[str], **environment: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **environment}
    env |= {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "alps_exp", *words]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def need(launcher: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.hydra_{launcher}_launcher") is None:
        pytest.skip(f"needs the extra {launcher}: pip install -e '.[{launcher}]'")


def records(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("results/runs/*/record.json")}


def results(record: dict) -> tuple:
    """What must not depend on the process."""
    return record["status"], record["evaluations"], [row["relative_loss"] for row in record["layers"]]


@pytest.fixture
def expected(tmp_path, words) -> dict[str, tuple]:
    """What a sweep in one process makes of the words."""
    folder = tmp_path / "one"
    folder.mkdir()
    code, _, error = end(start(folder, [*words, "method=dense,magnitude", "sparsity=0.55,2:4"]))
    assert code == 0, error
    return {name: results(record) for name, record in records(folder).items()}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_processes_make_the_same_records(launcher, tmp_path, words, expected):
    need(launcher)
    grid = [*words, "method=dense,magnitude", "sparsity=0.55,2:4", *LAUNCHERS[launcher]]
    code, out, error = end(start(tmp_path, grid))
    assert code == 0, error
    assert {name: results(record) for name, record in records(tmp_path).items()} == expected
    assert ": 0 complete before, 3 run now" in out
    if launcher == "joblib":
        assert sum(": complete in " in line for line in out.splitlines()) == 3
        code, out, _ = end(start(tmp_path, grid))
        assert code == 0 and ": 3 complete before, 0 run now" in out


@pytest.mark.parametrize("launcher", ["joblib", "submitit"])
def test_a_worker_that_dies_costs_no_other_run(launcher, tmp_path, words):
    need(launcher)
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "deadly.yaml").write_text("name: deadly\n_target_: deadly.Deadly\n")
    (tmp_path / "deadly.py").write_text(DEADLY)
    grid = [*words, "method=magnitude,deadly,wanda", "eval=none", "--config-dir", ".", *LAUNCHERS[launcher]]
    code, out, error = end(start(tmp_path, grid, PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)])))
    assert code == 1, error
    status = {record["method"]: record["status"] for record in records(tmp_path).values()}
    assert status == {"magnitude": "complete", "deadly": "failed", "wanda": "complete"}
    assert "2 run now, 1 failed" in out
    assert "alps_exp: 1 of 3 runs did not complete:" in error
    last = error.splitlines()[-1]
    assert last.startswith("alps_exp: tiny_opt-deadly-u0.7-s0-") and "its process ended" in last


def test_two_sweeps_of_one_grid_divide_it(tmp_path, words):
    grid = [
        *words,
        "method=magnitude,wanda,sparsegpt",
        "sparsity=0.5,0.6,0.7,0.8",
        "eval=none",
        "nsamples=64",
        "seqlen=128",
    ]
    ends = [end(process) for process in [start(tmp_path, grid), start(tmp_path, grid)]]
    assert [code for code, *_ in ends] == [0, 0], ends
    made = [line.split(":")[0] for _, out, _ in ends for line in out.splitlines() if ": complete in " in line]
    assert len(made) == len(set(made)) == 12
    assert all(record["status"] == "complete" and record["attempts"] == 1 for record in records(tmp_path).values())
    assert not list(tmp_path.glob("results/runs/*/record.previous.json"))


def test_presets_and_plain_runs_where_no_launcher_is_installed(tmp_path):
    """An empty package hides the plugins."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert end(start(tmp_path, ["--help"], PYTHONPATH=path))[0] == 0
    assert end(start(tmp_path, ["--cfg", "job"], PYTHONPATH=path))[0] == 0
    for choice, extra in (("slurm", "submitit"), ("ray_gpu", "ray"), ("joblib", "joblib")):
        code, _, error = end(start(tmp_path, ["-m", "seed=0,1", f"hydra/launcher={choice}"], PYTHONPATH=path))
        assert code == 2 and error.count("\n") == 1 and f"pip install 'alps-exp[{extra}]'" in error


@pytest.mark.parametrize(("choice", "extra"), [("slurm", "submitit"), ("ray_gpu", "ray")])
def test_presets_compose(tmp_path, choice, extra):
    need(extra)
    code, out, error = end(start(tmp_path, [f"hydra/launcher={choice}", "--cfg", "hydra", "-p", "hydra.launcher"]))
    assert code == 0, error
    assert {"slurm": "max_num_timeout: 10", "ray_gpu": "num_gpus: 1"}[choice] in out
