"""Benchmarks still fit the package: each can be imported, and that of one layer measures."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from helpers import ROOT
from tiny import load
from transformers import AutoTokenizer

import alps_exp
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.methods.target import StreamTarget

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
    monkeypatch.setattr(
        "sys.argv", ["ablation.py", *words, "--only", "plain", "strength 0.5*", "readers*", "cap 0.15, all"]
    )
    ablation.main()
    assert not ablation.divided("0.7") and [len(ablation.divided(text)) for text in ("2:4", "4:8")] == [4, 8]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        "dense",
        "plain",
        "strength 0.5 (stream)",
        "readers fitted, too",
        "cap 0.15, all",
    ]
    assert all(float(row[1]) > float(rows[0][1]) for row in rows[1:]), "pruning at 0.7 costs perplexity"
    assert len({row[1] for row in rows}) == len(rows)


@pytest.mark.skipif(not FILES, reason="no benchmarks here")
def test_readers_of_the_ablation_are_fitted_to_the_dense_outputs():
    ablation = loaded(ROOT / "benchmarks" / "ablation.py")
    weight, dense = torch.randn(6, 8), torch.randn(200, 8)
    pruned = dense + 0.3 * torch.randn(200, 8)
    readers, target = ablation.Readers(), StreamTarget(strength=1.0, ridge=1e-6)
    readers._sums["q"] = (dense - pruned).T @ pruned
    problem = LayerProblem(weight, Inputs(gram=pruned.T @ pruned), "q")
    wanted = torch.linalg.lstsq(pruned, dense @ weight.T).solution.T
    torch.testing.assert_close(readers._fitted(target, problem).weight, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not FILES, reason="no benchmarks here")
def test_a_generated_layer_is_measured():
    layer = loaded(ROOT / "benchmarks" / "layer.py")
    problems = layer.generated(8, 16, 2, 64, 0, torch.device("cpu"))
    lines = [line for name in ("dsnot", "admm-grad") for line in layer.measure(problems, name, "0.5", {}, 1)]
    assert len(lines) == 4 and all(0 < line["relative_loss"] < 1 and line["shape"] == [8, 16] for line in lines)


@pytest.mark.heavy
@pytest.mark.skipif(not FILES, reason="no benchmarks here")
def test_a_mixture_made_of_a_trained_model_keeps_the_order_of_the_methods(shared):
    """In the losses of experts and in perplexity; docs/decisions.md has three seeds and four sparsities."""
    mixture = loaded(ROOT / "benchmarks" / "mixture.py")
    dense = load(shared / "data" / "stories260K")
    text = alps_exp.generate_tokens(
        dense, AutoTokenizer.from_pretrained(shared / "data" / "stories260K"), 64, 128, batch_size=64
    )
    with torch.no_grad():
        same = mixture.upcycled(dense, experts=4, top=2)(text[:4]).logits
        assert (same - dense(text[:4]).logits).abs().max() < 1e-3
    model, tokens, held = mixture.mixture_of(dense, text, seed=0, steps=4, windows=24)
    assert not torch.equal(
        model.model.layers[0].mlp.experts.down_proj[0], model.model.layers[0].mlp.experts.down_proj[1]
    )
    measured = [mixture.measured(model, method, "2:4", tokens, held) for method in mixture.METHODS]
    for figures in zip(*measured, strict=True):
        assert all(1.1 * better < worse for better, worse in itertools.pairwise(figures)), measured
