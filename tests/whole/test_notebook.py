"""The notebook in examples/ runs from its first cell to its last, without network."""

from __future__ import annotations

import ast
import socket

import pytest
import torch
from helpers import ROOT

FILE = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart_runs_offline(tmp_path, monkeypatch):
    """Its cells in this process, which has imported already what a kernel would import first."""
    nbformat, pyplot = pytest.importorskip("nbformat"), pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network for something"))
    monkeypatch.chdir(tmp_path)
    book = nbformat.read(FILE, as_version=4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "clear the outputs before committing"
    before, names, threads, shown = set(pyplot.get_fignums()), {}, torch.get_num_threads(), []
    try:
        with torch.random.fork_rng(devices=[]):
            for cell in cells:
                *statements, last = ast.parse(cell.source).body
                value = isinstance(last, ast.Expr) and not cell.source.endswith(";")  # what a notebook shows
                exec(compile(ast.Module(statements if value else [*statements, last], []), cell.id, "exec"), names)
                if value:
                    shown.append(eval(compile(ast.Expression(last.value), cell.id, "eval"), names))
        assert sum(value is not None and bool(str(value)) for value in shown) >= 4
        assert len(set(pyplot.get_fignums()) - before) == 1, "one picture"
    finally:
        pyplot.close("all")
        torch.set_num_threads(threads)
