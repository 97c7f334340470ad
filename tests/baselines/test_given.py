"""The mask of another checkpoint: taken as it is, fitted, and refused by name where it is not one of the model's."""

from __future__ import annotations

import dataclasses
import shutil

import fake_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import random_tokens, words_for
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.base.resources import resource_root
from alps_exp.baselines.given import Given
from alps_exp.calibration.sensitivity import SensitivityChoice
from alps_exp.cli.overrides import compose
from alps_exp.runs import run as runs
from alps_exp.runs.settings import resolve


def pruned(folder, target, method="magnitude", sparsity="0.5", **options):
    """A pruned copy of a model and its record."""
    network = AutoModelForCausalLM.from_pretrained(folder)
    record = alps_exp.prune_model(network, random_tokens(), method=method, sparsity=sparsity, **options)
    network.save_pretrained(target)
    return target, record


def mend(folder, change, target):
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file(change(tensors), target / "model.safetensors", metadata={"format": "pt"})
    return target


def words(model, mask, text_file, *more) -> list[str]:
    return words_for(
        model, text_file, "nsamples=4", "seqlen=64", "eval=none", "method=given", f"method.mask={mask}", *more
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "llama", "gpt2"))]
)
def test_the_mask_is_that_of_the_other_checkpoint(request, family, tmp_path):
    dense = request.getfixturevalue(f"tiny_{family}")
    mask, before = pruned(dense, tmp_path / "pruned", "wanda", "0.5")
    network, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, mask))
    record = alps_exp.prune_model(network, random_tokens(), method="given", mask=str(mask), sparsity=0.5)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), plain.parameters(), strict=True))
    for row, former in zip(record["layers"], before["layers"], strict=True):
        assert row["selection"] == "mask" and row["sparsity"] == former["sparsity"]
        assert row["relative_loss"] == pytest.approx(former["relative_loss"], rel=1e-5)


@pytest.mark.slow
def test_rows_of_a_mask_do_not_compete(tiny_llama, tmp_path):
    mask, _ = pruned(tiny_llama, tmp_path / "mask")
    network = AutoModelForCausalLM.from_pretrained(tiny_llama)
    options = {"mask": str(mask), "sensitivity": SensitivityChoice("outputs", 2), "losses": False}
    record = alps_exp.prune_model(network, random_tokens(), "given", 0.5, **options)
    assert any(note.startswith("no backward pass was made") for note in record["warnings"])


@pytest.mark.slow
def test_a_run_fits_the_dense_weights_to_the_mask(tiny_opt, text_file, tmp_path):
    mask, _ = pruned(tiny_opt, tmp_path / "pruned", "magnitude", "2:4")
    losses = {}
    for how in ("none", "pcg", "exact", "admm"):
        cfg = compose(words(tiny_opt, mask, text_file, f"refit={how}", "sparsity=2:4", "propagate=dense", "save=true"))
        record = runs.run(cfg, tmp_path / how)
        losses[how] = [row["relative_loss"] for row in record["layers"]]
        assert record["sparsity"] == "2:4" and any(name.startswith("mask ") for name in record["environment"]["inputs"])
        saved, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / how / "model", mask))
        for row in record["layers"]:
            name = f"{row['name']}.weight"
            assert torch.equal(saved[name] != 0, given[name] != 0)
    for none, pcg, exact, admm in zip(*losses.values(), strict=True):
        assert exact <= pcg * (1 + 1e-5) and exact <= admm * (1 + 1e-5) and max(pcg, admm) < none


@pytest.fixture(scope="module")
def plain(tiny_llama, text_file, tmp_path_factory):
    """A mask, and the losses of a run that takes it."""
    folder = tmp_path_factory.mktemp("plain")
    mask, _ = pruned(tiny_llama, folder / "pruned")
    record = runs.run(compose(words(tiny_llama, mask, text_file, "sparsity=0.5", "refit=pcg")), folder / "run")
    return mask, [row["relative_loss"] for row in record["layers"]]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["streamed", "packed", "bin", "prefix", "bool"])
def test_other_forms_of_models_and_masks(form, plain, tiny_llama, text_file, tmp_path):
    mask, losses = shutil.copytree(plain[0], tmp_path / "pruned"), plain[1]
    more = ["sparsity=0.5", "refit=pcg"]
    if form == "streamed":
        more.append("stream=true")
    elif form == "packed":
        from alps_exp.checkpoints.packed import pack_folder

        pack_folder(mask)
    elif form == "bin":
        torch.save(load_file(mask / "model.safetensors"), mask / "pytorch_model.bin")
        (mask / "model.safetensors").unlink()
    elif form == "prefix":
        mask = mend(mask, lambda found: {k.removeprefix("model."): v for k, v in found.items()}, tmp_path / "other")
    else:
        mask = mend(mask, lambda found: {k: v != 0 for k, v in found.items() if "proj" in k}, tmp_path / "other")
    record = runs.run(compose(words(tiny_llama, mask, text_file, *more)), tmp_path / "run")
    assert [row["relative_loss"] for row in record["layers"]] == losses


