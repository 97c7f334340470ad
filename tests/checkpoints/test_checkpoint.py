"""What counts as a checkpoint: one rule for its files, one identity, and nothing left out or saved wrong in silence."""

import json
import os
import shutil
from pathlib import Path

import fake_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import mixtral, words_for
from transformers import AutoConfig, AutoModelForCausalLM

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.checkpoints import hub, packed
from alps_exp.checkpoints.checkpoint import Checkpoint, fingerprint, weight_files
from alps_exp.cli import cell
from alps_exp.cli.overrides import compose
from alps_exp.model import loading
from alps_exp.model.blocks import BlockModel
from alps_exp.runs import run as runs
from alps_exp.runs import saving
from alps_exp.runs.provenance import inputs_of
from alps_exp.runs.settings import resolve

FORMS = {"whole": ["stream=false"], "streamed": ["stream=true"], "packed": ["stream=true", "save=packed"]}


def node(folder: Path) -> dict:
    return {"name": "local", "path": str(folder)}


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def words(copy, text_file) -> list[str]:
    """Of a short run of the copy."""
    return words_for(
        copy,
        text_file,
        "nsamples=4",
        "seqlen=48",
        "eval=none",
        "method=wanda",
        "sparsity=0.5",
        "save=true",
        "eval.sample_tokens=0",
    )


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(folder: Path, change) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def load_saved(folder: Path):
    return alps_exp.load_packed(folder) if packed.is_packed(folder) else AutoModelForCausalLM.from_pretrained(folder)


# Files


@pytest.mark.parametrize("names", ["single", "index", "single index", "index bin", "single stale", "single index bin"])
def test_one_rule_for_files_is_transformers_own(copy, tmp_path, monkeypatch, names):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    network = AutoModelForCausalLM.from_pretrained(copy)
    (copy / "model.safetensors").unlink()

    def weights(value: float) -> dict:
        network.model.norm.weight.data.fill_(value)
        return network.state_dict()

    if "index" in names:
        weights(2.0)
        network.save_pretrained(copy, max_shard_size="100KB")
    if "stale" in names:
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    if "bin" in names:
        torch.save(weights(3.0), copy / "pytorch_model.bin")
    if "single" in names:
        save_file(weights(1.0), copy / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(copy).model.norm.weight[0].item()
    assert expected == (1.0 if "single" in names else 2.0)
    assert loading.load_model(loading.resolve(node(copy))).model.norm.weight[0].item() == expected
    streamed, _ = loading.load_streamed(loading.resolve(node(copy)))
    assert streamed.model.norm.weight[0].item() == expected
    read = {file.name for file in weight_files(copy)[1]}
    assert {name for name in fingerprint(copy) if name.endswith((".safetensors", ".bin"))} == read
    assert ("model.safetensors" in read) == ("single" in names)


def test_files_of_two_checkpoints_in_one_index_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "a.safetensors")
    twice = {"model.norm.weight": tensors["model.norm.weight"]}
    save_file(twice, copy / "b.safetensors")
    places = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert Checkpoint(copy).entries["model.norm.weight"].file.name == "b.safetensors"
    save_file({"model.norm.weight": twice["model.norm.weight"] + 1}, copy / "b.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors and b\.safetensors in .* hold different model\.norm\.weight"):
        loading.check_weights(loading.resolve(node(copy)))


def test_a_model_saved_over_a_packed_one_comes_first(copy, tmp_path):
    packed.pack_folder(copy)
    network = alps_exp.load_packed(copy)
    network.model.norm.weight.data.fill_(5.0)
    network.save_pretrained(copy)
    assert not packed.is_packed(copy) and loading.load_model(loading.resolve(node(copy))).model.norm.weight[0] == 5.0


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_and_how_to_merge_it_is_said(words, copy, beside):
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"}))
    if not beside:
        (copy / "model.safetensors").unlink()
        (copy / "config.json").unlink()
    message = "an adapter .* beside a model: if it is merged" if beside else "an adapter without its model.*python -c"
    with pytest.raises(UserError, match=message):
        resolve(compose(words))
    with pytest.raises(UserError, match=message):
        loading.load_model(loading.resolve(node(copy)))


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_refused(copy, tmp_path, monkeypatch):
    shutil.copytree(copy, tmp_path / "hub/models/owner/adapted")
    (tmp_path / "hub/models/owner/adapted/adapter_config.json").write_text("{}")
    with fake_hub.serving(tmp_path / "hub") as (address, _):
        fake_hub.use(address, tmp_path / "cache", monkeypatch)
        with pytest.raises(UserError, match="owner/adapted' holds an adapter"):
            loading.resolve({"name": "x", "path": "owner/adapted"})


# Tensors that do not fit the configuration


