"""Windows of fresh text share nothing with what is spoken for."""

import dataclasses
import re

import fake_hub
import pytest
import tiny_models
import torch
from tiny import FEW_WINDOWS, execute, words_for
from transformers import AutoTokenizer

from alps_exp import UserError, prune_model
from alps_exp.cli.overrides import compose
from alps_exp.cli.plan import plan
from alps_exp.data.fresh import RUN, Spoken, fresh_tokens
from alps_exp.data.settings import DataSettings
from alps_exp.data.texts import calibration_text
from alps_exp.runs.naming import Configuration
from alps_exp.runs.settings import resolve

ONE = {"windows": 1, "seqlen": 64, "seed": 0, "spoken": Spoken([])}


def shared(one: list[int], other: list[int], length: int) -> bool:
    """By plain comparison, whether two windows have a run of tokens in common."""
    runs = {tuple(other[i : i + length]) for i in range(len(other) - length + 1)}
    return any(tuple(one[i : i + length]) in runs for i in range(len(one) - length + 1))


def test_windows_share_text_where_a_run_of_tokens_is_the_same():
    generator = torch.Generator().manual_seed(0)
    spoken = torch.randint(0, 50_000, (3, 90), generator=generator)
    windows = torch.randint(0, 50_000, (5, 70), generator=generator)
    windows[1, 7 : 7 + RUN] = spoken[2, 40 : 40 + RUN]
    windows[2, 7 : 7 + RUN - 1] = spoken[0, : RUN - 1]  # one short
    windows[3, :] = spoken[1, 20:90]
    windows[4, :RUN] = spoken[0, :RUN].flip(0)
    found = Spoken([spoken[:1], spoken[1:]]).within(windows)
    assert found.tolist() == [False, True, False, True, False]
    assert not Spoken([]).within(windows).any() and not Spoken([spoken[:0]]).within(windows).any()
    short = Spoken([spoken, windows[:1, :9]])  # windows of 9 tokens share 8
    assert short.within(spoken[:, 3:11]).all() and not short.within(spoken[:, 3:10]).any()


@pytest.fixture
def other_text(tmp_path):
    """A text that has the first lines of the calibration's among its own."""

    def make(text_file):
        lines = tiny_models.documents(60, seed=11)
        path = tmp_path / "other.txt"
        path.write_text("\n".join(lines[:30] + text_file.read_text().split("\n")[:20] + lines[30:]), encoding="utf-8")
        return path

    return make


