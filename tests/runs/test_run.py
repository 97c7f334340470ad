"""One run from configuration to record, on tiny models and a local text."""

import json
from pathlib import Path

import pytest
import torch
from tiny import execute, words_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.evaluation import perplexity
from alps_exp.runs import run as runs
from alps_exp.runs import saving
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace


@pytest.fixture
def settings(tiny_llama: Path, text_file: Path) -> list[str]:
    return words_for(tiny_llama, text_file, "nsamples=8", "seqlen=64", "eval.windows=6", "eval.sample_tokens=4")


@pytest.mark.slow
def test_record_of_a_run(settings, tmp_path, capsys):
    record = execute(settings, tmp_path, "sparsity=0.6")
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "complete" and record["method"] == "alps" and record["sparsity"] == "0.6"
    assert len(record["layers"]) == 14
    for row in record["layers"]:
        rows, width = row["shape"]
        assert row["sparsity"] == pytest.approx(0.6, abs=1 / (rows * width))
        assert 0 < row["relative_loss"] < 1 and row["iterations"] > 0 and row["seconds"] > 0
        assert row["selection"] == "layer" and row["sparsity_target"] == 0.6
    assert record["summary"]["mean_relative_loss"] == pytest.approx(
        sum(row["relative_loss"] for row in record["layers"]) / 14
    )
    (evaluation,) = record["evaluations"]
    assert evaluation["metric"] == "perplexity" and evaluation["windows"] == 6 and evaluation["seqlen"] == 64
    assert evaluation["partial"] and evaluation["protocol"]
    assert {"load_seconds", "calibrate_seconds", "solve_seconds", "propagate_seconds", "evaluate_seconds"} <= set(
        record["phases"]
    )
    assert record["phases"]["peak_host_bytes"] > 1e6
    assert record["sample"]["dense"] and record["sample"]["pruned"]
    assert record["environment"]["versions"]["torch"] and record["environment"]["dtype"] == "float32"
    assert "mean relative loss" in capsys.readouterr().out


@pytest.mark.slow
def test_methods_rank_as_they_should(settings, tmp_path):
    workspace, losses, perplexities = Workspace(keep=True), {}, {}
    for method in ("dense", "magnitude", "sparsegpt", "alps"):
        cfg = compose([*settings, "sparsity=0.7", f"method={method}"])
        record = runs.run(cfg, tmp_path / method, workspace)
        losses[method] = record["summary"].get("mean_relative_loss")
        perplexities[method] = record["evaluations"][0]["value"]
    assert losses["alps"] < losses["sparsegpt"] < losses["magnitude"]
    assert perplexities["dense"] < perplexities["alps"] < perplexities["magnitude"]


@pytest.mark.slow
def test_a_kept_workspace_changes_no_result(settings, tmp_path):
    workspace = Workspace(keep=True)
    runs.run(compose([*settings, "method=magnitude"]), tmp_path / "first", workspace)
    shared = runs.run(compose(settings), tmp_path / "shared", workspace)
    alone = execute(settings, tmp_path / "alone")
    assert [row["relative_loss"] for row in shared["layers"]] == [row["relative_loss"] for row in alone["layers"]]
    assert shared["evaluations"] == alone["evaluations"] and shared["sample"] == alone["sample"]


