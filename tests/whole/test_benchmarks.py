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


@pytest.mark.skipif(not FILES, reason="no benchmarks here")
def test_a_generated_layer_is_measured():
    layer = loaded(ROOT / "benchmarks" / "layer.py")
    problems = layer.generated(8, 16, 2, 64, 0, torch.device("cpu"))
    lines = [line for name in ("dsnot", "admm-grad") for line in layer.measure(problems, name, "0.5", {}, 1)]
    assert len(lines) == 4 and all(0 < line["relative_loss"] < 1 and line["shape"] == [8, 16] for line in lines)
