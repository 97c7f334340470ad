"""Calibration text that the dense model writes: deterministic, kept, its own, and refused where it cannot be had."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny import execute, load

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.cli.plan import plan
from alps_exp.data import generated
from alps_exp.data.settings import CalibrationSettings, GeneratedSettings
from alps_exp.model import loading
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def assets(tmp_path, monkeypatch):
    """The folder of the kept texts."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


def asked(nsamples=3, seqlen=24, seed=0, bos="auto", **keys):
    return CalibrationSettings(GeneratedSettings("generated", **keys), nsamples, seqlen, seed, bos)


def written(folder, wanted, count=None):
    """The windows and their description; `count` collects how often the model was loaded."""
    settings = loading.resolve({"name": "local", "path": str(folder)})

    def network():
        if count is not None:
            count.append(1)
        return loading.load_model(settings)

    tokenizer = loading.load_tokenizer(settings.source)
    return generated.generated_tokens(wanted, settings, tokenizer, network, CPU, torch.float32)


def plain_samples(model, starts, seqlen, seeds, batch_size, temperature=1.0):
    """Windows of equally long starts, by forwards of the whole text and torch.multinomial."""
    rows = []
    for first in range(0, len(starts), batch_size):
        ids = torch.tensor(starts[first : first + batch_size])
        torch.manual_seed(seeds[first])
        while ids.shape[1] < seqlen:
            scores = model(ids, use_cache=False).logits[:, -1].float() / temperature
            ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1)], 1)
        rows.append(ids)
    return torch.cat(rows)


@pytest.mark.slow
def test_windows_are_samples_of_the_model_and_end_where_they_are_full(tiny_llama):
    model = load(tiny_llama)
    starts = [[1]] * 5
    data = GeneratedSettings("generated", temperature=0.8, batch_size=2)
    rules, before = model.generation_config, torch.get_rng_state()
    found = generated.write(model, starts, 40, data, "seed", CPU, quiet=True)
    assert model.generation_config is rules and torch.equal(torch.get_rng_state(), before)
    seeds = [int(generated.sha256(f"seed {index}")[:15], 16) for index in range(5)]
    assert torch.equal(found, plain_samples(model, starts, 40, seeds, 2, 0.8))


def test_an_end_of_text_does_not_end_a_window(tiny_llama):
    model = load(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))  # every token alike
    model.generation_config.eos_token_id = list(range(0, tiny_models.VOCABULARY, 2))
    found = generated.write(model, [[1]] * 2, 32, GeneratedSettings("generated"), "s", CPU, quiet=True)
    assert ((found % 2 == 0).sum(1) > 4).all() and (found[:, -8:] % 2 == 1).any()


@pytest.mark.slow
def test_kept_text_is_read_again_and_belongs_to_model_and_keys(tiny_llama, tiny_opt, assets):
    loads = []
    first, description = written(tiny_llama, asked(), loads)
    again, _ = written(tiny_llama, asked(), loads)
    assert torch.equal(first, again) and len(loads) == 1 and first.shape == (3, 24)
    assert description["dataset"] == "generated" and description["bos"] == "every window starts with <s>"
    others = [
        written(tiny_llama, wanted, loads)[0]
        for wanted in (asked(seed=1), asked(temperature=0.9), asked(top_k=5), asked(top_p=0.8), asked(batch_size=2))
    ]
    others.append(written(tiny_opt, asked(), loads)[0])
    assert len(loads) == 7
    assert len({sample.numpy().tobytes() for sample in (first, *others)}) == 7
    for file in assets.rglob("*.safetensors"):  # damaged files are written again
        tensors = load_file(file)
        save_file({"tokens": tensors["tokens"] * 0}, file, metadata={"sha256": "0" * 64})
    assert torch.equal(written(tiny_llama, asked(), loads)[0], first) and len(loads) == 8


def test_held_out_windows_are_others_and_change_nothing(tiny_llama):
    plain, _ = written(tiny_llama, asked(2))
    both, description = written(tiny_llama, asked(2, holdout=3))
    assert torch.equal(both[:2], plain) and both.shape == (5, 24) and description["held_out_windows"] == 3
    assert len(torch.unique(both, dim=0)) == 5


