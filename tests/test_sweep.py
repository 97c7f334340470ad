"""Sweeps in one process: what runs, what is skipped, when it stops."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from alps_exp import loop, progress_store, sweep
from alps_exp import run as runs
from alps_exp.blocks import BlockModel
from alps_exp.hidden import HiddenStates
from alps_exp.workspace import Workspace


@pytest.fixture
def words(tiny_llama: Path, text_file: Path, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    local = ["model=local", f"model.path={tiny_llama}", "data=local", f"data.path={text_file}", "device=cpu"]
    sizes = ["nsamples=2", "seqlen=32", "eval.windows=2", "eval.sample_tokens=0"]
    return [*local, *sizes, "method=dense,magnitude", "sparsity=0.5,2:4"]


def test_a_method_that_prunes_nothing_runs_once(words):
    configs = sweep.configurations(words)
    assert [cfg.method.name for cfg in configs] == ["dense", "magnitude", "magnitude"]
    assert len(sweep.configurations(["+sweeps=zeroshot"])) == 16


def rows(text: str) -> list[list[str]]:
    """The printed table's rows up to the seconds."""
    return [line.split()[:3] for line in text.splitlines() if line.startswith(("0 ", "0.5 ", "2:4 "))]


def test_finished_runs_are_skipped_and_give_the_same_table(words, capsys, monkeypatch, tmp_path):
    assert sweep.main(words) == 0
    first = capsys.readouterr().out
    assert len(rows(first)) == 3 and rows(first)[2][0] == "2:4"
    records = sorted(tmp_path.glob("results/runs/*/record.json"))
    assert len(records) == 3
    cut = json.loads(records[0].read_text())
    records[0].write_text(json.dumps({**cut, "status": "running"}))
    done = []
    own = runs.run
    monkeypatch.setattr(
        runs, "run", lambda cfg, directory, workspace: done.append(directory.name) or own(cfg, directory, workspace)
    )
    assert sweep.main(words) == 0
    assert done == [records[0].parent.name]
    assert rows(capsys.readouterr().out) == rows(first)


def test_it_stops_before_a_run_that_would_take_too_long(words, capsys, tmp_path):
    assert sweep.main(["--minutes", "0", *words]) == 0
    assert "stopped before run 2 of 3" in capsys.readouterr().out
    assert len(list(tmp_path.glob("results/runs/*/record.json"))) == 1


def test_a_failed_run_does_not_stop_the_others(words, capsys, monkeypatch):
    own = runs.run

    def fail(cfg, directory, workspace):
        if cfg.method.name == "dense":
            raise RuntimeError("out of luck")
        return own(cfg, directory, workspace)

    monkeypatch.setattr(runs, "run", fail)
    assert sweep.main(words) == 1
    captured = capsys.readouterr()
    assert "out of luck" in captured.err and len(rows(captured.out)) == 2


def test_a_mistake_is_one_line(words, capsys):
    assert sweep.main([*words, "method.power=3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_plans_and_settings_of_hydra(words, capsys, tmp_path):
    assert sweep.main([*words, "plan=true"]) == 0
    assert capsys.readouterr().out.count("run        tiny_llama-") == 3
    assert sweep.main([*words, "hydra.run.dir=elsewhere"]) == 2
    assert "python -m alps_exp -m" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_an_interrupted_sweep_says_so_in_one_line(words, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "solve_layers", interrupt)
    assert sweep.main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("alps_exp: interrupted: the same command goes on from ")


def test_a_failed_run_leaves_nothing_to_the_next(words, tmp_path, monkeypatch):
    """Neither hooks on the network that both use, nor a block that is still being written while its weights change."""
    cfg = sweep.configurations(words)[1]
    workspace = Workspace(keep=True)
    whole = runs.run(cfg, tmp_path / "whole", workspace)
    plain = OmegaConf.to_container(cfg, resolve=True)
    network = workspace.network(plain, torch.float32)
    original, write = loop.solve_layers, progress_store.write_tensors

    def slowly(*arguments):
        time.sleep(0.3)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(progress_store, "write_tensors", slowly)
        patch.setattr(loop, "solve_layers", lambda index, *rest: original(index, *rest) if index == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.run(cfg, tmp_path / "run", workspace)
        assert (tmp_path / "run/.progress/block-00000.json").is_file()
        assert workspace.network(plain, torch.float32) is network
    with monkeypatch.context() as patch:
        patch.setattr(BlockModel, "forward_block", lambda *_: 1 / 0)
        patch.setattr(HiddenStates, "advance", lambda *_: None)
        with pytest.raises(ZeroDivisionError):
            runs.run(cfg, tmp_path / "other", workspace)
    assert not any(module._forward_pre_hooks for module in network.modules())
    again = runs.run(cfg, tmp_path / "run", workspace)
    assert again["attempts"] == 2 and again["evaluations"] == whole["evaluations"]


def test_what_is_in_memory_is_not_read_from_files(words, tmp_path, monkeypatch):
    cfg, workspace = sweep.configurations(words)[0], Workspace(keep=True)
    network = workspace.network(OmegaConf.to_container(cfg, resolve=True), torch.float32)
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    # A workspace keeps the network and a copy of it, which may take half of the free memory.
    for number, (place, free, streamed) in enumerate(
        ((workspace, size, False), (Workspace(keep=True), 3 * size, True), (Workspace(keep=True), 5 * size, False))
    ):
        monkeypatch.setattr("alps_exp.workspace.free_host", lambda free=free: free)
        assert runs.run(cfg, tmp_path / str(number), place)["environment"]["streamed"] is streamed