NAME = "model.layers.0.self_attn.q_proj.weight"
BAD = {
    "shape": (lambda found: found | {NAME: found[NAME][:8].clone()}, r"q_proj.weight is \(8, \d+\), and model\.layers"),
    "turned": (lambda found: found | {NAME: torch.zeros(3, 5)}, r"q_proj.weight is \(3, 5\)"),
    "missing": (lambda found: {k: v for k, v in found.items() if k != NAME}, f"lacks {NAME}: give a pruned copy"),
    "no zeros": (lambda found: {k: torch.ones_like(v) for k, v in found.items()}, "layers.0.self_attn.*has no zeros"),
    "quantised": (
        lambda found: found | {NAME: found[NAME].to(torch.int8)},
        f"stores {NAME} as I8: give an unquantised",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD)
def test_a_mask_of_another_model_is_refused_before_anything_runs(what, tiny_llama, text_file, tmp_path):
    mask, _ = pruned(tiny_llama, tmp_path / "pruned")
    change, message = BAD[what]
    mask = mend(mask, change, tmp_path / "bad")
    with pytest.raises(UserError, match=message) as error:
        resolve(compose(words(tiny_llama, mask, text_file, "sparsity=0.5")))
    assert "\n" not in str(error.value)
    network = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(UserError, match=message):
        alps_exp.prune_model(network, random_tokens(), method="given", mask=str(mask), sparsity=0.5)


@pytest.mark.slow
def test_the_sparsity_is_that_of_the_mask(tiny_llama, text_file, tmp_path):
    mask, _ = pruned(tiny_llama, tmp_path / "pruned", sparsity="0.5")
    for sparsity, message in (("0.7", r"has 0\.5 zeros, and sparsity=0\.7 was asked for"), ("2:4", "is not 2:4")):
        with pytest.raises(UserError, match=message):
            resolve(compose(words(tiny_llama, mask, text_file, f"sparsity={sparsity}")))
    resolve(compose(words(tiny_llama, mask, text_file, "sparsity=0.7", "method.tolerance=0.21")))
    network = AutoModelForCausalLM.from_pretrained(tiny_llama)
    # Later layers are looked at before anything runs, too.
    later = "model.layers.1.mlp.up_proj.weight"
    uneven = mend(mask, lambda found: found | {later: found[later] * 0}, tmp_path / "uneven")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"mask of model\.layers\.1\.mlp\.up_proj has 1 zeros"):
        alps_exp.prune_model(network, random_tokens(), method="given", mask=str(uneven), sparsity=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(UserError, match=r"mask of model\.layers\.1\.mlp\.up_proj has 1 zeros"):
        resolve(compose(words(tiny_llama, uneven, text_file, "sparsity=0.5")))


@pytest.mark.slow
def test_a_mask_of_the_hub(tiny_llama, text_file, tmp_path, monkeypatch):
    mask, _ = pruned(tiny_llama, tmp_path / "hub" / "models" / "somebody" / "pruned")
    with fake_hub.serving(tmp_path / "hub") as (address, _):
        fake_hub.use(address, tmp_path / "cache", monkeypatch)
        record = runs.run(compose(words(tiny_llama, "somebody/pruned", text_file, "sparsity=0.5")), tmp_path / "run")
        with pytest.raises(UserError, match="somebody/nothing"):
            resolve(compose(words(tiny_llama, "somebody/nothing", text_file, "sparsity=0.5")))
    plain = runs.run(compose(words(tiny_llama, mask, text_file, "sparsity=0.5")), tmp_path / "plain")
    assert [row["relative_loss"] for row in record["layers"]] == [row["relative_loss"] for row in plain["layers"]]
    assert any(name.startswith("mask ") for name in record["environment"]["inputs"])


def test_square_layers_of_a_model_that_stores_them_turned(tiny_gpt2, tmp_path):
    mask, _ = pruned(tiny_gpt2, tmp_path / "pruned", "wanda", "0.5")
    network, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_gpt2, mask))
    options = {"method": "given", "mask": str(mask), "sparsity": 0.5, "include": ["*.attn.c_proj"]}
    assert alps_exp.prune_model(network, random_tokens(), **options)["layers"]
    one, other = (model.transformer.h[1].attn.c_proj.weight for model in (network, plain))
    assert one.shape[0] == one.shape[1] and torch.equal(one, other)


def test_folders_that_hold_no_mask_are_refused(tmp_path, tiny_llama, text_file):
    for mask, message in (
        (None, "method.mask=None is not allowed: give method.mask=FOLDER"),
        (str(tmp_path / "nowhere"), "nowhere is no folder"),
        (str(tmp_path), "holds no weights"),
    ):
        with pytest.raises(UserError, match=message):
            Given(mask).for_layers({"a.0.b": alps_exp.patterns.parse_sparsity("0.5")}, {"a.0.b": (4, 4)})
    with pytest.raises(UserError, match=r"method\.tolerance=2 is not allowed"):
        Given(str(tmp_path), 2)
    with pytest.raises(UserError, match="by the names of a model's layers"):
        alps_exp.prune_layer(torch.randn(4, 4), method="given", mask=str(tmp_path))


def test_yaml_mirrors_the_class():
    node = yaml.safe_load((resource_root() / "conf" / "method" / "given.yaml").read_text(encoding="utf-8"))
    fields = {field.name: field.default for field in dataclasses.fields(Given)}
    assert {key: node[key] for key in fields} == fields and set(node) == {*fields, "name", "_target_", "_look_"}