@pytest.mark.slow
def test_windows_begin_with_prompts_or_random_tokens(tiny_gpt2, tiny_llama):
    tokenizer = loading.load_tokenizer(loading.locate({"name": "local", "path": str(tiny_llama)}))
    prompts = ("The old sailor", "In", "A young painter")
    found, description = written(tiny_llama, asked(5, prompts=prompts, batch_size=2))
    for index, row in enumerate(found.tolist()):
        ids = tokenizer(prompts[index % 3])["input_ids"]
        assert row[: len(ids)] == ids and ids[0] == 1
    assert description["prompts"] == list(prompts) and description["bos"] == "<s> and a prompt"
    found, description = written(tiny_gpt2, asked(8, 8))
    assert len(set(found[:, 0].tolist())) > 3 and int(found[:, 0].min()) > 2  # no special one
    assert description["bos"] == "every window starts with a random token"
    found, description = written(tiny_llama, asked(8, 8, bos="false"))
    assert len(set(found[:, 0].tolist())) > 3
    assert int(written(tiny_gpt2, asked(2, 8, bos="window"))[0][0, 0]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(prompts=["The old sailor repairs " * 9]), "data.prompts"),
        (dict(temperature=1e-6), "data.temperature"),
    ],
    ids=["long prompt", "repeating"],
)
def test_what_makes_no_text_is_refused(change, words, tiny_llama):
    with pytest.raises(UserError, match=words):
        written(tiny_llama, asked(**change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_without_numbers_is_refused(value, tiny_llama):
    model = load(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(UserError, match=r"logits are NaN or infinite after 1 tokens"):
        generated.write(model, [[1]], 16, GeneratedSettings("generated"), "s", CPU, quiet=True)
    assert model.generation_config is not None


@pytest.fixture
def words(tiny_llama):
    model = ["model=local", f"model.path='{tiny_llama}'", "data=generated", "device=cpu"]
    return [*model, "nsamples=2", "seqlen=32", "eval=none", "method=wanda"]


@pytest.mark.slow
def test_a_run_calibrates_on_it_and_goes_on_with_it(words, tmp_path):
    workspace = Workspace(keep=True)
    record = execute(words, tmp_path / "a", "data.holdout=2", workspace=workspace)
    again = execute(words, tmp_path / "b", "data.holdout=2")
    losses = [[(row["relative_loss"], row["held_out_loss"]) for row in found["layers"]] for found in (record, again)]
    assert losses[0] == losses[1] and all(loss > 0 for pair in losses[0] for loss in pair)
    assert record["calibration"] == again["calibration"] and record["calibration"]["sampling"] == "generated"
    # The kept network has written, and the next run prunes it as if it had not.
    later = execute(words, tmp_path / "c", "method=magnitude", workspace=workspace)
    alone = execute(words, tmp_path / "d", "method=magnitude")
    assert later["summary"]["mean_relative_loss"] == alone["summary"]["mean_relative_loss"]


@pytest.mark.slow
def test_what_does_not_go_with_it_is_refused_before_the_run(words, tmp_path, monkeypatch):
    def refused(match, *more):
        with pytest.raises(UserError, match=match):
            resolve(compose([*words, *more]))

    refused("leave out stream=true", "stream=true")
    refused("nothing is evaluated on it", "eval=perplexity", "eval.datasets=[generated]")
    refused("data.temperature=0", "data.temperature=0")
    refused("data.top_p=1.5", "data.top_p=1.5")
    refused("data.top_k=-1", "data.top_k=-1")
    refused("data.batch_size=0", "data.batch_size=0")
    refused("data.prompts", "data.prompts=[1]")
    refused("data.prompts", "data.prompts=once")
    assert "written by the model" in plan(resolve(compose(words)))
    monkeypatch.setattr("alps_exp.model.hidden.free_host", lambda: 1000, raising=False)
    monkeypatch.setattr("alps_exp.runs.workspace.free_host", lambda: 1000)
    with pytest.raises(UserError, match="stream=false"):
        execute(words, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_whole_numbers_are_the_same_run(words):
    digests = {resolve(compose([*words, *more])).configuration.digest for more in ([], ["data.temperature=1"])}
    assert len(digests) == 1
    assert dataclasses.asdict(resolve(compose(words)).calibration.data)["prompts"] == ()


def test_from_python(tiny_llama):
    model = load(tiny_llama)
    tokenizer = loading.load_tokenizer(loading.locate({"name": "local", "path": str(tiny_llama)}))
    tokens = alps_exp.generate_tokens(model, tokenizer, nsamples=3, seqlen=24)
    assert torch.equal(tokens, written(tiny_llama, asked())[0])  # as data=generated has them
    assert alps_exp.prune_model(model, tokens, "wanda")["summary"]["layers"] == 14
    with pytest.raises(UserError, match=r"data\.temperature"):
        alps_exp.generate_tokens(model, tokenizer, 3, 24, temperature=-1)
    with pytest.raises(UserError, match="context"):
        alps_exp.generate_tokens(model, tokenizer, 3, 4096)


def test_kept_text_that_cannot_be_read_is_refused_and_stays(tiny_llama, assets, monkeypatch):
    written(tiny_llama, asked())
    (file,) = assets.rglob("*.safetensors")
    kept, opened = file.read_bytes(), type(file).open

    def closed(path, *args, **options):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(file), "open", closed)
        with pytest.raises(UserError, match=r"cannot keep generated text \(.*Permission denied"):
            written(tiny_llama, asked())
    assert file.read_bytes() == kept


def test_near_copies_are_counted_and_refused():
    tokens = torch.randint(3, 90, (40, 64), generator=torch.Generator().manual_seed(0))
    tokens[1, 5:45] = tokens[0, :40]  # elsewhere in the window
    tokens[3, :20] = tokens[2, :20]
    tokens[4, 30:] = tokens[4, :1]  # a window that repeats itself is no copy of another

    def spans(row):
        return [tuple(row[start : start + 16]) for start in range(len(row) - 15)]

    rows = [spans(row) for row in tokens.tolist()]
    others = [set().union(*(set(row) for j, row in enumerate(rows) if j != i)) for i in range(len(rows))]
    expected = [sum(span in other for span in row) / len(row) for row, other in zip(rows, others, strict=True)]
    assert generated.repeated_spans(tokens).tolist() == pytest.approx(expected) and max(expected) > 0.5
    generated.refuse_repetition(tokens, 1.0)  # two of forty
    prompted = torch.cat([torch.arange(3, 43).expand(40, 40), tokens[:, 30:]], 1)
    generated.refuse_repetition(prompted, 1.0, 40)  # alike in what they were given
    tokens[6, 4:60] = tokens[7, 4:60]
    with pytest.raises(UserError, match="4 of 40 windows have more than half of their spans of 16 tokens from others"):
        generated.refuse_repetition(tokens, 1.0)