def bias(tensors: dict) -> dict:
    return tensors | {"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}


def norm(tensors: dict) -> dict:
    return tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}


def head_bias(tensors: dict) -> dict:
    return tensors | {"lm_head.bias": torch.ones(384)}


def scale(tensors: dict) -> dict:
    return tensors | {"model.layers.0.mlp.up_proj.weight_scale": torch.tensor(2.0)}


def float8(tensors: dict) -> dict:
    return {n: t.to(torch.float8_e4m3fn) if "proj" in n else t for n, t in tensors.items()}


def int8(tensors: dict) -> dict:
    return {n: t.to(torch.int8) if "proj" in n else t for n, t in tensors.items()}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bias, r"holds model\.layers\.1\.self_attn\.q_proj\.bias, which its configuration .* has no place for"),
        (norm, r"q_norm\.weight, which its configuration .* has no place for; config\.json is not this checkpoint's"),
        (head_bias, r"holds lm_head\.bias"),
        (scale, r"weight_scale, .* scales of quantised weights: give the unquantised checkpoint"),
        (float8, r"as F8_E4M3|as float8_e4m3fn"),
        (int8, r"as I8 and names no quantization_config"),
        (lambda tensors: {n: t for n, t in tensors.items() if "norm" not in n}, r"lacks the weights .* and 2 more"),
        (lambda tensors: tensors | {"model.norm.weight": torch.ones(3)}, r"other shapes for model\.norm\.weight"),
    ],
)
def test_tensors_that_contradict_the_configuration_are_refused_at_once(words, copy, change, message, form):
    change_tensors(copy, change)
    if form == "bin":
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message) as error:
        resolve(compose(words))
    assert "\n" not in str(error.value)
    for load in (loading.load_model, loading.load_streamed):
        with pytest.raises(UserError, match=message):
            load(loading.resolve(node(copy)))


@pytest.mark.slow
def test_blocks_that_are_left_out_are_in_the_record(words, copy, tmp_path, capsys):
    change_config(copy, num_hidden_layers=1)
    change_tensors(copy, lambda tensors: tensors | {"value_head.weight": torch.ones(1, 64)})
    found = [runs.run(compose([*words, *more]), tmp_path / name)["warnings"] for name, more in FORMS.items()]
    assert found[0] == found[1] == found[2]
    assert "holds 10 tensors that its configuration does not ask for" in found[0][0]
    assert "asks for 1 blocks, so that 1 to 1 are left out" in found[0][0]
    assert found[0][0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields", [{"compression_config": {"quant_method": "x"}}, {"transformers_weights": "b.safetensors"}]
)
def test_configurations_that_speak_of_other_weights_are_refused(copy, fields):
    change_config(copy, **fields)
    with pytest.raises(UserError, match=r"quantised|transformers_weights"):
        loading.resolve(node(copy))


@pytest.mark.slow
def test_a_spoilt_generation_config_is_refused_by_name(words, copy):
    for content in ("{", '{"max_new_tokens": 0}', "[]"):
        (copy / "generation_config.json").write_text(content)
        with pytest.raises(UserError, match=r"^generation_config\.json of model\.path=.* cannot be read"):
            resolve(compose(words))


# Identity


def test_the_identity_covers_all_that_decides_results(copy):
    for name in ("chat_template.jinja", "own.py", "special_tokens_map.json"):
        (copy / name).write_text("{}")
    before = loading.identity(loading.locate(node(copy)))
    files = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert set(before) == {*files, "chat_template.jinja", "own.py", "special_tokens_map.json"}
    for name in before:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + b" ")
        assert loading.identity(loading.locate(node(copy))) != before, name
        (copy / name).write_bytes(content)
    (copy / "README.md").write_text("not part of it")
    assert loading.identity(loading.locate(node(copy))) == before


