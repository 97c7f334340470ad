"""Sweeps in one process: what runs, what is skipped, when it stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alps_exp import run as runs
from alps_exp import sweep


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


def test_finished_runs_are_skipped_and_give_the_same_table(words, capsys, monkeypatch, tmp_path):
    assert sweep.main(words) == 0
    first = capsys.readouterr().out
    assert first.count("| tiny_llama") == 3 and "2:4" in first
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

    def rows(text):
        return [line.split("|")[2:8] for line in text.splitlines() if line.startswith("| tiny_llama")]

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
    assert "out of luck" in captured.err and captured.out.count("| tiny_llama") == 2


def test_a_mistake_is_one_line(words, capsys):
    assert sweep.main([*words, "method.power=3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
