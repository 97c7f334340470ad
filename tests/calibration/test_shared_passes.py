"""Passes over the dense model are done once by the runs of a sweep, with the same bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import execute, weights

from alps_exp.procedure import weighing
from alps_exp.runs.workspace import Workspace


@pytest.fixture
def words(tiny):
    kept = [word for word in tiny if not word.startswith("nsamples")]
    own = ["method=magnitude", "nsamples=4", "sensitivity=outputs", "sensitivity.windows=3"]
    return [*kept, *own, "save=true"]


@pytest.fixture
def passes(monkeypatch):
    """How often the model was passed over, and the file that the passes were kept in."""
    counted = []
    for name in ("measure_sensitivity", "measure_spectra"):
        original = getattr(weighing, name)

        def counting(*args, original=original, **options):
            counted.append(original.__name__)
            return original(*args, **options)

        monkeypatch.setattr(weighing, name, counting)
    return counted


def same(one, other):
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_runs_of_a_sweep_make_one_backward_pass(words, passes, tmp_path):
    sweep = Workspace(keep=True)
    first = execute(words, tmp_path / "a" / "first", workspace=sweep)
    assert first["cached_passes"] == [] and passes == ["measure_sensitivity"]
    for name, more in {
        "level": ["sparsity=0.5", "allocation=sensitivity"],
        "method": ["method=sparsegpt", "target=stream"],
        "streamed": ["stream=true", "sensitivity.rows=1"],
    }.items():
        shared = execute(words, tmp_path / "a" / name, *more, workspace=sweep)
        assert shared["cached_passes"] == ["gradients"] and len(passes) == 1, name
        alone = execute(words, tmp_path / "b" / name, *more)
        assert alone["cached_passes"] == [] and same(tmp_path / "a" / name, tmp_path / "b" / name)
        assert [row["sparsity_target"] for row in alone["layers"]] == [r["sparsity_target"] for r in shared["layers"]]
        passes.pop()
    execute(words, tmp_path / "c" / "process", workspace=Workspace(keep=True))
    again = execute(words, tmp_path / "c" / "other", "sparsity=0.5", workspace=Workspace(keep=True))
    assert again["cached_passes"] == ["gradients"], "another process reads it from the disk"


@pytest.mark.slow
def test_what_decides_otherwise_is_measured_again(words, passes, tmp_path):
    sweep = Workspace(keep=True)
    execute(words, tmp_path / "first", workspace=sweep)
    for index, more in enumerate(
        (
            ["seed=1"],
            ["sensitivity.windows=2"],
            ["allocation=owl"],
            ["layers.exclude=[fc1]"],
            ["sensitivity=none", "~sensitivity.windows", "allocation=loss"],
        )
    ):
        kept = [word for word in words if f"~{word.partition('=')[0]}" not in more]
        chosen = [word for word in more if not word.startswith("~")]
        record = execute(kept, tmp_path / str(index), *chosen, workspace=sweep)
        assert record["cached_passes"] == [] and len(passes) == index + 2, more


@pytest.mark.slow
def test_spectra_are_shared_by_runs_with_other_texts(tiny, passes, tmp_path):
    words = [*tiny, "method=magnitude", "allocation=spectral"]
    sweep = Workspace(keep=True)
    for index, more in enumerate((["seed=0"], ["seed=1"], ["allocation.cap=0.1"], ["allocation.per=layer"])):
        record = execute(words, tmp_path / str(index), *more, workspace=sweep)
        assert record["cached_passes"] == (["spectra"] if index else [])
    assert passes == ["measure_spectra"]
    execute(words, tmp_path / "tail", "allocation.tail=0.2", workspace=sweep)
    assert len(passes) == 2


@pytest.mark.slow
def test_a_damaged_file_is_made_again_and_one_without_room_is_told(words, passes, tmp_path):
    sweep = Workspace(keep=True)
    execute(words, tmp_path / "first", workspace=sweep)
    (file,) = (tmp_path / ".statistics").glob("*/dense.safetensors")
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"groups": "[]", "sha256": "0"})
    execute(words, tmp_path / "second", "sparsity=0.5", workspace=sweep)
    assert len(passes) == 2
    third = execute(words, tmp_path / "third", "sparsity=0.4", workspace=sweep)
    assert len(passes) == 2 and third["cached_passes"] == ["gradients"]
    small = execute(words, tmp_path / "x" / "small", "statistics_cache=0.0001", workspace=sweep)
    assert len(passes) == 3 and any("not kept for other runs" in line for line in small["warnings"])
    execute(words, tmp_path / "y" / "none", "statistics_cache=0", workspace=sweep)
    assert not (tmp_path / "y" / ".statistics").exists()
