"""Losses on windows that were not calibrated on: which windows, what is measured, where it shows."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny import words_for
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.data import windows as data
from alps_exp.data.settings import DataSettings
from alps_exp.runs import run as runs
from alps_exp.runs.settings import resolve
from alps_exp.tables import archive, figures, layout, make, plots


@pytest.fixture
def settings(tiny_llama: Path, text_file: Path) -> list[str]:
    return words_for(
        tiny_llama, text_file, "nsamples=4", "seqlen=64", "batch_size=2", "eval=none", "method=wanda", "data.holdout=3"
    )


def relative_losses(network, dense, pruned, ids: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Loss of the pruned layers on the inputs that the same layers of `network` receive, in float64."""
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        network(ids)
    for handle in handles:
        handle.remove()
    losses = {}
    for name, x in inputs.items():
        weight, sparse = (model.get_submodule(name).weight.detach().double() for model in (dense, pruned))
        flat = x.reshape(-1, x.shape[-1]).double()
        losses[name] = float((flat @ (weight - sparse).T).square().sum() / (flat @ weight.T).square().sum())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["stream=true"]])
def test_losses_are_those_of_the_held_out_windows(settings, tmp_path, tiny_llama, more):
    record = runs.run(compose([*settings, "save=true", *more]), tmp_path)
    node = resolve(compose(settings)).calibration.data
    tokenizer = tiny_models.tokenizer("llama")
    windows, description = data.calibration_tokens(node, tokenizer, nsamples=4, holdout=3, seqlen=64, seed=0)
    assert record["calibration"]["held_out_windows"] == description["held_out_windows"] == 3
    dense, pruned = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_llama, tmp_path / "model"))
    found = {row["name"]: row["held_out_loss"] for row in record["layers"]}
    first = [name for name in found if ".0." in name]
    # Inputs of the first block are the dense model's; those of the second one's first layers the pruned model's.
    for network, names in ((dense, first), (pruned, ["model.layers.1.self_attn.q_proj"])):
        expected = relative_losses(network, dense, pruned, windows[4:], names)
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    assert record["summary"]["mean_held_out_loss"] == pytest.approx(sum(found.values()) / len(found))
    calibrated = [row["relative_loss"] for row in record["layers"]]
    assert calibrated != list(found.values())


@pytest.mark.slow
def test_it_changes_nothing_else(settings, tmp_path):
    one, other = (
        runs.run(compose([*settings, f"data.holdout={count}"]), tmp_path / str(count))["layers"] for count in (0, 5)
    )
    assert [row["relative_loss"] for row in one] == [row["relative_loss"] for row in other]
    assert all(row["held_out_loss"] is None for row in one)


@pytest.mark.parametrize("sampling", ["documents", "concatenated"])
def test_windows_are_new_ones_and_the_others_stay(text_file, sampling):
    node = dataclasses.replace(DataSettings.named("local"), path=str(text_file), sampling=sampling)
    tokenizer = tiny_models.tokenizer("gpt2")
    few, many = (
        data.calibration_tokens(node, tokenizer, nsamples=12, holdout=holdout, seqlen=64, seed=3)[0]
        for holdout in (0, 6)
    )
    assert torch.equal(many[:12], few) and len(many) == 18
    assert len({tuple(row) for row in many.tolist()}) == len({tuple(row) for row in few.tolist()}) + 6


@pytest.mark.parametrize("sampling", ["documents", "concatenated"])
def test_too_few_are_left(text_file, sampling):
    node = dataclasses.replace(DataSettings.named("local"), path=str(text_file), sampling=sampling)
    with pytest.raises(UserError, match=r"held-out text has only \d+ windows.* lower data.holdout"):
        data.calibration_tokens(node, tiny_models.tokenizer("gpt2"), nsamples=4, holdout=100_000, seqlen=64, seed=0)


@pytest.mark.parametrize("words", [["data.holdout=-1"], ["data.holdout=2", "losses=false"]])
def test_refused(settings, words):
    with pytest.raises(UserError, match=r"data\.holdout"):
        resolve(compose([*settings, *words]))


@pytest.mark.slow
def test_windows_that_nothing_reads_are_refused_from_python(tiny_llama):
    network, ids = AutoModelForCausalLM.from_pretrained(tiny_llama), torch.zeros(1, 4).long()
    with pytest.raises(UserError, match="held_out measures losses and needs losses=True"):
        alps_exp.prune_model(network, ids, "magnitude", 0.5, losses=False, held_out=ids)


def test_training_reads_them_without_losses(settings):
    words = [word for word in settings if word != "method=wanda"]
    assert resolve(compose([*words, "method=tune", "losses=false"])).calibration.data.holdout == 3


@pytest.mark.slow
def test_tables_and_plot(settings, tmp_path):
    for method in ("wanda", "magnitude"):
        runs.run(compose([*settings, f"method={method}"]), tmp_path / "runs" / method)
    assert make.main([str(tmp_path / "runs"), str(tmp_path / "one")]) == 0
    assert "held-out loss" in (tmp_path / "one" / "comparison.md").read_text()
    (panel,) = plots.KINDS["losses"][0](
        figures.aggregate(archive.read_records(tmp_path / "runs").records), layout.Spec()
    )
    assert {(item["method"], item["kind"]) for item in panel["series"]} == {
        (method, kind) for method in ("wanda", "magnitude") for kind in ("relative_loss", "held_out_loss")
    }
    record = json.loads((tmp_path / "runs" / "wanda" / "record.json").read_text())
    wanda = next(item for item in panel["series"] if (item["method"], item["kind"]) == ("wanda", "held_out_loss"))
    for block, mean in wanda["points"]:
        losses = [row["held_out_loss"] for row in record["layers"] if row["block"] == block]
        assert mean == pytest.approx(sum(losses) / len(losses))