@pytest.mark.parametrize(
    ("place", "commit"),
    [
        ("snapshots/latest", False),
        (f"snapshots/{fake_hub.COMMIT}", False),
        ("models--a--b/snapshots/latest", False),
        (f"models--a--b/snapshots/{fake_hub.COMMIT}", True),
    ],
)
def test_a_folder_is_a_commit_only_in_the_hubs_cache_and_its_files_count_anyway(copy, tmp_path, place, commit):
    folder = Path(shutil.copytree(copy, tmp_path / place))
    before = loading.identity(loading.locate(node(folder)))
    assert before.get("commit") == (fake_hub.COMMIT if commit else None)
    change_tensors(folder, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    assert loading.identity(loading.locate(node(folder)))["model.safetensors"] != before["model.safetensors"]
    assert (hub.commit(folder) is not None) == commit


@pytest.mark.slow
def test_a_sweep_sees_changed_weights_below_snapshots_and_a_changed_tokenizer(words, copy, tmp_path):
    folder = Path(shutil.copytree(copy, tmp_path / "snapshots/latest"))
    cfg = compose([*words, f"model.path={folder}", "save=false"])
    record = runs.run(cfg, tmp_path / "run")
    assert cell.changes(record, resolve(cfg)) == []
    change_tensors(folder, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + " ")
    assert cell.changes(record, resolve(cfg)) == ["checkpoint model.safetensors", "checkpoint tokenizer_config.json"]


def test_a_commit_stands_for_files_that_are_no_longer_in_the_cache(words, copy, tmp_path):
    folder = Path(shutil.copytree(copy, tmp_path / f"models--a--b/snapshots/{fake_hub.COMMIT}"))
    cfg = compose([*words, f"model.path={folder}"])
    settings = resolve(cfg)
    digest = settings.configuration.digest
    record = {"environment": {"code": job_code(), "inputs": inputs_of(settings)}, "config_hash": digest}
    (folder / "model.safetensors").unlink()
    assert cell.changes(record, settings) == []
    change_config(folder, rms_norm_eps=1e-5)
    assert cell.changes(record, settings) == ["checkpoint config.json"]


def job_code() -> str:
    from alps_exp.runs.provenance import code_version

    return code_version()


# What is saved


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_generation_config_that_transformers_refuses_to_save_is_kept(words, copy, tmp_path, form):
    shipped = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False, "temperature": 0.9, "top_p": 0.6}
    (copy / "generation_config.json").write_text(json.dumps(shipped))
    runs.run(compose([*words, *FORMS[form]]), tmp_path / "run")
    saved = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert shipped.items() <= saved.items()
    assert load_saved(tmp_path / "run/model").generation_config.temperature == 0.9


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_generation_settings_in_config_json_are_kept(words, copy, tmp_path, form):
    (copy / "generation_config.json").unlink()
    change_config(copy, temperature=0.9)
    runs.run(compose([*words, *FORMS[form]]), tmp_path / "run")
    assert json.loads((tmp_path / "run/model/generation_config.json").read_text())["temperature"] == 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("form", "cache"), [*((form, False) for form in FORMS), ("whole", True)])
