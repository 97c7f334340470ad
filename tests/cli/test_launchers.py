"""Sweeps whose runs are made by other processes, which may die."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT
from tiny import words_for

from alps_exp.cli import command, launchers
from alps_exp.cli.cell import Outcome
from alps_exp.cli.sweep import Cell
from alps_exp.pruning import store
from alps_exp.runs.record import RunRecord

pytestmark = pytest.mark.heavy  # starts processes

# A method that kills its process.
DEADLY = """
import os, signal
from dataclasses import dataclass
from alps_exp.baselines.magnitude import Magnitude

@dataclass(frozen=True)
class Deadly(Magnitude):
    def _solve(self, problem, pattern):
        os.kill(os.getpid(), signal.SIGKILL)
"""

# Stand-ins for SLURM's commands: a job begins at once, on this machine.
SLURM = {
    "sbatch": """script="${@: -1}"; cp "$script" "$JOBS/script"
export SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
setsid bash "$script" > "$JOBS/log" 2>&1 < /dev/null &
echo "Submitted batch job 7" """,
    "srun": """while [[ "$1" == --* ]]; do [[ "$1" == --unbuffered ]] || shift; shift; done; exec "$@" """,
    "sacct": """echo "JobID|State|NodeList" """,
}


@pytest.fixture
def words(tiny_opt, text_file, tmp_path, monkeypatch) -> list[str]:
    for name, value in {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    local = words_for(tiny_opt, text_file)
    return ["-m", *local, "nsamples=2", "seqlen=32", "eval.windows=2", "eval.sample_tokens=0"]


def process(*words: str, python_path: Sequence[Path] = (ROOT,)) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path))}
    return subprocess.run(
        [sys.executable, "-m", "alps_exp", *words], env=env, capture_output=True, text=True, timeout=300
    )


def need(launcher: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.hydra_{launcher}_launcher") is None:
        pytest.skip(f"needs the extra {launcher}: pip install -e '.[{launcher}]'")


def results() -> dict[str, tuple]:
    """What must not depend on the process that made it, by run; the folder of runs is put aside."""
    folder = Path("results/runs")
    found = {}
    for path in folder.glob("*/record.json"):
        record = json.loads(path.read_text())
        losses = [row["relative_loss"] for row in record["layers"]]
        found[path.parent.name] = (record["status"], record["evaluations"], losses)
    folder.rename(f"results/{len(list(Path('results').iterdir()))}")
    return found


def in_one_process(*words: str) -> dict[str, tuple]:
    assert command.guarded(lambda: command.command(list(words))) == 0
    return results()


def test_joblib_and_a_worker_that_dies(words, tmp_path, monkeypatch, capfd):
    need("joblib")
    from joblib.externals.loky import get_reusable_executor

    expected = in_one_process(*words, "method=magnitude")
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "deadly.yaml").write_text("name: deadly\n_target_: deadly.Deadly\n")
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    grid = [*words, "method=deadly,magnitude", "--config-dir", ".", "hydra/launcher=joblib"]
    capfd.readouterr()
    try:
        assert command.guarded(lambda: command.command([*grid, "hydra.launcher.n_jobs=2"])) == 1
    finally:
        get_reusable_executor().shutdown(wait=True)
    out, error = capfd.readouterr()
    found = results()
    (dead,) = found.keys() - expected.keys()
    assert found.pop(dead)[0] == "failed" and found == expected
    assert sum(line.startswith("complete in ") for line in out.splitlines()) == 1
    assert "0 complete before, 1 run now, 1 failed" in out
    first, last = error.splitlines()[-2:]
    assert first == "alps_exp: 1 of 2 runs did not complete:"
    assert last.startswith(f"alps_exp: {dead}: its process ended (TerminatedWorkerError: ")


def test_submitit(words, tmp_path, monkeypatch):
    """Processes of this machine; and the preset for SLURM, as far as submitit goes."""
    need("submitit")
    expected = in_one_process(*words, "method=dense,magnitude")
    local = in_one_process(*words, "method=magnitude", "hydra/launcher=submitit_local")
    assert len(local) == 1 and local.items() <= expected.items()
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path))
    found = in_one_process(*words, "method=dense", "hydra/launcher=slurm", "hydra.launcher.partition=fast")
    assert len(found) == 1 and found.items() <= expected.items()
    script = (tmp_path / "script").read_text()
    assert all(f"#SBATCH --{line}\n" in script for line in ("gpus-per-node=1", "partition=fast", "time=720"))


def test_ray(words):
    need("ray")
    expected = in_one_process(*words, "method=dense,magnitude")
    local = ["+hydra.launcher.ray.init.num_cpus=1", "+hydra.launcher.ray.init.include_dashboard=false"]
    try:
        assert in_one_process(*words, "method=dense,magnitude", "hydra/launcher=ray", *local) == expected
    finally:
        sys.modules["ray"].shutdown()


class Workers:
    """A launcher whose batch breaks when it comes to a deadly run, with the one before it still under way."""

    def __init__(self, deadly: set[str]) -> None:
        self.deadly, self.batches = deadly, []

    def __call__(self, cells: Sequence[Cell]) -> list[Outcome]:
        names = [cell.directory.name for cell in cells]
        self.batches.append(names)
        for number, cell in enumerate(cells):
            self.write(cell, "running")
            if cell.directory.name in self.deadly:
                raise RuntimeError("a worker died")
            following = names[number + 1 : number + 2]
            if not self.deadly.intersection(following):
                self.write(cell, "complete")
        return [Outcome(name, "completed") for name in names]

    @staticmethod
    def write(cell: Cell, status: str) -> None:
        cell.directory.mkdir(exist_ok=True)
        names = {"model": "m", "method": "alps", "sparsity": "0.7", "seed": 0}
        RunRecord(status=status, config={}, config_hash=cell.directory.name, **names).write(cell.directory)


def test_runs_that_were_cut_are_repeated_one_by_one(tmp_path):
    cells = [Cell(tmp_path / name, [], None, None) for name in "abcdefg"]
    workers = Workers({"c", "f"})
    found = {outcome.name: outcome for outcome in launchers._outlive(workers, cells)}
    assert workers.batches == [list("abcdefg"), list("defg"), ["g"], ["b"], ["c"], ["e"], ["f"]]
    assert {name for name, outcome in found.items() if outcome.status == "completed"} == set("abdeg")
    assert found["c"].message == "its process ended (RuntimeError: a worker died)"
    record = json.loads((tmp_path / "c" / "record.json").read_text())
    assert record["status"] == "failed" and record["error"] == {"type": "RuntimeError", "message": "a worker died"}


def test_a_run_that_dies_before_its_first_word_is_found_too(tmp_path):
    class Silent(Workers):
        @staticmethod
        def write(cell, status):
            if cell.directory.name != "b":
                Workers.write(cell, status)

    found = launchers._outlive(Silent({"b"}), [Cell(tmp_path / name, [], None, None) for name in "abc"])
    assert {outcome.name: outcome.status for outcome in found} == {"a": "completed", "b": "failed", "c": "completed"}


def test_what_still_runs_after_a_break_is_held(tmp_path):
    cells = [Cell(tmp_path / name, [], None, None) for name in "ab"]
    workers = Workers({"b"})
    cells[0].directory.mkdir()
    with store.locked(cells[0].directory):
        found = {outcome.name: outcome.status for outcome in launchers._outlive(workers, cells)}
    assert found == {"a": "held", "b": "failed"}


def test_a_launcher_that_starts_nothing_is_no_failure_of_runs(tmp_path):
    def broken(cells):
        raise RuntimeError("no cluster here")

    with pytest.raises(RuntimeError, match="no cluster here"):
        launchers._outlive(broken, [Cell(tmp_path / "a", [], None, None)])


def test_presets_and_questions_where_no_launcher_is_installed(words, tmp_path):
    """An empty package hides the plugins."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").write_text("")
    path = [tmp_path, ROOT]
    assert process("--help", python_path=path).returncode == 0
    assert process("--cfg", "job", python_path=path).returncode == 0
    for choice, extra in (("slurm", "submitit"), ("ray_gpu", "ray"), ("joblib", "joblib")):
        end = process("-m", "seed=0,1", f"hydra/launcher={choice}", python_path=path)
        assert end.returncode == 2 and end.stderr.count("\n") == 1
        assert f"pip install 'alps-exp[{extra}]'" in end.stderr


@pytest.mark.parametrize(("choice", "extra"), [("slurm", "submitit"), ("ray_gpu", "ray")])
def test_presets_compose(choice, extra, capsys):
    need(extra)
    assert command.command([f"hydra/launcher={choice}", "--cfg", "hydra", "-p", "hydra.launcher"]) == 0
    assert {"slurm": "max_num_timeout: 10", "ray_gpu": "num_gpus: 1"}[choice] in capsys.readouterr().out
