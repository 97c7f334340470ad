"""Sweeps in one process: what runs, what is left out, when it stops, what it says in the end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import words_for

from alps_exp.base.errors import UserError
from alps_exp.cli import command, launchers, overrides, sweep
from alps_exp.cli.cell import forecast
from alps_exp.cli.overrides import compose
from alps_exp.evaluation import perplexity
from alps_exp.model import faithful, loading
from alps_exp.model.blocks import BlockModel
from alps_exp.model.hidden import HiddenStates
from alps_exp.pruning import stages, store
from alps_exp.runs import provenance, workspace
from alps_exp.runs import run as runs
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace
from alps_exp.tables import make


@pytest.fixture
def single(tiny_llama: Path, text_file: Path, tmp_path, monkeypatch) -> list[str]:
    """The words of one run, to be started in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    workspace.shared.cache_clear()
    return words_for(tiny_llama, text_file, "nsamples=2", "seqlen=32", "eval.windows=2", "eval.sample_tokens=0")


@pytest.fixture
def words(single) -> list[str]:
    return ["-m", *single, "method=dense,magnitude", "sparsity=0.5,2:4"]


def call(words: list[str]) -> int:
    return command.guarded(lambda: command.command(words))


def cells(*words: str) -> list[sweep.Cell]:
    with overrides.initialized():
        return sweep.cells(overrides.expand(overrides.prepared(words))[1])


def folders() -> dict[str, Path]:
    return {path.parent.name.rsplit("-", 1)[0]: path.parent for path in Path("results/runs").glob("*/record.json")}


def record(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The runs that were begun, by name."""
    names, own = [], runs._execute

    def execute(*arguments):
        names.append(arguments[2].name)
        return own(*arguments)

    monkeypatch.setattr(runs, "_execute", execute)
    return names


@pytest.mark.slow
def test_a_method_that_prunes_nothing_runs_once(words):
    found = [cell.cfg.method.name for cell in cells(*words[1:], "seed=0,1")]
    assert found == ["dense"] + 4 * ["magnitude"]


def rows(text: str) -> list[list[str]]:
    """The printed table's rows up to the seconds."""
    return [line.split()[:3] for line in text.splitlines() if line.startswith(("0 ", "0.5 ", "2:4 "))]


@pytest.mark.slow
def test_complete_runs_are_left_out_and_give_the_same_table(words, capsys, ran, monkeypatch):
    loaded, load = [], loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *rest: loaded.append(rest) or load(*rest))
    assert call(words) == 0
    first = capsys.readouterr().out
    assert len(rows(first)) == 3 and rows(first)[2][0] == "2:4" and len(loaded) == 1
    assert "3 runs: 0 complete, 3 to run" in first and ": 0 complete before, 3 run now" in first
    assert sum(line.startswith("complete in ") for line in first.splitlines()) == 3
    assert len(ran) == 3 and ran[0].startswith("tiny_llama-dense-") and len(ran[0].split("-")) == 3
    cut = folders()["tiny_llama-magnitude-2of4-s0"]
    (cut / "record.json").write_text(json.dumps({**record(cut), "status": "running"}))
    ran.clear()
    assert call([*words, "hidden_states=host"]) == 0
    again = capsys.readouterr().out
    assert ran == [cut.name] and ": 2 complete before, 1 run now" in again
    assert rows(again) == rows(first)