@pytest.mark.slow
def test_saved_model_reloads_with_its_zeros(settings, tmp_path):
    record = execute(settings, tmp_path, "save=true", "sparsity=2:4", "method=sparsegpt")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for row in record["layers"]:
        weight = network.get_submodule(row["name"]).weight
        assert (weight.reshape(-1, 4).count_nonzero(1) <= 2).all()
        assert 1 - int(weight.count_nonzero()) / weight.numel() == row["sparsity"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("hello").input_ids
    saved = json.loads((tmp_path / "model" / "record.json").read_text())
    assert saved["status"] == "complete"
    assert set(record["phases"]) - set(saved["phases"]) == {"save_seconds"}
    # The saved folder is a model like any other: evaluated as dense it has the recorded perplexity.
    again = execute([*settings, f"model.path={tmp_path / 'model'}"], tmp_path / "again", "method=dense")
    assert again["evaluations"][0]["value"] == pytest.approx(record["evaluations"][0]["value"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "part"),
    [(["eval.sample_tokens=255"], "context of 256"), (["eval.prompt=''", "model.bos=false"], "prompt")],
)
def test_a_sample_that_cannot_be_made_is_refused_before_pruning(
    settings, tmp_path, monkeypatch, tiny_gpt2, words, part
):
    monkeypatch.setattr(runs, "prune_blocks", lambda *_: pytest.fail("pruning was started"))
    with pytest.raises(UserError, match=part):
        execute([*settings, f"model.path={tiny_gpt2}"], tmp_path, *words)


@pytest.mark.slow
def test_an_earlier_record_is_kept(settings, tmp_path):
    first = execute(settings, tmp_path, "method=magnitude")
    execute(settings, tmp_path, "method=magnitude")
    assert json.loads((tmp_path / "record.previous.json").read_text()) == first


@pytest.mark.slow
def test_failures_never_displace_a_complete_record(settings, tmp_path, monkeypatch):
    first = execute(settings, tmp_path, "method=magnitude")

    def explode(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(runs, "prune_blocks", explode)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            execute(settings, tmp_path, "method=magnitude")
    assert json.loads((tmp_path / "record.previous.json").read_text()) == first
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "failed"


def test_a_failed_run_leaves_a_record_with_its_error(settings, tmp_path, monkeypatch):
    def explode(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(runs, "prune_blocks", explode)
    with pytest.raises(RuntimeError, match="out of luck"):
        execute(settings, tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "failed" and record["error"] == {"type": "RuntimeError", "message": "out of luck"}


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_half_model(settings, tmp_path, monkeypatch):
    def full(self, folder, *arguments, **options):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoModelForCausalLM._model_mapping[_config(settings)], "save_pretrained", full)
    with pytest.raises(UserError, match=r"the disk is full.*make space"):
        execute(settings, tmp_path, "save=true", "method=magnitude")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".progress", "record.json"]


def _config(settings):
    from transformers import AutoConfig

    return type(AutoConfig.from_pretrained(compose(settings).model.path))


@pytest.mark.slow
def test_too_little_space_is_refused_before_writing(settings, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"saving needs .* are free"):
        execute(settings, tmp_path, "save=true", "method=magnitude")
    # Before it is packed, the model is there as a whole.
    free = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(compose(settings).model.path).parameters())
    usage.free = free + 1000
    with pytest.raises(UserError, match=r"saving needs .* are free"):
        execute(settings, tmp_path / "packed", "save=packed", "method=magnitude", "dtype=float32")
    usage.free = 2 * free
    record = execute(settings, tmp_path / "packed", "save=packed", "method=magnitude", "dtype=float32")
    assert record["saved"]["ratio"] < 1


@pytest.mark.slow
def test_seed_and_dtype_reach_the_run(settings, tmp_path):
    one = execute(settings, tmp_path / "a", "method=wanda")
    other = execute(settings, tmp_path / "b", "method=wanda", "seed=1")
    half = execute(settings, tmp_path / "c", "method=wanda", "dtype=bfloat16")
    assert one["layers"][0]["relative_loss"] != other["layers"][0]["relative_loss"]
    assert half["environment"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nsamples=0", "nsamples=0 is not allowed"),
        ("seqlen=300", "seqlen=300 is beyond the model's context of 256"),
        ("eval.seqlen=300", "eval.seqlen=300 is beyond"),
        ("batch_size=0", "batch_size=0"),
        ("dtype=float15", "did you mean"),
        ("propagate=sideways", "propagate='sideways' is not allowed"),
        ("save=maybe", "save='maybe' is not allowed"),
        ("device=cuda:99", "CUDA devices are available"),
        ("device=abacus", "give auto, cpu, cuda"),
        ("data.path=/nowhere.txt", "does not exist"),
        ("eval.windows=0", "windows=0"),
        ("method.rho=-1", "rho=-1"),
        ("method.schedule=papr", "did you mean paper"),
        ("layers.include=[q_prj]", "did you mean q_proj"),
        ("sparsity=1:3", r"does not fit model\.layers\.0\.self_attn\.q_proj"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(settings, override, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(compose([*settings, override]))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_overflow_names_the_block(settings, tiny_llama, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(tiny_llama)
    network.model.layers[0].mlp.up_proj.weight.data.fill_(1e38)
    network.model.layers[0].mlp.down_proj.weight.data.fill_(1e38)
    network.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"model\.layers\.\d"):
        execute(settings, tmp_path / "run", f"model.path={tmp_path / 'broken'}", "eval=none")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_few_tokens_and_more_inputs_are_handled_and_warned_of(settings, tmp_path, capsys):
    record = execute(settings, tmp_path, "nsamples=1", "seqlen=16", "eval=none")
    assert any("more inputs than calibration tokens" in line for line in record["warnings"])
    assert capsys.readouterr().err.count("more inputs than calibration tokens") == 1
    assert all(torch.isfinite(torch.tensor(row["relative_loss"])) for row in record["layers"])


def test_lack_of_device_memory_outside_the_blocks_is_one_line(settings, tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory (not really)\nand much more")

    monkeypatch.setattr(perplexity, "perplexity", failing)
    with pytest.raises(UserError, match=r"device's memory does not suffice .* goes on from the last") as error:
        execute(settings, tmp_path, "method=magnitude")
    assert "\n" not in str(error.value)