@pytest.mark.slow
def test_they_are_the_texts_own_in_any_order_without_those_spoken_for(tiny_llama, text_file, other_text):
    tokenizer, path = AutoTokenizer.from_pretrained(tiny_llama), other_text(text_file)
    ids = tokenizer(text_file.read_text(encoding="utf-8"), verbose=False)["input_ids"][: 64 * 40]
    spoken = torch.tensor(ids).view(40, 64)
    asked = {"windows": 12, "seqlen": 64, "spoken": Spoken([spoken])}
    data = DataSettings("local", path=str(path), sampling="auto", held_out=0.1)
    tokens, facts = fresh_tokens(data, tokenizer, seed=0, **asked)
    again, _ = fresh_tokens(data, tokenizer, seed=0, **asked)
    others, _ = fresh_tokens(data, tokenizer, seed=1, **asked)
    assert torch.equal(tokens, again) and not torch.equal(tokens, others)
    text = tokenizer.decode(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    assert all(tokenizer.decode(row[2:-2]) in text for row in tokens)
    assert not any(shared(row, window, RUN) for row in tokens.tolist() for window in spoken.tolist())
    assert facts["windows"] == 12 and facts["dataset"] == "local" and "other.txt (sha256" in facts["source"]
    with pytest.raises(UserError, match=r"only \d+ windows .* beside \d+ that are .* 9999 were asked"):
        fresh_tokens(data, tokenizer, seed=0, **{**asked, "windows": 9999})


# Runs.


@pytest.fixture
def words(tiny_llama, text_file) -> list[str]:
    found = words_for(tiny_llama, text_file, *FEW_WINDOWS, "nsamples=4", "method=magnitude", "sparsity=0.7")
    return [*found, "data.holdout=4", "losses=false", "finish=distil", "finish.distil.epochs=1"]


@pytest.mark.slow
def test_a_distillation_reads_text_of_another_file(words, tmp_path, text_file, other_text):
    path = other_text(text_file)
    words = [*words, "finish.tokens=900", f"finish.path={path}"]
    text = plan(resolve(compose(words)))
    assert "15 windows of fresh text to train on (data=local), 960 tokens" in text
    assert re.search(r"\d+ (MB|GB) for the dense model's hidden states", text)
    record = execute(words, tmp_path / "run")
    done = record["finish"]["distil"]
    assert done["windows"] == 4 + 15 and done["tokens"] == done["distinct_tokens"] == 19 * 64
    assert done["fresh_tokens"] == 15 * 64 and done["after"] < done["before"]
    assert record["finish"]["text"]["windows"] == 15 and "other.txt" in record["finish"]["text"]["source"]
    assert "fresh_windows" not in record["calibration"] and "text finish" in record["environment"]["inputs"]


@pytest.mark.slow
def test_more_of_the_calibrations_own_text_is_free_of_what_judges_it(words, tmp_path, text_file):
    # Evaluated on the text that is calibrated on: what both have is left out, and the record says so.
    asked = ["finish.tokens=1000", f"eval.path={text_file}", "eval.windows=20"]
    record = execute([*words, *asked], tmp_path)
    left_out, done = record["finish"]["text"]["left_out"], record["finish"]["distil"]
    assert record["calibration"]["fresh_windows"] == 16 and 0 < left_out < 16
    assert done["fresh_tokens"] == 64 * (16 - left_out)
    assert any(f"{left_out} of 16 windows of fresh text were left out" in line for line in record["warnings"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("finish.tokens=0", "finish.tokens=0 is not allowed: give a whole number from 1"),
        ("finish.data=c4", "finish.data=c4 is text to distil on: say how much (finish.tokens=1000000)"),
        ("finish.tokens=99 finish.distil.windows=9", "finish.tokens=99 and finish.distil.windows=9 both say how much"),
        ("finish.tokens=99 finish.data=c5", "unknown data set 'c5'"),
        ("finish.tokens=99 finish.path=/no/file.txt", "finish.path=/no/file.txt does not exist"),
        ("finish.tokens=99 finish.data=generated finish.path=x.txt", "finish.data=generated has no file"),
    ],
    ids=lambda text: text[:60],
)
def test_what_cannot_be_is_refused_in_one_line(words, more, said):
    words = [word for word in words if not word.startswith("finish")]
    with pytest.raises(UserError) as caught:
        resolve(compose([*words, "finish=distil", *more.split(" ")]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["txt", "parquet"])
def test_a_file_that_cannot_be_read_is_named_by_its_own_key(tiny_llama, tmp_path, ending):
    (tmp_path / f"bad.{ending}").touch()
    data = dataclasses.replace(DataSettings.named("local"), path=str(tmp_path / f"bad.{ending}"))
    with pytest.raises(UserError, match=r"^finish\.path=.*bad\."):
        fresh_tokens(data, AutoTokenizer.from_pretrained(tiny_llama), **ONE)


def test_a_data_set_out_of_reach_is_answered_by_its_own_key(tiny_llama, tmp_path, monkeypatch):
    fake_hub.use("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"give a file with finish\.path=FILE$"):
        fresh_tokens(DataSettings.named("c4"), AutoTokenizer.from_pretrained(tiny_llama), **ONE)


@pytest.mark.slow
def test_too_little_text_is_refused_before_anything_is_pruned(words, tmp_path, text_file, other_text):
    with pytest.raises(UserError, match=r"finish.data=local: the text has only \d+ windows of seqlen=64 tokens"):
        execute([*words, "finish.tokens=9999999", f"finish.path={other_text(text_file)}"], tmp_path / "other")
    with pytest.raises(UserError, match=r"the fresh text has only \d+ windows .*windows or finish.tokens"):
        execute([*words, "finish.tokens=9999999"], tmp_path / "own")
    assert not list(tmp_path.glob("*/.progress/block*"))


@pytest.mark.slow
def test_a_run_without_fresh_text_has_the_name_that_it_had(words):
    one, other = (Configuration.of(compose([*words, *more])).digest for more in ([], ["finish.tokens=null"]))
    assert one == other != Configuration.of(compose([*words, "finish.tokens=99"])).digest
    assert "tokens" not in Configuration.of(compose(words)).content["finish"]


def test_python_gives_the_windows_themselves(tiny_opt):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_opt)
    ids = torch.randint(3, tiny_models.VOCABULARY, (9, 16), generator=torch.Generator().manual_seed(0))
    options = {"held_out": ids[3:5], "fresh": ids[5:]}
    with pytest.raises(UserError, match="fresh is text to distil on: give finish='distil'"):
        prune_model(model, ids[:3], "magnitude", finish="block", **options)
    with pytest.raises(UserError, match="2 of 6 windows of fresh share text with held_out"):
        prune_model(model, ids[:3], "magnitude", finish="distil", held_out=ids[3:5], fresh=ids[3:])
    record = prune_model(model, ids[:3], "magnitude", finish="distil", **options)
    assert record["finish"]["distil"]["fresh_tokens"] == 4 * 16


def test_a_file_to_finish_on_without_a_column_of_texts_is_told_what_works(tmp_path):
    """`data.column` is of the text to calibrate on."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "some words"}\n')
    data = dataclasses.replace(DataSettings.named("local"), path=str(file))
    with pytest.raises(UserError, match=r"^finish.path=.*'text'; give one of these that name: body$"):
        calibration_text(data, "finish")
    with pytest.raises(UserError, match=r"^data.path=.*'text'; set data.column to one of: body$"):
        calibration_text(data)