@pytest.mark.slow
def test_records_of_other_code_are_a_choice(words, capsys, ran, monkeypatch):
    assert call([*words, "sparsity=0.5"]) == 0
    old = {name: record(place)["started"] for name, place in folders().items()}
    ran.clear()
    monkeypatch.setattr(provenance, "code_version", lambda: "0.2 (other)")
    capsys.readouterr()
    assert call(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2 of 3 runs are complete, but what they were made of has changed" in error
    assert all(f"complete={choice}" in error for choice in ("skip", "renew", "again")) and not ran
    assert call([*words, "complete=skip"]) == 0
    assert len(ran) == 1
    ran.clear()
    assert call([*words, "complete=renew"]) == 0
    assert len(ran) == 2 and call(words) == 0 and len(ran) == 2
    assert call([*words, "complete=again"]) == 0
    assert len(ran) == 5
    place = folders()["tiny_llama-dense"]
    assert json.loads((place / "record.previous.json").read_text())["environment"]["code"] == "0.2 (other)"
    assert old.keys() < folders().keys() and record(place)["config"]["complete"] == "again"


@pytest.mark.slow
def test_a_record_without_a_code_version_is_of_other_code(words, capsys):
    assert call([*words, "method=dense"]) == 0
    (place,) = folders().values()
    old = record(place)
    del old["environment"]["code"]
    (place / "record.json").write_text(json.dumps(old))
    assert call([*words, "method=dense"]) == 2
    assert "1 of 1 runs" in capsys.readouterr().err


@pytest.mark.slow
def test_it_starts_no_run_that_would_take_too_long(words, capsys, monkeypatch):
    """By a clock on which the first run takes 40 s, and the checks before it less than 20."""
    real = time.time
    monkeypatch.setattr("alps_exp.cli.cell.time", SimpleNamespace(time=lambda: real() + 40 * len(folders())))
    assert call([*words, "minutes=1"]) == 0
    assert len(folders()) == 1
    assert "1 run now, 2 left, where the same command goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_run_is_recorded_and_does_not_stop_the_others(words, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        own = runs.resolve
        checked = []

        def fail(cfg):
            checked.append(cfg)
            if cfg["method"]["name"] == "dense":
                raise RuntimeError("out of luck\nand more")
            return own(cfg)

        patch.setattr(runs, "resolve", fail)
        assert call(words) == 1
    captured = capsys.readouterr()
    place = folders()["tiny_llama-dense"]
    assert record(place)["status"] == "failed" and record(place)["error"]["type"] == "RuntimeError"
    lines = captured.err.splitlines()[-2:]
    assert lines[0] == "alps_exp: 1 of 3 runs did not complete:"
    assert lines[1].startswith(f"alps_exp: {place.name}: RuntimeError: out of luck; the trace is in ")
    assert "0 complete before, 2 run now, 1 failed" in captured.out
    assert call(words) == 0
    assert "2 complete before, 1 run now" in capsys.readouterr().out


@pytest.mark.slow
def test_lack_of_memory_is_one_failure(words, capsys, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(runs, "prune_blocks", exhausted)
    assert call(words) == 2  # all failures are the user's to mend
    assert record(folders()["tiny_llama-magnitude-u0.5-s0"])["error"]["type"] == "OutOfMemoryError"
    assert "2 of 3 runs did not complete:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("complete=maybe", "known: again, auto, renew, skip"),
        ("minutes=0", "minutes=0"),
        ("resume=results", "leave out -m"),
        ("hydra.sweep.subdir=x", "hydra.sweep.dir"),
        ("method.power=3", "power"),
    ],
)
def test_a_mistake_is_one_line(words, capsys, word, part):
    assert call([*words, word]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in error and not list(Path().iterdir())


@pytest.mark.slow
def test_a_sweep_of_a_file_names_its_runs(single, monkeypatch, capsys):
    words = [*single, "+sweeps=demo", "method=dense,magnitude", "sparsity=0.5,2:4", "hydra.sweep.dir=grid"]
    monkeypatch.setattr(runs, "run", lambda cfg, place, *_: 1 / 0)
    assert call(["-m", *words]) == 1
    manifest = json.loads(Path("grid/demo.sweep.json").read_text())
    names = [cell.directory.name for cell in cells(*words)]
    assert manifest == {"sweep": "demo", "words": words, "runs": names} and len(names) == 3
    assert call(["-m", *words, "seed=1"]) == 1
    assert len(json.loads(Path("grid/demo.sweep.json").read_text())["runs"]) == 3


@pytest.mark.parametrize(
    ("made", "works", "found"),
    [
        ([(10, 5.0)], [10, 15], ([5, 5], False)),  # all but alike
        ([(10, 5.0)], [1, 15], ([5, 5], True)),  # not above that
        ([(10, 5.0)], [10, 21], None),
        ([(0, 5.0)], [1], None),
        ([(0, 3.0), (10, 5.0)], [5, 20], ([4, 7], False)),
        ([(0, 90.0), (0, 3.0), (10, 5.0)], [5, 20], ([4, 7], False)),  # the first has loaded the model
        ([(1, 9.0), (10, 5.0)], [5], ([7], False)),  # more work never takes less time
        ([(1, 0.0), (3, 8.0)], [1, 4], ([2, 8], False)),  # nor has any run less than none
    ],
)
def test_the_time_left_is_told_by_the_runs_that_were_made(made, works, found):
    assert forecast(made, works) == (found and (pytest.approx(found[0]), found[1]))


@pytest.mark.slow
def test_an_interrupted_sweep_says_so_in_one_line(words, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "solve_layers", interrupt)
        assert call(words) == 130
    expected = "alps_exp: interrupted: 1 of 3 runs are complete, and the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert call(words) == 0


@pytest.mark.slow
def test_what_another_process_holds_is_waited_for(words, capsys, ran, monkeypatch):
    """Left for later at first; here the other one goes away while the sweep waits."""
    held = cells(*words[1:])[1].directory
    held.mkdir(parents=True)
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr(launchers, "time", SimpleNamespace(time=time.time, sleep=lambda _: os.close(descriptor)))
    assert call(words) == 0
    assert [name == held.name for name in ran] == [False, False, True]
    assert f"waiting for another process: {held.name}" in capsys.readouterr().out


@pytest.mark.slow
def test_what_another_process_holds_is_left_when_time_is_up(words, capsys, monkeypatch):
    held = cells(*words[1:])[1].directory
    held.mkdir(parents=True)
    with store.locked(held):
        monkeypatch.setattr(launchers, "time", SimpleNamespace(time=lambda: time.time() + 1e9))
        assert call([*words, "minutes=60"]) == 0
    assert "2 run now, 1 left" in capsys.readouterr().out


@pytest.mark.slow
def test_what_another_process_has_made_meanwhile_is_not_made_again(words, capsys, ran, monkeypatch):
    """The list of open runs is made before the others' locks are looked at."""
    monkeypatch.setattr(sweep, "_pending", list)
    for choice in ("auto", "skip", "renew"):
        assert call([*words, f"complete={choice}"]) == 0
        assert len(ran) == 3
    assert "3 complete before, 0 run now" in capsys.readouterr().out


@pytest.mark.slow
def test_a_single_run_keeps_nothing(single, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(runs, "Workspace", lambda: made.append(Workspace()) or made[-1])
    assert call([*single, "method=magnitude"]) == 0
    assert not made[0].keep and made[0]._network is None
    assert "mean relative loss" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_run_leaves_nothing_to_the_next(single, tmp_path, monkeypatch):
    """Neither hooks on the network that both use, nor a block that is still being written while its weights change."""
    cfg = compose([*single, "method=magnitude", "sparsity=0.5"])
    shared = Workspace(keep=True)
    whole = runs.run(cfg, tmp_path / "whole", shared)
    network = shared.network(resolve(cfg))
    original, write = stages.solve_layers, store.write_tensors

    def failing_later(layers, *rest):
        return original(layers, *rest) if ".0." in layers[0].name else 1 / 0

    def slowly(*arguments):
        time.sleep(0.3)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_tensors", slowly)
        patch.setattr(stages, "solve_layers", failing_later)
        with pytest.raises(ZeroDivisionError):
            runs.run(cfg, tmp_path / "run", shared)
        assert (tmp_path / "run/.progress/block-00000.json").is_file()
        assert shared.network(resolve(cfg)) is network
    with monkeypatch.context() as patch:
        patch.setattr(BlockModel, "forward_block", lambda *_, **__: 1 / 0)
        patch.setattr(HiddenStates, "advance", lambda *_, **__: None)
        patch.setattr(faithful, "ensure", lambda *_: None)
        with pytest.raises(ZeroDivisionError):
            runs.run(cfg, tmp_path / "other", shared)
    assert not any(module._forward_pre_hooks for module in network.modules())
    again = runs.run(cfg, tmp_path / "run", shared)
    assert again["attempts"] == 2 and again["evaluations"] == whole["evaluations"]


@pytest.mark.slow
def test_what_is_in_memory_is_not_read_from_files(single, tmp_path, monkeypatch):
    cfg, shared = compose([*single, "method=dense"]), Workspace(keep=True)
    network = shared.network(resolve(cfg))
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    # A workspace keeps the network and a copy of it, which may take half of the free memory.
    for number, (place, free, streamed) in enumerate(
        ((shared, size, False), (Workspace(keep=True), 3 * size, True), (Workspace(keep=True), 5 * size, False))
    ):
        monkeypatch.setattr("alps_exp.runs.workspace.free_host", lambda free=free: free)
        assert runs.run(cfg, tmp_path / str(number), place)["environment"]["streamed"] is streamed


@pytest.mark.slow
def test_a_changed_text_or_checkpoint_is_noticed(words, capsys, tmp_path, tiny_llama, text_file):
    text, folder = tmp_path / "text.txt", tmp_path / "tiny"
    text.write_bytes(text_file.read_bytes())
    shutil.copytree(tiny_llama, folder)
    own = [*words, "method=magnitude", "sparsity=0.5", f"model.path={folder}", f"data.path={text}"]
    assert call(own) == call(own) == 0
    text.write_text(text.read_text()[:-5000])
    capsys.readouterr()
    assert call(own) == 2
    assert "(text path)" in capsys.readouterr().err
    assert call([*own, "complete=renew"]) == call(own) == 0
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.5 * weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert call(own) == 2 and "(checkpoint model.safetensors)" in capsys.readouterr().err


@pytest.mark.slow
def test_what_died_comes_last(words, ran):
    """A run that takes its process with it must not be all that the next attempts do."""
    assert call(words) == 0
    dead, *_ = folders().values()
    for place in folders().values():
        content = {**record(place), "status": "running" if place == dead else "failed"}
        (place / "record.json").write_text(json.dumps(content))
    ran.clear()
    assert call(words) == 0
    assert len(ran) == 3 and ran[-1] == dead.name


@pytest.mark.slow
def test_a_users_own_sweep_has_its_table(words, capsys, tmp_path):
    (tmp_path / "own/sweeps").mkdir(parents=True)
    node = {"title": "Mine", "rows": ["sparsity"], "columns": ["method"], "plots": []}
    params = {"method": "dense,magnitude", "sparsity": "0.5,2:4"}
    yaml_text = f"# @package _global_\n{json.dumps({'table': node, 'hydra': {'sweeper': {'params': params}}})}\n"
    (tmp_path / "own/sweeps/mine.yaml").write_text(yaml_text)
    rest = [word for word in words if not word.startswith(("method=", "sparsity="))]
    assert call([*rest, "--config-dir", str(tmp_path / "own"), "+sweeps=mine"]) == 0
    assert "\nMine\n" in capsys.readouterr().out
    assert call([*rest, "method=magnitude", "sparsity=0.5"]) == 0  # the node plays no part in what a run is
    assert ": 1 complete before, 0 run now" in capsys.readouterr().out
    assert all("table" not in record(place)["config"] for place in folders().values())
    assert make.main([str(tmp_path / "results/runs"), str(tmp_path / "made")]) == 0
    assert (tmp_path / "made/mine.md").read_text().startswith("**Mine**") and not list(
        (tmp_path / "made").glob("mine-*")
    )


@pytest.mark.slow
def test_again_runs_whatever_the_clock_said_when_it_was_made(words, ran):
    own = [*words, "method=magnitude", "sparsity=0.5", "complete=again"]
    assert call(own) == 0
    (place,) = folders().values()
    (place / "record.json").write_text(json.dumps({**record(place), "started": "2099-01-01T00:00:00+00:00"}))
    assert call(own) == 0
    assert len(ran) == 2 and record(place)["started"] < "2099"


@pytest.mark.slow
@pytest.mark.parametrize("content", ["null", '{"schema": 99}'])
def test_a_record_that_cannot_be_read_is_kept_aside_and_its_run_made(words, capsys, ran, content):
    own = [*words, "sparsity=0.5"]
    assert call(own) == 0
    place = folders()["tiny_llama-magnitude-u0.5-s0"]
    (place / "record.json").write_text(content)
    capsys.readouterr()
    assert call(own) == 0
    captured = capsys.readouterr()
    assert ran[2:] == [place.name] and len(rows(captured.out)) == 2
    assert "record.unreadable.json" in captured.err and (place / "record.unreadable.json").read_text() == content


@pytest.mark.slow
def test_an_infinite_perplexity_is_a_result(words, capsys, monkeypatch):
    monkeypatch.setattr(perplexity, "perplexity", lambda *_: float("inf"))
    assert call([*words, "sparsity=0.5"]) == 0
    captured = capsys.readouterr()
    assert "perplexity inf" in captured.out and "2 run now" in captured.out and not captured.err.count("did not")
    for place in folders().values():
        text = (place / "record.json").read_text()
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert record(place)["status"] == "complete" and record(place)["evaluations"][0]["value"] == "inf"


@pytest.mark.slow
def test_what_is_refused_for_another_process_writes_nothing(single, words, capsys):
    (cell,) = cells(*single, "method=magnitude", "sparsity=0.5")
    cell.directory.mkdir(parents=True)
    with store.locked(cell.directory):
        assert call([*single, "method=magnitude", "sparsity=0.5"]) == 2
        assert "another process is at work" in capsys.readouterr().err
        outcome = call(["-m", *single, "method=magnitude", "sparsity=0.5", "minutes=0.001"])
        assert outcome == 0 and not list(cell.directory.iterdir())
    assert call([*single, "method=magnitude", "sparsity=0.5"]) == 0
    assert {path.name for path in (cell.directory / ".hydra").iterdir()} == {
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("method", "status"), [("magnitude", "complete"), ("wanda", "failed")])
def test_a_directory_of_another_configuration_is_refused_before_anything_runs(single, capsys, ran, method, status):
    place, own = Path("mine"), [*single, "eval=none", "hydra.run.dir=mine"]
    assert call([*own, "method=magnitude"]) == 0
    (place / "record.json").write_text(json.dumps({**record(place), "status": status}))
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call([*own, f"method={method}", "nsamples=3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "another configuration" in error and "nsamples 2 → 3" in error
    assert ("method.name" in error) == (method == "wanda") and "hydra.run.dir=DIR" in error and len(ran) == 1
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="another configuration"):
        runs.run(compose([*single, "method=wanda"]), place)
    assert (
        call([*own, "method=magnitude", f"model.path={os.path.relpath(record(place)['config']['model']['path'])}"]) == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("left", ["nothing", "model", "block", "previous"])
def test_a_directory_in_which_nothing_was_begun_is_free(single, capsys, ran, monkeypatch, left):
    own, place = [*single, "eval=none", "method=magnitude", "hydra.run.dir=mine"], Path("mine")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_execute", refuse)
        assert call(own) == 2
    assert record(place)["status"] == "failed"
    file = {"model": "model/x", "block": ".progress/block-00000.json", "previous": "record.previous.json"}.get(left)
    if file:
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text("{}")
    assert call([*own, "nsamples=3"]) == (2 if file else 0)
    assert ("which would be lost" in capsys.readouterr().err) == bool(file)
    assert (record(place)["status"], len(ran)) == (("failed", 0) if file else ("complete", 1))


def refuse(*arguments):
    raise UserError("no")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("hydra:\n  sweeper:\n    params:\n      seed: 0,1\n", "sweeps/mine.yaml needs '# @package _global_'"),
        ("# @package _global_\ntable: [a]\n", "['a'] is not allowed"),
        ("# @package _global_\ntable: words\n", "words is not allowed"),
        ("# @package _global_\ntable: {rows: [model, model]}\n", "has model twice"),
        ("# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: range(3,0)\n", "names no value"),
        ("# @package _global_\nhydra: [\n", "mine.yaml, line 3, cannot be read as yaml"),
    ],
    ids=["package", "list", "word", "twice", "empty", "broken"],
)
def test_a_sweeps_file_is_checked_before_its_runs(words, capsys, ran, content, told):
    Path("own/sweeps").mkdir(parents=True)
    Path("own/sweeps/mine.yaml").write_text(content)
    assert call([*words, "--config-dir", "own", "+sweeps=mine"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not ran and not Path("results").exists()


@pytest.mark.parametrize(
    ("word", "told"),
    [("method=glob(alsp*)", "alps, "), ("seed=range(3,0)", "as in seed=0,1,2"), ("seed=glob(*)", "as in seed=0,1,2")],
)
def test_a_sweep_over_nothing_is_refused(single, capsys, word, told):
    assert call(["-m", *single, word]) == 2
    assert told in capsys.readouterr().err and not Path("results").exists()
