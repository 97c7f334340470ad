"""Runs that go on where an earlier attempt ended, and those that must not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import execute, weights, words_for

from alps_exp.base import fallbacks
from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.pruning import stages, store
from alps_exp.runs import provenance
from alps_exp.runs.settings import resolve


@pytest.fixture
def settings(tiny_gemma3, text_file, tmp_path) -> list[str]:
    model = shutil.copytree(tiny_gemma3, tmp_path / "gemma")
    text = shutil.copy(text_file, tmp_path / "text.txt")
    return words_for(
        model, text, "nsamples=6", "seqlen=48", "eval.windows=3", "eval.sample_tokens=2", "save=true", "batch_size=2"
    )


class Failure(RuntimeError):
    pass


def fail_at(monkeypatch, name: str, when: int) -> list[str]:
    """Let the call number `when` of solving fail; the layers that were asked for are listed."""
    original, solved = getattr(stages, name), []

    def failing(layers, *rest):
        solved.extend(layer.name for layer in layers)
        if len(solved) >= when:
            raise Failure("out of luck")
        return original(layers, *rest)

    monkeypatch.setattr(stages, name, failing)
    return solved


def interrupted(settings, folder, monkeypatch, *more: str) -> None:
    """A run that failed in its third block."""
    with monkeypatch.context() as patch:
        fail_at(patch, "solve_layers", 16)
        solve = stages.solve_layers
        patch.setattr(fallbacks, "_warned", {"a plainer way"})
        patch.setattr(stages, "solve_layers", lambda *given: [fallbacks.fell_back("a plainer way"), solve(*given)][1])
        with pytest.raises(Failure):
            execute(settings, folder, *more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["method=magnitude", "losses=false"],
        [],
        ["propagate=dense"],
        ["stream=true"],
    ],
)
def test_a_failed_run_goes_on_with_the_next_block(settings, tmp_path, monkeypatch, more):
    expected = execute(settings, tmp_path / "whole", *more)
    interrupted(settings, tmp_path / "run", monkeypatch, *more)
    with monkeypatch.context() as patch:
        solved = fail_at(patch, "solve_layers", 1000)
        record = execute(settings, tmp_path / "run", *more)
    assert {name.split(".")[2] for name in solved} == {"2"}
    assert record["attempts"] == 2 and "restore_seconds" in record["phases"]
    assert record["warnings"].count("a plainer way") == 1 and "a plainer way" not in expected["warnings"]
    assert [row["name"] for row in record["layers"]] == [row["name"] for row in expected["layers"]]
    assert [row["relative_loss"] for row in record["layers"]] == [row["relative_loss"] for row in expected["layers"]]
    assert record["evaluations"] == expected["evaluations"] and record["sample"] == expected["sample"]
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "run" / ".progress").exists()


@pytest.mark.slow
def test_a_part_of_the_model_goes_on_and_ends_with_its_last_block(settings, tmp_path, monkeypatch):
    more = ["layers.include=[layers.0.*,layers.1.mlp.*]", "save=false", "eval=none", "refit=pcg", "stream=true"]
    expected = execute(settings, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        fail_at(patch, "solve_layers", 8)
        with pytest.raises(Failure):
            execute(settings, tmp_path / "run", *more)
    with monkeypatch.context() as patch:
        solved = fail_at(patch, "solve_layers", 1000)
        record = execute(settings, tmp_path / "run", *more)
    assert {name.split(".")[2] for name in solved} == {"1"} and record["attempts"] == 2
    assert [row["relative_loss"] for row in record["layers"]] == [row["relative_loss"] for row in expected["layers"]]


@pytest.mark.slow
def test_what_began_in_memory_goes_on_streamed(settings, tmp_path, monkeypatch):
    expected = execute(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "run", monkeypatch, "stream=false")
    record = execute(settings, tmp_path / "run", "stream=true")
    assert record["attempts"] == 2 and record["evaluations"] == expected["evaluations"]


def change_text(settings, monkeypatch):
    Path(settings[3].removeprefix("data.path=")).write_text("Something else was written here. " * 3000)


def change_weights(settings, monkeypatch):
    file = Path(settings[1].removeprefix("model.path=")) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, file)


def change_code(settings, monkeypatch):
    monkeypatch.setattr(provenance, "_software", lambda: {"code": "0.0", "torch": "2", "transformers": "5"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_text, "calibration "),
        (change_weights, "checkpoint model.safetensors "),
        (change_code, r"code .* → 0\.0"),
    ],
)
def test_what_has_changed_is_named_and_nothing_mixed(settings, tmp_path, monkeypatch, change, named):
    interrupted(settings, tmp_path / "run", monkeypatch)
    change(settings, monkeypatch)
    with pytest.raises(UserError, match=rf"holds 2 finished blocks .*{named}.*resume=false") as error:
        execute(settings, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert execute(settings, tmp_path / "run", "resume=false")["attempts"] == 1


@pytest.mark.slow
def test_a_directory_can_be_named(settings, tmp_path, monkeypatch):
    place = tmp_path / "run"
    interrupted(settings, place, monkeypatch)
    again = f"resume={place}"
    for words, message in (
        (["sparsity=0.6"], r"another configuration: sparsity\.level 0\.7 → 0\.6"),
        (["nsamples=5", "seed=1"], r"nsamples 6 → 5, seed 0 → 1"),
        (["resumable=false"], "needs resumable=true"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(compose([*settings, again, *words]))
    with pytest.raises(UserError, match="holds no run"):
        resolve(compose([*settings, f"resume={tmp_path}"]))
    assert str(compose([*settings, again]).resume) == str(place)
    with pytest.raises(UserError, match="is not where this run goes"):
        execute(settings, tmp_path / "elsewhere", again)
    assert execute(settings, place, again)["attempts"] == 2
    with pytest.raises(UserError, match="holds a complete run"):
        execute(settings, place, again)
    assert json.loads((place / "record.json").read_text())["status"] == "complete"


@pytest.mark.slow
def test_a_complete_run_starts_afresh(settings, tmp_path):
    execute(settings, tmp_path / "run", "method=magnitude")
    record = execute(settings, tmp_path / "run", "method=magnitude")
    assert record["attempts"] == 1 and (tmp_path / "run" / "record.previous.json").is_file()


@pytest.mark.slow
def test_nothing_is_kept_when_it_is_switched_off(settings, tmp_path, monkeypatch):
    interrupted(settings, tmp_path / "run", monkeypatch, "resumable=false")
    assert not (tmp_path / "run" / ".progress").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(settings, tmp_path, monkeypatch):
    original, written = store.save_file, []

    def full(tensors, path, **options):
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", full)
        with pytest.raises(UserError, match=r"the disk is full .* make space, and the same command goes on") as error:
            execute(settings, tmp_path / "run")
    assert "\n" not in str(error.value)
    names = sorted(path.name for path in (tmp_path / "run" / ".progress").iterdir())
    assert names == ["block-00000.json", "block-00000.safetensors", "run.json"]
    expected = execute(settings, tmp_path / "whole")
    record = execute(settings, tmp_path / "run")
    assert record["attempts"] == 2 and record["evaluations"] == expected["evaluations"]


@pytest.mark.slow
def test_leftovers_of_killed_attempts_are_removed(settings, tmp_path):
    place = tmp_path / "run"
    (place / ".model.1.tmp").mkdir(parents=True)
    (place / ".record.json.1.tmp").write_text("{")
    execute(settings, place, "method=magnitude")
    assert sorted(path.name for path in place.iterdir()) == ["model", "record.json"]
