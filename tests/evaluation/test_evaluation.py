"""Perplexity against a straightforward reference, the protocols by name, models larger than their device."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path

import fake_hub
import pytest
import tiny_models
import torch
from helpers import parquet
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.evaluation import perplexity
from alps_exp.model import faithful, loss
from alps_exp.model.blocks import BlockModel
from alps_exp.runs import run as runs
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace

KINDS = ("opt", "llama", "gpt2", "gemma3", "qwen3")


def reference(network, windows) -> float:
    """exp of the mean over windows of the mean loss of their targets, each window by the model's own forward."""
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = network(window[None]).logits[0].double()
            losses.append(functional.cross_entropy(logits[:-1], window[1:]))
    return math.exp(torch.stack(losses).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [2**26, 5])
def test_perplexity_is_that_of_a_plain_loop(kind, positions, request, monkeypatch):
    """Also with the head in slices of five positions: no more logits than those are ever there."""
    network = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"tiny_{kind}")).eval()
    windows = torch.randint(3, tiny_models.VOCABULARY, (5, 48), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(loss, "_LOGITS", positions if positions > 100 else positions * 2 * tiny_models.VOCABULARY)
    model, shapes = BlockModel(network, torch.device("cpu")), []
    faithful.ensure(model, windows)  # logits of its own
    head = model.head
    monkeypatch.setattr(model, "head", lambda *a: shapes.append(tuple(a[1].shape[:2])) or head(*a))
    value = perplexity.perplexity(model, windows, batch_size=2, quiet=True)
    assert value == pytest.approx(reference(network, windows), rel=1e-4)
    assert max(shape[1] for shape in shapes) == (47 if positions > 100 else 10)  # the last batch is one window
    assert {shape[1] for shape in shapes if shape[0] == 2} == ({47} if positions > 100 else {5, 2})


def test_softcapped_logits_are_sliced_like_others(monkeypatch):
    from transformers import Gemma2Config

    rotary = {**tiny_models._ROTARY, **tiny_models._TOKENS, "vocab_size": 100, "num_hidden_layers": 2}
    network = AutoModelForCausalLM.from_config(Gemma2Config(**rotary, final_logit_softcapping=0.5)).eval()
    windows = torch.randint(3, 100, (2, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(loss, "_LOGITS", 700)
    value = perplexity.perplexity(BlockModel(network, torch.device("cpu")), windows, quiet=True)
    assert value == pytest.approx(reference(network, windows), rel=1e-4)


@pytest.mark.parametrize("free", [10**9, 1000])
def test_a_model_larger_than_its_device_comes_block_by_block(tiny_llama, monkeypatch, free):
    network = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        wanted = network(tokens).logits
    monkeypatch.setattr("alps_exp.model.blocks.free_device", lambda device: free)
    model = BlockModel(network, torch.device("cpu"), offload=True)
    visits = []
    block = model.block
    monkeypatch.setattr(model, "block", lambda index, **how: visits.append(index) or block(index, **how))
    with perplexity.whole_model(model) as resident, torch.no_grad():
        assert resident == (free == 10**9)
        assert torch.equal(network(tokens).logits, wanted)
    assert visits == [0, 1]  # once each: all before the forward, or each for its own part of it
    with torch.no_grad():
        network(tokens)
    assert visits == [0, 1]  # nothing is left behind


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """WikiText-2, Penn Treebank and C4 in small, as files of the hub."""
    root = tmp_path_factory.mktemp("hub") / "datasets"
    rows = tiny_models.documents(60, seed=6)
    for split in ("train", "test"):
        parquet(root / f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet", [split, *rows])
    for split in ("train", "validation", "test"):
        parquet(root / f"ptb-text-only/ptb_text_only/penn_treebank/{split}/0000.parquet", [split, *rows], "sentence")
    for name in ("train.00000-of-01024", "validation.00000-of-00008"):
        file = root / f"allenai/c4/en/c4-{name}.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress("".join(json.dumps({"text": row}) + "\n" for row in rows).encode()))
    return root.parent


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def alps_c4(tokenizer, rows: list[str], seqlen: int) -> list[int]:
    """The released evaluation loop: documents longer than a window at random, an offset each, seed 0."""
    random.seed(0)
    stream = []
    for _ in range(256):
        while True:
            row = ids(tokenizer, rows[random.randint(0, len(rows) - 1)])
            if len(row) >= seqlen + 1:
                break
        start = random.randint(0, len(row) - seqlen - 1)
        stream += row[start : start + seqlen]
    return stream


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["sparsegpt", "alps", "wanda"])
def test_protocols_from_the_hub_and_from_local_files(protocol, texts, tiny_opt, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_opt)
    rows = tiny_models.documents(60, seed=6)
    length = 256 if protocol == "wanda" else 64  # the tiny model's context is 256
    expected = {
        "wikitext2": (ids(tokenizer, "\n\n".join(["test", *rows])), "\n\n", "test"),
        "ptb": (ids(tokenizer, " ".join(["test", *rows])), " ", "test"),
        "ptb_valid": (ids(tokenizer, "\n\n".join(["validation", *rows])), "\n\n", "validation"),
        "c4": (ids(tokenizer, " ".join(rows)), " ", "first 1100 documents"),
        "c4_sampled": (alps_c4(tokenizer, rows, length), None, "validation"),
    }
    words = ["model=local", f"model.path={tiny_opt}", f"eval={protocol}", "method=dense", "model.bos=false"]
    words += [] if protocol == "wanda" else ["eval.seqlen=64"]
    names = compose(words).eval.datasets
    local = {
        "wikitext2": texts / "datasets/Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet",
        "ptb": texts / "datasets/ptb-text-only/ptb_text_only/penn_treebank/test/0000.parquet",
        "ptb_valid": texts / "datasets/ptb-text-only/ptb_text_only/penn_treebank/validation/0000.parquet",
        "c4": texts / "datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
    }
    local["c4_sampled"] = local["c4"]
    paths = ",".join(f"{name}:{local[name]}" for name in names)
    found = []
    with fake_hub.serving(texts) as (address, _):
        fake_hub.use(address, tmp_path / "cache", monkeypatch)
        for more in ([], [f"eval.path={{{paths}}}"]):
            settings = resolve(compose([*words, *more]))
            texts_of = {text.data.name: text for text in settings.evaluation.texts}
            found.append({name: Workspace().evaluation(settings, texts_of[name]) for name in names})
    for name in names:
        stream, join, split = expected[name]
        for tokens, description in (found[0][name], found[1][name]):
            assert tokens.flatten().tolist() == stream[: tokens.numel()] and tokens.shape[1] == length
            most = 256 if name.startswith("c4") else len(stream)
            assert len(tokens) == min(len(stream) // length, most) and not description["partial"]
            assert description["join"] == join and description["bos"] == "auto: the tokenizer adds </s> to each text"
        assert split in found[0][name][1]["split"] and "sha256" in found[1][name][1]["source"]


@pytest.mark.slow
def test_a_protocol_in_the_record(tiny_llama, text_file, tmp_path):
    words = ["model=local", f"model.path={tiny_llama}", "method=dense", "eval=wanda", f"eval.path={text_file}"]
    record = runs.run(compose([*words, "device=cpu"]), tmp_path / "whole")
    (row,) = record["evaluations"]
    assert row["protocol"] == "wanda" and row["seqlen"] == tiny_models.CONTEXT and row["join"] == "\n\n"
    assert not row["partial"] and "all of" in row["reading"] and row["shown"] and row["stderr"] is None
    assert row["better"] == "lower"
    record = runs.run(compose([*words, "device=cpu", "eval.windows=2"]), tmp_path / "part")
    assert record["evaluations"][0]["partial"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["eval.path={ptb:FILE}"], "eval.path names 'ptb'"),
        (["eval.path={wikitext2:nowhere.raw}"], r"eval.path.wikitext2=nowhere.raw does not exist"),
        (["eval.datasets=[wikitext2,ptb]", "eval.path=FILE"], "stands in for one data set"),
        (["eval.seqlen=many"], "eval.seqlen='many'"),
        (["eval.bos=perhaps"], "did you mean|known: "),
        (["eval=sparsegpt"], "eval.seqlen=2048 is beyond the model's context of 256"),
    ],
)
def test_mistakes(words, part, tiny_llama, text_file):
    base = ["model=local", f"model.path={tiny_llama}", "method=dense", "eval=wanda"]
    with pytest.raises(UserError, match=part) as error:
        resolve(compose([*base, *(word.replace("FILE", str(text_file)) for word in words)]))
    assert "\n" not in str(error.value)


def test_windows_of_a_model_without_a_context(tiny_llama, monkeypatch):
    from alps_exp.model import loading

    monkeypatch.setattr(loading, "context_length", lambda config: None)
    with pytest.raises(UserError, match="names no context length"):
        resolve(compose(["model=local", f"model.path={tiny_llama}", "method=dense", "eval=wanda"]))
