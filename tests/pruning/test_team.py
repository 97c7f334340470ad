"""Several processes that prune one model, against one process."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import Forked, planted, planted_inputs
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny import execute, words_for

from alps_exp.base.errors import UserError
from alps_exp.calibration.capture import Accumulator
from alps_exp.cli.overrides import compose
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.methods.alps import Alps
from alps_exp.patterns import parse_sparsity
from alps_exp.pruning.joint import JointLosses
from alps_exp.pruning.store import HeldError
from alps_exp.pruning.team import Team
from alps_exp.runs import together
from alps_exp.runs.settings import resolve

pytestmark = pytest.mark.heavy  # starts processes


@pytest.fixture
def settings(tiny_llama: Path, text_file: Path) -> list[str]:
    return words_for(
        tiny_llama, text_file, "nsamples=5", "seqlen=64", "eval.windows=2", "eval.sample_tokens=0", "method=sparsegpt"
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# Uneven shares (3 and 2 windows); DSnoT also sums means and variances.
@pytest.mark.parametrize("more", [["stream=true", "data.holdout=3"], ["method=dsnot", "propagate=dense"]])
def test_the_same_as_one_process(settings, tmp_path, monkeypatch, more):
    monkeypatch.setattr(together, "_start", Forked)
    one = execute(settings, tmp_path / "one", "save=true", *more)
    two = execute(settings, tmp_path / "two", "save=true", "devices=2", *more)
    assert (two["status"], two["attempts"]) == ("complete", 1)
    assert not (tmp_path / "two" / ".progress").exists()
    for row, other in zip(one["layers"], two["layers"], strict=True):
        assert (row["name"], row["tokens"]) == (other["name"], other["tokens"])
        assert other["relative_loss"] == pytest.approx(row["relative_loss"], rel=1e-4)
        if "stream=true" in more:
            assert other["held_out_loss"] == pytest.approx(row["held_out_loss"], rel=1e-4)
    weights, others = (tensors(tmp_path / name / "model") for name in ("one", "two"))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight == 0, others[name] == 0)
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-5)
    assert two["evaluations"][0]["value"] == pytest.approx(one["evaluations"][0]["value"], rel=1e-4)


def test_a_process_that_fails_fails_the_run_in_one_line(settings, tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(together, "_start", Forked)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj.*1 NaN"):
        execute(settings, tmp_path / "run", f"model.path={broken}", "devices=2")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["devices=0"], "devices=0 is not allowed"),
        (["devices=9"], "devices=9 is more than the windows"),
        (["devices=2", "resumable=false"], "devices=2 needs resumable=true"),
        (["devices=2", "device=cuda:1"], "names one device"),
    ],
)
def test_refused_before_anything_starts(settings, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        resolve(compose([*settings, *more]))


def test_work_goes_to_whoever_has_least():
    team = Team(1, 2, torch.device("cpu"))
    groups = [([name], None) for name in "abcd"]
    assert team.divide(groups, [3.0, 9.0, 4.0, 1.0]) == [0, 2, 3]
    assert [len(Team(rank, 3, torch.device("cpu")).windows(torch.zeros(7, 4))) for rank in range(3)] == [3, 2, 2]


def test_idle_processes_take_parts_of_the_costliest_group(tmp_path):
    """ALPS's four inverses of the wide layer are divided over two processes; a part is taken once."""
    port = together._free_port()
    torch.multiprocessing.start_processes(_divide, (port, tmp_path), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert (one["own"], one["share"], two["own"], two["share"]) == ([1], [0, 1], [0], [2, 3])
    assert one["taken"] == [2, 3] and one["again"] is None
    assert one["difference"] < 1e-5  # to what one process makes by itself
    assert one["loss"] == pytest.approx(one["expected"], rel=1e-2)
    for found, rows in ((one, 24), (one, 1), (two, 24), (two, 1)):
        assert found[f"together{rows}"] == pytest.approx(found[f"alone{rows}"], rel=1e-5)


def _measured_by_both(team: Team, problem: LayerProblem) -> dict[str, float]:
    """The loss of the layer that the first process has solved, by both and alone, of 24 rows and of one."""
    found = {}
    for rows in (24, 1):
        dense = LayerProblem(problem.weight[:rows], problem.inputs)
        pruned = dense.weight * (dense.weight.abs() > dense.weight.abs().median())
        joint = JointLosses(team, ["layer96"], problem.inputs)
        if team.rank == 0:
            joint.solved.append(types.SimpleNamespace(layer=types.SimpleNamespace(name="layer96"), problem=dense))
        joint.prepare({"layer96": types.SimpleNamespace(weight=dense.weight)})
        together = joint.losses({"layer96": types.SimpleNamespace(weight=pruned)})["layer96"]
        found |= {f"together{rows}": together, f"alone{rows}": dense.relative_loss(pruned)}
    return found


def _divide(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    team, solver, groups = Team.join("cpu"), Alps(), []
    for width in (16, 96):
        sums = Accumulator(width, Statistics.GRAM, team.device)
        inputs = planted_inputs(400, width, 0).float()
        sums.add(team.windows(inputs.view(4, 100, width)))
        groups.append(([f"layer{width}"], sums))
    own = team.divide(groups, [solver.flops(24, width) for width in (16, 96)], solver.parts(team.device))
    gram, found = groups[1][1].inputs("one").gram, {"own": own, "share": team.share}
    weight = planted(rows=24, width=96, tokens=400, dtype=torch.float32).weight
    problem = LayerProblem(weight, Inputs(gram=gram))
    if rank == 0:
        elsewhere, taken, parts = team.elsewhere(gram), [], {}

        def wait(index: int) -> torch.Tensor:
            taken.append(index)
            return parts.setdefault(index, elsewhere[index]())

        watched = {index: lambda index=index: wait(index) for index in elsewhere}
        solved = solver.solve(LayerProblem(weight, Inputs(gram=gram, elsewhere=watched)), parse_sparsity("0.7"))
        found |= {"taken": taken, "again": elsewhere[2](), "loss": problem.relative_loss(solved.weight)}
        found["expected"] = problem.relative_loss(solver.solve(problem, parse_sparsity("0.7")).weight)
        own = dict(zip(parts, solver.make_parts(problem.inputs, list(parts)), strict=True))
        found["difference"] = max(float((own[k] - parts[k]).norm() / own[k].norm()) for k in parts)
    else:
        team.hand_over(solver.make_parts(problem.inputs, team.share), ["layer96"])
    team.exchange({})
    found |= _measured_by_both(team, problem)
    torch.save(found, folder / f"{rank}.pt")
    team.leave()


def test_killed_processes_go_on(settings, tmp_path, monkeypatch):
    """The run is killed after its first block; its processes end with it, and the same command goes on."""
    folder = tmp_path / "killed"
    script = (
        "import sys; from pathlib import Path\n"
        "from alps_exp.runs import run; from alps_exp.cli.overrides import compose\n"
        "run.run(compose(sys.argv[2:]), Path(sys.argv[1]))"
    )
    words = [*settings, "devices=2"]
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / ".progress" / "block-00000.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, "processes outlive their run"
        time.sleep(0.05)
    monkeypatch.setattr(together, "_start", Forked)
    again = execute(settings, folder, "devices=2")
    undisturbed = execute(settings, tmp_path / "whole")
    assert again["status"] == "complete" and again["attempts"] >= 2
    assert not list(folder.glob(".team-*"))
    losses = [[row["relative_loss"] for row in record["layers"]] for record in (again, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_processes_end_with_a_parent_that_is_killed_while_they_are_starting(settings, tmp_path):
    """At any moment: they have not imported anything yet, or are at it."""
    cfg = json.dumps(OmegaConf.to_container(compose(settings), resolve=True))
    script = (
        "import json, sys; from pathlib import Path; import torch; from alps_exp.runs import together\n"
        "together.prune_together(json.loads(sys.argv[2]), Path(sys.argv[1]), torch.device('cpu'), 2)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), cfg], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(children := _children(process.pid)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    assert (tmp_path / ".team.lock").exists()
    process.kill()
    together.outlast(tmp_path)  # their lock is held until they have ended
    assert not any(_alive(child) for child in children) and not (tmp_path / ".team.lock").exists()
    process.wait()


def test_a_team_does_not_begin_beside_an_earlier_one(tmp_path, monkeypatch):
    together.outlast(tmp_path)
    with together._team_lock(tmp_path):
        monkeypatch.setattr(together, "_PATIENCE", 0.2)
        with pytest.raises(HeldError, match="still at work"):
            together.outlast(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_whose_parent_is_gone_does_nothing(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "alps_exp.runs.worker", str(tmp_path / "none"), "1"], capture_output=True
    )
    assert answer.returncode == 1 and not answer.stderr


def test_the_record_is_told_what_any_process_did_in_a_plainer_way(tmp_path):
    for rank, lines in enumerate([["no kernel"], ["no graph", "no kernel"]]):
        answer = {"peak_device_bytes": 5 + rank, "fallbacks": lines}
        (tmp_path / f"answer-{rank}.json").write_text(json.dumps(answer))
    processes = [types.SimpleNamespace(poll=lambda: 0)] * 2
    assert together._wait(processes, tmp_path) == (6, ["no kernel", "no graph"])