def test_the_saved_configuration_is_the_checkpoints(words, copy, tmp_path, form, cache):
    change_config(copy, use_cache=cache)
    runs.run(compose([*words, *FORMS[form]]), tmp_path / "run")
    before, after = (json.loads((f / "config.json").read_text()) for f in (copy, tmp_path / "run/model"))
    assert before == after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype", "saved", "form"),
    [
        *(("wanda", "auto", "bfloat16", form) for form in FORMS),
        *(("sparsegpt", "auto", "float32", form) for form in FORMS),
        ("wanda", "float32", "float32", "whole"),
    ],
)
def test_the_checkpoints_dtype_is_kept_where_it_holds_the_weights(words, copy, tmp_path, form, method, dtype, saved):
    AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(copy)
    record = runs.run(compose([*words, *FORMS[form], f"method={method}", f"dtype={dtype}"]), tmp_path / "run")
    folder = tmp_path / "run/model"
    assert json.loads((folder / "config.json").read_text())["dtype"] == saved
    network = alps_exp.load_packed(folder) if form == "packed" else loading.load_model(loading.resolve(node(folder)))
    assert {str(p.dtype) for p in network.parameters()} == {f"torch.{saved}"}
    assert [line for line in record["warnings"] if "saved in float32" in line and "dtype=bfloat16" in line] == (
        record["warnings"] if method == "sparsegpt" else []
    )
    again = runs.run(compose([*words, f"model.path={folder}", "method=dense", "save=false"]), tmp_path / "again")
    assert again["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_is_not_tied_is_saved_as_such(words, copy, tmp_path, form):
    change_config(copy, tie_word_embeddings=True)
    record = runs.run(compose([*words, *FORMS[form]]), tmp_path / "run")
    assert "ties the head to the embedding, and the weights hold different ones" in record["warnings"][0]
    assert not AutoConfig.from_pretrained(tmp_path / "run/model").tie_word_embeddings
    again = load_saved(tmp_path / "run/model")
    assert torch.equal(again.lm_head.weight, load_file(copy / "model.safetensors")["lm_head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o700), (0o002, 0o775), (0o022, 0o755)])
def test_the_saved_folder_respects_the_umask(words, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        runs.run(compose(words), tmp_path / "run")
    finally:
        os.umask(before)
    assert (tmp_path / "run/model").stat().st_mode & 0o777 == mode
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "run/model").iterdir()} == {mode & 0o666}


def lose_a_tensor(folder: Path) -> None:
    change_file(folder, lambda tensors: {n: t for n, t in tensors.items() if "up_proj" not in n})


def flip_a_bit(folder: Path) -> None:
    def flip(tensors: dict) -> dict:
        name = next(name for name in tensors if "up_proj" in name)
        tensors[name].view(torch.uint8).view(-1)[5] ^= 1
        return tensors

    change_file(folder, flip)


def change_file(folder: Path, change) -> None:
    """Of a file with a block in it, which may be another one's hard link."""
    file = max(folder.glob("*.safetensors"))
    tensors = change(load_file(file))
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def other_configuration(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "form"),
    [*((spoil, form) for spoil in (lose_a_tensor, flip_a_bit) for form in FORMS), (other_configuration, "whole")],
)
def test_what_is_saved_is_read_back(words, tmp_path, monkeypatch, form, spoil):
    verify = saving._verify

    def spoilt(model, store, folder, *rest):
        spoil(folder)
        return verify(model, store, folder, *rest)

    monkeypatch.setattr(saving, "_verify", spoilt)
    cfg = compose([*words, *FORMS[form]])
    with pytest.raises((RuntimeError, UserError), match=r"not the pruned model|lacks|damaged"):
        runs.run(cfg, tmp_path / "run")
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["status"] == "failed" and not list((tmp_path / "run").glob("*model*"))
    monkeypatch.undo()
    assert runs.run(cfg, tmp_path / "run")["attempts"] == 2, "the blocks were kept"
    assert load_saved(tmp_path / "run/model")


@pytest.mark.slow
def test_a_shard_that_changes_on_the_disk_is_noticed(words, tmp_path, monkeypatch):
    assemble = saving._assemble

    def spoilt(model, store, folder, dtype):
        assemble(model, store, folder, dtype)
        file = store.shard(1)
        with file.open("r+b") as stream:
            stream.seek(-3, 2)
            stream.write(b"x")

    monkeypatch.setattr(saving, "_assemble", spoilt)
    with pytest.raises(RuntimeError, match=r"not the pruned model \(model\.layers\.1"):
        runs.run(compose([*words, "stream=true"]), tmp_path / "run")


def mixture(folder: Path, source: Path) -> Path:
    """A tiny mixture of experts, whose checkpoint has a tensor for each expert and whose model has one for all."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(mixtral()).save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["true", "packed"])
def test_tensors_that_transformers_stores_in_another_layout_are_compared_by_loading(
    words, tiny_llama, tmp_path, monkeypatch, form
):
    folder = mixture(tmp_path / "mixture", tiny_llama)
    cfg = compose([*words, f"model.path={folder}", f"save={form}", "layers.exclude=['*experts*']"])
    assert not [line for line in runs.run(cfg, tmp_path / "run")["warnings"] if "compared" in line]
    assert load_saved(tmp_path / "run/model")
    monkeypatch.setattr(saving, "free_host", lambda: 0)
    assert "4 saved tensors were not compared" in runs.run(cfg, tmp_path / "run")["warnings"][-1]
    monkeypatch.undo()
    verify = saving._verify

    def spoilt(model, store, folder, *rest):
        change_file(
            folder,
            lambda tensors: {
                n: t + 1 if "experts.3.w2" in n and t.is_floating_point() else t for n, t in tensors.items()
            },
        )
        return verify(model, store, folder, *rest)

    monkeypatch.setattr(saving, "_verify", spoilt)
    with pytest.raises(RuntimeError, match="not the pruned model"):
        runs.run(cfg, tmp_path / "run")


def test_what_cannot_be_saved_is_refused_before_pruning(words, tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise ValueError("no")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
    monkeypatch.setattr(runs, "prune_blocks", lambda *_: pytest.fail("pruned"))
    with pytest.raises(UserError, match=r"tokenizer of .* can be loaded and not saved again \(no\)"):
        runs.run(compose(words), tmp_path / "run")


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_model_code_that_is_trusted_prunes_and_saves(words, copy, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copy / "own_code.py").write_text(OWN_CODE)
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    change_config(copy, model_type="own", architectures=["OwnModel"], auto_map=auto)
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true"):
        resolve(compose(words))
    cfg = compose([*words, "model.trust_remote_code=true"])
    assert len(resolve(cfg).patterns) == 14
    runs.run(cfg, tmp_path / "run")
    assert (tmp_path / "run/model/own_code.py").is_file()
    assert "own_code.py" in loading.identity(loading.locate(node(copy) | {"trust_remote_code": True}))
    with pytest.raises(UserError, match="not streamed"):
        runs.run(compose([*words, "model.trust_remote_code=true", "stream=true"]), tmp_path / "streamed")


def test_a_model_in_memory_is_as_before_when_it_was_saved_in_another_dtype(copy, tmp_path):
    AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(copy)
    network = loading.load_model(loading.resolve(node(copy)), torch.float32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with saving._stored_as(BlockModel(network, torch.device("cpu")), torch.bfloat16):
        assert network.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.dtype == torch.float32
