"""Benchmarks still fit the package: each can be imported, and that of one layer measures."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import ROOT

FILES = sorted((ROOT / "benchmarks").glob("*.py"))  # the source archive has none


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch):
    """Benchmarks import each other, as a script's neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def loaded(path):
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_benchmark_can_be_imported(path):
    assert callable(loaded(path).main)


@pytest.mark.slow
@pytest.mark.skipif(not FILES, reason="no benchmarks here")
def test_the_ablation_prints_a_row_for_each_variant(tiny_llama, text_file, monkeypatch, capsys):
    ablation = loaded(ROOT / "benchmarks" / "ablation.py")
    words = ["--model", str(tiny_llama), "--calibration", str(text_file), "--texts", str(text_file), "--device", "cpu"]
    words += ["--windows", "8", "--seqlen", "32", "--evaluated", "4", "--method", "sparsegpt", "--seeds", "0"]
    monkeypatch.setattr("sys.argv", ["ablation.py", *words, "--only", "plain", "cap 0.15, all", "gen*plain"])
    ablation.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        "dense",
        "plain",
        "cap 0.15, all",
        "generated text, plain",
    ]
    assert all(float(row[1]) > float(rows[0][1]) for row in rows[1:]), "pruning at 0.7 costs perplexity"
    assert len({row[1] for row in rows}) == len(rows)


@pytest.mark.skipif(not FILES, reason="no benchmarks here")
def test_a_generated_layer_is_measured():
    layer = loaded(ROOT / "benchmarks" / "layer.py")
    problems = layer.generated(8, 16, 2, 64, 0, torch.device("cpu"))
    lines = [line for name in ("dsnot", "admm-grad") for line in layer.measure(problems, name, "0.5", {}, 1)]
    assert len(lines) == 4 and all(0 < line["relative_loss"] < 1 and line["shape"] == [8, 16] for line in lines)
