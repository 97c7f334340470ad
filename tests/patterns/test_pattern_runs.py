"""Runs under every pattern of conf/sparsity: streamed, packed, read again, given as a mask; refused before they run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import refused
from tiny import execute, words_for

from alps_exp.allocation.selection import Selection
from alps_exp.checkpoints.packed import read_folder
from alps_exp.cli.overrides import compose, compose_prepared, expand, initialized, prepared
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.patterns import parse_sparsity, written
from alps_exp.pruning import solve
from alps_exp.runs.naming import run_name
from alps_exp.runs.settings import resolve

FOUND = {name: written.pattern_of(node) for name, node in written._nodes().items()}
OTHERS = {name: pattern for name, pattern in FOUND.items() if name not in ("unstructured", "nm")}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", OTHERS.values(), ids=OTHERS)
def test_a_streamed_run_saves_layers_of_the_pattern(pattern, tiny_opt, text_file, tmp_path):
    words = words_for(tiny_opt, text_file, "nsamples=4", "seqlen=64", "eval=none", 'layers.sparsity={"fc1":0.5}')
    words.append('layers.exclude=["k_proj","v_proj"]')
    alps = [*words, "method=alps", f"sparsity={pattern.written}", "save=packed"]
    record = execute([*alps, "stream=true"], tmp_path / "streamed")
    assert record["sparsity"] == pattern.written
    tensors = read_folder(tmp_path / "streamed" / "model")
    if pattern.kind == "block":  # a model in memory is the same, whatever the pattern
        loaded = execute(alps, tmp_path / "loaded")
        again = read_folder(tmp_path / "loaded" / "model")
        assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
        assert [row["relative_loss"] for row in loaded["layers"]] == [r["relative_loss"] for r in record["layers"]]
    for row in record["layers"]:
        if row["name"].endswith("fc1"):
            assert row["pattern"] == "0.5"
            continue
        assert (row["pattern"], row["selection"]) == (pattern.written, pattern.selected("layer"))
        assert pattern.holds(tensors[f"{row['name']}.weight"] != 0)
        assert abs(row["sparsity"] - pattern.sparsity) < 0.02
        assert row["stats"].get("projection") == (None if pattern.tracker().fast else "plain")

    mask = [*words, "method=given", f"method.mask={tmp_path / 'streamed' / 'model'}", "refit=pcg"]
    fitted = execute([*mask, f"sparsity={pattern.written}"], tmp_path / "given")
    for row, other in zip(fitted["layers"], record["layers"], strict=True):
        assert row["sparsity"] == pytest.approx(other["sparsity"])
    refused(lambda: resolve(compose([*mask, "sparsity=1:16"])), "is not 1:16")


@pytest.mark.parametrize("text", ["block=48@0.5", "row@0.999"])
def test_a_layer_that_does_not_fit_is_refused_before_anything_runs(text, tiny):
    words = [*tiny, f"sparsity={text}"]
    refused(lambda: resolve(compose(words)), f"sparsity {text} does not fit", "decoder.layers.0")


@pytest.mark.parametrize("method", ["sparsegpt", "dsnot", "sparseswaps", "sparsellm", "osscar", "struprune"])
def test_methods_that_choose_weight_by_weight_refuse_blocks_by_name(method, tiny):
    words = [*tiny, f"method={method}", "sparsity=block=8@0.5"]
    refused(lambda: resolve(compose(words)), "cannot keep sparsity block=8@0.5: it takes", "unstructured")


def test_rows_are_weighed_where_they_compete():
    """A weight per output decides which rows stay, and which blocks."""
    job = SimpleNamespace(rows={"layer": torch.tensor([1.0, 2.0])}, solver=registry.solver("wanda"))
    problem = LayerProblem(torch.ones(2, 4), Inputs(name="layer"), "layer")
    for text, weighed in {"0.5": False, "2:4": False, "row@0.5": True, "block=1x2@0.5": True}.items():
        assert (solve._scale(problem, parse_sparsity(text), job) is not None) is weighed


@pytest.mark.slow
def test_lists_of_patterns_are_a_sweep_and_layers_take_them():
    """In the words of a shell without quotes; a directory is named by what tables read back."""
    texts = ["0.7", "2:4", "block=32@0.7", "block=16x64@0.7", "row@0.3", "column@0.3", "2:4T", "4:8/2:4", "64:2:8"]
    with initialized():
        _, jobs = expand(prepared(["sparsity=" + ",".join(texts)]))
        found = [written.pattern_of(compose_prepared(job).sparsity) for job in jobs]
    assert found == [parse_sparsity(text) for text in texts]
    assert [written.of_slug(pattern.slug) for pattern in found] == [pattern.written for pattern in found]
    cfg = compose(['layers.sparsity={"*.fc1":"block=32@0.7","*.fc2":2:4T,"*.q_proj":"4:8>2:4"}'])
    own = Selection.parse("*", (), dict(cfg.layers.sparsity)).sparsity
    assert [str(pattern) for pattern in own.values()] == ["block=32@0.7", "2:4T", "4:8>2:4"]
    assert sorted(["64:2:8", "row@0.3", "0.7", "4:8>2:4", "2:4T", "block=32@0.7", "2:4"], key=written.order) == [
        "0.7",
        "2:4",
        "2:4T",
        "4:8>2:4",
        "64:2:8",
        "block=32@0.7",
        "row@0.3",
    ]


def test_two_ways_to_write_a_pattern_are_one_run():
    one, other = (
        compose([f"sparsity={text}", f'layers.sparsity={{"fc1":"{text}"}}']) for text in ("4:8>2:4", "4:8/2:4")
    )
    assert run_name(one) == run_name(other) and "-4of8over2of4-" in run_name(one)


def test_footnotes_of_tables_tell_what_is_kept():
    texts = [
        "column@0.3",
        "block=32@0.7",
        "block=32@0.8",
        "2:4T",
        "0.7",
        "2:4",
        "4:8>2:4",
        "64:2:8",
        "no pattern",
        "5:4",
    ]
    assert written.notes(texts) == [
        "N:M: N of M consecutive inputs kept",
        "2:4T: 2 of 4 kept along the inputs, and along the outputs",
        "4:8>2:4: 4 of 8 groups of 4 inputs kept, with 2 of 4 each",
        "64:2:8: 64 outputs share 4 of 8 inputs, and 2 of 4 are kept",
        "block: blocks of 32 outputs × 32 inputs are zero as a whole",
        "column: whole inputs of a layer are zero",
    ]
