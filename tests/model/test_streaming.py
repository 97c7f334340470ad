"""Models read from their files block by block are the models that transformers loads, and are pruned alike."""

import json
import shutil
from pathlib import Path

import fake_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import words_for
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.checkpoints.bin_files import safetensors_folder
from alps_exp.checkpoints.checkpoint import Checkpoint, fingerprint
from alps_exp.cli.overrides import compose
from alps_exp.model import loading
from alps_exp.model.blocks import BlockModel
from alps_exp.runs import run as runs
from alps_exp.runs.settings import resolve

FAMILIES = ["opt", "llama", "gpt2", "gemma3", "qwen3"]
CPU = torch.device("cpu")


def node(folder: Path) -> dict:
    return {"name": "local", "path": str(folder)}


def assert_same_model(folder: Path, dtype="auto") -> None:
    """Parameters, buffers and generation settings are those of `from_pretrained`, bit by bit."""
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    network, source = loading.load_streamed(loading.resolve(node(folder)), dtype)
    with BlockModel(network, CPU, source=source).whole() as whole:
        for kind in ("state_dict", "named_buffers"):
            one, other = dict(getattr(expected, kind)()), dict(getattr(whole, kind)())
            assert one.keys() == other.keys()
            for name, tensor in one.items():
                assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
        tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
        assert tied == (expected.get_input_embeddings().weight is expected.get_output_embeddings().weight)
        assert whole.generation_config.to_dict() == expected.generation_config.to_dict()
    assert all(
        parameter.is_meta
        for block in BlockModel(network, CPU, source=source).blocks
        for parameter in block.parameters()
    )


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rewrite(folder: Path, change) -> Path:
    """Replace the folder's single file by what `change` makes of its tensors."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_is_the_loaded_one(request, family, dtype):
    assert_same_model(request.getfixturevalue(f"tiny_{family}"), dtype)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_sharded_half_precision_checkpoints(tiny_opt, tmp_path, stored):
    AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=stored).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_model(tmp_path)
    assert_same_model(tmp_path, torch.float32)


@pytest.mark.parametrize(("family", "prefix"), [("opt", "model."), ("gpt2", "transformer."), ("llama", "model.")])
def test_keys_without_the_base_models_prefix(request, tmp_path, family, prefix):
    folder = copied(request.getfixturevalue(f"tiny_{family}"), tmp_path / "model")
    rewrite(folder, lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    assert_same_model(folder)


def test_tables_and_masks_of_old_checkpoints_are_passed_over(tiny_gpt2, tmp_path):
    folder = copied(tiny_gpt2, tmp_path / "model")
    old = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4), "transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9)}
    rewrite(folder, lambda tensors: tensors | old)
    assert_same_model(folder)
    assert loading.check_weights(loading.resolve(node(folder))) == []


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_stored_twice(tiny_opt, tmp_path, equal):
    folder = copied(tiny_opt, tmp_path / "model")

    def twice(tensors):
        embedding = tensors["model.decoder.embed_tokens.weight"]
        return {**tensors, "lm_head.weight": embedding.clone() if equal else embedding + 1}

    assert_same_model(rewrite(folder, twice))


def test_a_missing_weight_is_named(tiny_llama, tmp_path):
    folder = copied(tiny_llama, tmp_path / "model")
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(UserError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load_streamed(loading.resolve(node(folder)))


def test_a_weight_of_another_shape_is_named(tiny_llama, tmp_path):
    folder = copied(tiny_llama, tmp_path / "model")
    rewrite(folder, lambda tensors: {**tensors, "model.norm.weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"other shapes for model\.norm\.weight"):
        loading.load_streamed(loading.resolve(node(folder)))


@pytest.mark.parametrize("sharded", [True, False])
def test_bin_checkpoints_are_converted_once(tiny_opt, tmp_path, monkeypatch, sharded):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    folder = copied(tiny_opt, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]  # as `.bin` files have it: one storage
    names = sorted(tensors)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]} if sharded else {"pytorch_model.bin": names}
    for file, keys in parts.items():
        torch.save({key: tensors[key] for key in keys}, folder / file)
    if sharded:
        places = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(places))
    assert_same_model(folder)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("converted again"))
    assert safetensors_folder(folder).is_relative_to(tmp_path / "assets")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
def test_checkpoints_on_the_hub_are_downloaded_once(tiny_opt, tmp_path, monkeypatch, form):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    folder = copied(tiny_opt, tmp_path / "hub/models/owner/tiny")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    if form == "sharded":
        (folder / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained(tiny_opt).save_pretrained(folder, max_shard_size="50KB")
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    hub_node = {"name": "tiny", "path": "owner/tiny"}

    def check() -> None:
        network, source = loading.load_streamed(loading.resolve(hub_node), "auto")
        with BlockModel(network, CPU, source=source).whole() as whole:
            assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.state_dict().items())
        assert loading.identity(loading.locate(hub_node)) == {"commit": fake_hub.COMMIT} | {
            name: value for name, value in fingerprint(folder).items() if not name.startswith("tokenizer")
        }

    with fake_hub.serving(tmp_path / "hub") as (address, _):
        fake_hub.use(address, tmp_path / "cache", monkeypatch)
        check()
    fake_hub.use(address, tmp_path / "cache", monkeypatch)  # the hub is gone now, the cache is not
    check()


class Command:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", ["pickle", "cut"])
def test_bin_files_are_never_executed_and_damage_is_named(tiny_opt, tmp_path, monkeypatch, capfd, content):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    folder = copied(tiny_opt, tmp_path / "model")
    file = folder / "pytorch_model.bin"
    torch.save(Command() if content == "pickle" else load_file(folder / "model.safetensors"), file)
    if content == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is truncated, damaged, or holds more than weights"):
        loading.load_streamed(loading.resolve(node(folder)))
    assert "executed" not in capfd.readouterr().out
    assert not any(path.is_dir() for path in (tmp_path / "assets").glob("**/model-*"))


def damage_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a header at all")


def lose_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "one.safetensors")
    places = dict.fromkeys(tensors, "one.safetensors") | {"model.norm.weight": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def misplace_key(folder: Path) -> None:
    lose_shard(folder)
    save_file({"other": torch.ones(1)}, folder / "two.safetensors")


def escape(folder: Path) -> None:
    lose_shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_file, r"model\.safetensors is truncated or damaged"),
        (damage_header, r"model\.safetensors is truncated or damaged"),
        (lose_shard, r"lacks two\.safetensors, which model\.safetensors\.index\.json names"),
        (misplace_key, r"two\.safetensors lacks model\.norm\.weight"),
        (escape, r"names a file outside the folder"),
    ],
)
def test_damaged_checkpoints_are_refused_before_anything_starts(settings, tiny_llama, tmp_path, damage, message):
    folder = copied(tiny_llama, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        resolve(compose([*settings, f"model.path={folder}"]))
    assert "\n" not in str(error.value)


def test_a_fingerprint_tells_a_retrained_model(tiny_llama, tmp_path):
    folder = copied(tiny_llama, tmp_path / "model")
    before = fingerprint(folder)
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert before == fingerprint(tiny_llama) and set(before) == {*beside, "model.safetensors"}
    rewrite(folder, lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1})
    assert fingerprint(folder)["model.safetensors"] != before["model.safetensors"]


def test_a_fingerprint_tells_a_model_whose_middle_was_pruned(tmp_path):
    tensors = {name: torch.ones(3 << 20, dtype=torch.uint8) for name in ("first", "middle", "then")}
    save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    tensors["middle"][1 << 20 : 2 << 20] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


@pytest.fixture
def settings(tiny_llama, text_file) -> list[str]:
    return words_for(
        tiny_llama, text_file, "nsamples=6", "seqlen=48", "eval.windows=4", "eval.sample_tokens=4", "save=true"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("opt", ["batch_size=4", "method=sparsegpt"]),
        ("gpt2", ["dtype=bfloat16"]),
        ("gemma3", ["propagate=dense"]),
    ],
)
def test_a_streamed_run_equals_one_in_memory(request, settings, tmp_path, family, more):
    words = [*settings, f"model.path={request.getfixturevalue(f'tiny_{family}')}", *more]
    records, weights = [], []
    for name, extra in (("whole", ["stream=false"]), ("streamed", ["stream=true", "hidden_states=disk"])):
        records.append(runs.run(compose([*words, *extra]), tmp_path / name))
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name / "model", dtype="auto").state_dict())
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["model", "record.json"]
    whole, streamed = records
    assert streamed["environment"]["streamed"] and not whole["environment"]["streamed"]
    assert (whole["environment"]["hidden_states"], streamed["environment"]["hidden_states"]) == ("host", "disk")
    assert streamed["config_hash"] == whole["config_hash"]
    for key in ("evaluations", "sample", "summary", "calibration"):
        expected = {**whole[key], "solver_seconds": 0} if key == "summary" else whole[key]
        assert ({**streamed[key], "solver_seconds": 0} if key == "summary" else streamed[key]) == expected
    assert [row["relative_loss"] for row in streamed["layers"]] == [row["relative_loss"] for row in whole["layers"]]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.dtype == weights[1][name].dtype and torch.equal(tensor, weights[1][name]), name


@pytest.mark.slow
def test_a_streamed_dense_model_is_evaluated_and_saved(settings, tiny_llama, tmp_path):
    whole = runs.run(compose([*settings, "method=dense", "stream=false"]), tmp_path / "whole")
    streamed = runs.run(compose([*settings, "method=dense", "stream=true"]), tmp_path / "streamed")
    assert whole["evaluations"] == streamed["evaluations"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed" / "model").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in saved.items())


@pytest.mark.slow
def test_a_streamed_model_is_saved_packed_and_not_streamed_from_there(settings, tmp_path):
    dense = runs.run(compose([*settings, "stream=true", "method=magnitude"]), tmp_path / "dense")
    packed = runs.run(compose([*settings, "stream=true", "method=magnitude", "save=packed"]), tmp_path / "packed")
    assert packed["evaluations"] == dense["evaluations"] and packed["saved"]["ratio"] < 1
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "dense" / "model").state_dict()
    other = alps_exp.load_packed(tmp_path / "packed" / "model").state_dict()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    with pytest.raises(UserError, match="packed weights, which are not streamed"):
        loading.load_streamed(loading.resolve(node(tmp_path / "packed" / "model")))


@pytest.mark.slow
def test_models_larger_than_half_of_the_free_memory_are_streamed(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("alps_exp.runs.workspace.free_host", lambda: 1_000_000)
    record = runs.run(compose([*settings, "method=magnitude", "eval=none"]), tmp_path)
    assert record["environment"]["streamed"]


def test_streaming_needs_a_place_for_what_is_pruned(settings):
    with pytest.raises(UserError, match="needs resumable=true"):
        resolve(compose([*settings, "stream=true", "resumable=false"]))


def test_only_the_block_in_use_is_in_memory(tiny_llama):
    network, source = loading.load_streamed(loading.resolve(node(tiny_llama)))
    model = BlockModel(network, CPU, source=source)
    with model.block(1) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert all(parameter.is_meta for parameter in model.blocks[0].parameters())
    assert all(parameter.is_meta for parameter in model.blocks.parameters())


def test_a_checkpoint_lists_shapes_without_reading(tiny_llama):
    entries = Checkpoint(tiny_llama).entries
    assert entries["model.norm.weight"].shape == (64,) and entries["model.norm.weight"].dtype == "F32"
