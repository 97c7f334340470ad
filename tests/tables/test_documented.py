"""Figures of results that documents repeat are those of the records' tables, rounded."""

from __future__ import annotations

import gzip
import json
import re
from decimal import Decimal

import pandas as pd
import pytest
from helpers import ROOT

TABLES = ROOT / "results" / "tables"


def documented(path: str, begin: str, number: int = 0) -> list[dict[str, str]]:
    """The rows of the table that comes so many after a phrase, without emphasis: each cell by its column's name."""
    text = (ROOT / path).read_text(encoding="utf-8").partition(begin)[2]
    table = re.findall(r"(?:^\|.*\n)+", text, re.M)[number]
    head, _, *rows = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def measured(sweep: str) -> pd.Series:
    frame = pd.read_csv(TABLES / f"{sweep}.csv", dtype={"sparsity": str})
    return frame.set_index(["method", "sparsity", "metric"])["mean"]


def assert_rounded(shown: str, value: float) -> None:
    """`shown` is the value rounded to the digits that it has, as in 49.9, 76 795 and 3.1e6."""
    figure = Decimal(shown.replace(" ", ""))
    unit = Decimal(1).scaleb(figure.as_tuple().exponent)
    assert abs(figure - Decimal(value)) <= unit / 2, f"{shown} for {value}"


@pytest.mark.parametrize(("sweep", "number"), [("smollm2-systems", 0), ("smollm2-structured", 1)])
def test_side_by_side(sweep, number):
    values, cells = measured(sweep), 0
    for row in documented("docs/methods.md", "## Side by side", number):
        method = row[""].split("`")[0]
        if method not in values.index:
            continue
        for sparsity in set(row) & set(values.index.get_level_values("sparsity")):
            for text, shown in zip(("wikitext2", "c4"), row[sparsity].split(" / "), strict=True):
                assert_rounded(shown, values[method, sparsity, f"{text} perplexity (2048)"])
                cells += 1
        if "seconds" in row:
            at = {
                "0.7": row["seconds"].split(" ")[0],
                **{s: n for n, s in re.findall(r"(\d+) at (\S+)", row["seconds"])},
            }
            for sparsity, shown in at.items():
                assert_rounded(shown, values[method, sparsity, "seconds"])
            for sparsity in ("0.5", "0.7", "0.8", "2:4"):
                assert_rounded(row["GB"], values[method, sparsity, "peak GB"])
    assert cells == {0: 64, 1: 16}[number]


def test_the_first_table_of_results():
    values, cells = measured("smollm2"), 0
    for row in documented("README.md", "## Results"):
        metric, _, method = row[""].replace("*", "").partition(", ")
        metric = {"perplexity": "demo_wiki perplexity (2048)", "loss": "relative loss"}[metric]
        for sparsity in ("0.5", "0.6", "0.7", "0.8", "2:4", "4:8"):
            assert_rounded(row[sparsity], values[method, sparsity, metric])
            cells += 1
    assert cells == 60


LEVELS = ("0.5", "0.6", "0.7", "0.8", "2:4", "4:8")


def perplexities(sweep: str, sparsity: str, **chosen: object) -> list[float]:
    """The two perplexities of one row of a sweep's table; None chooses rows in which a key has no value."""
    frame = pd.read_csv(TABLES / f"{sweep}.csv", dtype={"sparsity": str})
    frame = frame[frame["sparsity"] == sparsity]
    for key, value in chosen.items():
        column = frame[key.replace("__", ".")]
        frame = frame[column.isna() if value is None else column == value]
    values = frame.set_index("metric")["mean"]
    return [float(values[f"{text} perplexity (2048)"]) for text in ("wikitext2", "c4")]  # fails unless it is one row


def finished(sparsity: str) -> list[float]:
    tokens = 1105920 if sparsity == "0.5" else 716800
    return perplexities("finished", sparsity, finish__tokens=tokens)


def assert_pair(shown: str, values: list[float]) -> None:
    for figure, value in zip(shown.replace("*", "").split(" / "), values, strict=True):
        assert_rounded(figure, value)


def test_what_finishing_buys():
    plain, residual, windows, fresh, _, ratio, aimed, _ = documented("docs/finishing.md", "## What it buys")
    for level in LEVELS:
        dense = perplexities("beyond-the-paper", level, target__name="layer")
        assert_pair(plain[level], dense)
        assert_pair(residual[level], perplexities("beyond-the-paper", level, target__name="stream"))
        assert_pair(windows[level], perplexities("presets", level, finish__name="block+distil"))
        assert_pair(fresh[level], finished(level))
        ratios = [value / before for value, before in zip(finished(level), dense, strict=True)]
        assert_pair(ratio[level], ratios)
        assert all(
            value <= float(bound) + 0.005 for value, bound in zip(ratios, aimed[level].split(" / "), strict=True)
        )


def test_what_finishing_buys_on_another_family():
    plain, residual, finish, ratio, _ = documented("docs/finishing.md", "Gemma-3-270M, nothing changed")
    for level in LEVELS:
        dense = perplexities("gemma", level, target__name="layer")
        before = perplexities("gemma", level, sensitivity__name="outputs", finish__name="none")
        after = perplexities("gemma", level, finish__name="block+distil")
        for row, values in ((plain, dense), (residual, before), (finish, after)):
            assert_pair(row[level], values)
        assert_pair(ratio[level], [value / first for value, first in zip(after, dense, strict=True)])
        assert all(value < first for value, first in zip(after, before, strict=True)), "no cell gets worse"


def test_what_finishing_buys_after_other_methods():
    rows = documented("docs/finishing.md", "## What it buys", 1)
    for unfinished, row in zip(rows[::2], rows[1::2], strict=True):
        for level in ("0.5", "0.7", "2:4", "4:8"):
            both = []
            for shown, finish in ((unfinished, "none"), (row, "block+distil")):
                both.append(perplexities("finished-methods", level, method=unfinished[""].lower(), finish__name=finish))
                assert_pair(shown[level], both[-1])
            assert all(after < before for before, after in zip(*both, strict=True)), "no cell gets worse"


def test_the_curve_of_fresh_text():
    fresh, cells = None, 0
    for row in documented("docs/finishing.md", "## Which text, and how often"):
        if found := re.fullmatch(r"and (\d+).*", row["windows"]):
            fresh = 2048 * int(found[1])
        epochs = int(re.match(r"\d+", row["passes"])[0])
        assert_pair(
            row["perplexity"], perplexities("fresh-text", "0.7", finish__tokens=fresh, finish__distil__epochs=epochs)
        )
        cells += 1
    assert cells == 11


def test_the_second_table_of_results():
    rows = documented("README.md", "## Results", 1)
    for level in LEVELS:
        assert_pair(rows[-1][level], finished(level))
        assert_pair(rows[-2][level], perplexities("presets", level, finish__name="block+distil"))


BEYOND = "docs/beyond-the-paper.md"


@pytest.mark.parametrize(("path", "begin", "number"), [(BEYOND, "## What it buys", 0), ("README.md", "## Results", 1)])
def test_what_the_preset_buys_on_three_texts(path, begin, number):
    rows = documented(path, begin, number)
    for level in LEVELS:
        plain = perplexities("beyond-the-paper", level, target__name="layer")
        preset = perplexities("beyond-the-paper", level, target__name="stream")
        shown, _, ratio = rows[1][level].partition(" (")
        assert_pair(rows[0][level], plain)
        assert_pair(shown, preset)
        if ratio:
            assert_pair(ratio[:-1], [after / before for before, after in zip(plain, preset, strict=True)])


def test_what_was_aimed_at_and_missed():
    """Shares with 32 windows are those of the records, and what misses its aim is bold."""
    text = (ROOT / BEYOND).read_text(encoding="utf-8").partition("## What was aimed at")[2]
    aimed, reached = (
        re.search(rf"^\| {row} \|(.*)\|$", text, re.M)[1].split("|") for row in ("aimed at", "32 windows")
    )
    for level, aim, cell in zip(LEVELS, aimed, reached, strict=True):
        plain = perplexities("beyond-the-paper", level, target__name="layer")
        preset = perplexities("beyond-the-paper", level, target__name="stream")
        bold = re.fullmatch(r"\*\*.*\*\*", cell.strip())
        for bound, part, before, after in zip(aim.split("/"), cell.split("/"), plain, preset, strict=True):
            assert_rounded(part.strip(" *"), after / before)
            assert (float(part.strip(" *")) > float(bound)) == bool(bold or "**" in part), (level, cell)


def test_the_frontier():
    table, cells, method, plain = documented(BEYOND, "### By method"), 0, "", {}
    kinds = {"gradients alone": ("layer", "outputs"), "target=stream": ("stream", "none")}
    kinds["+preset=residual"] = ("stream", "outputs")
    for row in table:
        if row[""] not in kinds:
            method, plain = row[""].partition(",")[0].lower(), {}
        target, sensitivity = kinds.get(row[""], ("layer", "none"))
        for level in ("0.5", "0.7", "2:4"):
            if row[level] == "–":
                continue
            chosen = {"method": method, "target__name": target, "sensitivity__name": sensitivity}
            values = perplexities("frontier", level, **chosen)
            frame = pd.read_csv(TABLES / "frontier.csv", dtype={"sparsity": str})
            for key, value in (chosen | {"sparsity": level, "metric": "seconds"}).items():
                frame = frame[frame[key.replace("__", ".")] == value]
            shown, seconds = row[level].rsplit(", ", 1)
            assert_rounded(seconds.removesuffix(" s"), frame["mean"].item())
            shown, _, ratio = shown.partition(" (")
            if shown == "the same":
                assert values == perplexities("frontier", level, **(chosen | {"sensitivity__name": "none"}))
            else:
                assert_pair(shown, values)
            plain.setdefault(level, values)
            if ratio:
                assert_pair(ratio[:-1], [after / before for before, after in zip(plain[level], values, strict=True)])
            cells += 1
    assert cells == 33


def costs(sweep: str, metric: str, **chosen: object) -> dict[str, float]:
    """A metric of one row of a sweep's table, by sparsity; empty where the row has none."""
    frame = pd.read_csv(TABLES / f"{sweep}.csv", dtype={"sparsity": str})
    frame = frame[frame["metric"] == metric]
    for key, value in chosen.items():
        frame = frame[frame[key.replace("__", ".")] == value]
    assert frame["sparsity"].is_unique
    return dict(zip(frame["sparsity"], frame["mean"], strict=True))


def test_how_many_times_the_stream_target_takes():
    text = " ".join((ROOT / BEYOND).read_text(encoding="utf-8").split())
    shown = re.search(r"ALPS takes ([\d.]+), ([\d.]+) and ([\d.]+) times plain ALPS's seconds \(0\.5, 0\.7, 2:4", text)
    chosen = {"method": "alps", "sensitivity__name": "none"}
    plain, stream = (costs("frontier", "seconds", target__name=name, **chosen) for name in ("layer", "stream"))
    for figure, level in zip(shown.groups(), ("0.5", "0.7", "2:4"), strict=True):
        assert_rounded(figure, stream[level] / plain[level])


def test_beside_elsa():
    cells = 0
    for row in documented("docs/training.md", "`sweeps/elsa.yaml` sets ELSA"):
        words = row[""].replace("`", "")
        chosen = {"method": words.split(",")[0], "finish__name": "block+distil" if "finished" in words else "none"}
        if chosen["method"] == "elsa":
            chosen["method__projection"] = re.search("magnitude|momentum", words)[0]
        else:
            chosen["target__name"] = "stream" if "preset" in words else "layer"
            chosen["sensitivity__name"] = "outputs" if "residual" in words or "finished" in words else "none"
        for level in ("0.8", "0.9"):
            assert_pair(row[level], perplexities("elsa", level, **chosen))
            cells += 1
        kinds = ["training seconds"] if chosen["method"] == "elsa" else ["seconds", "finishing seconds"]
        for shown, kind in zip(row["seconds, mean"].split(" + "), kinds, strict=False):
            assert_rounded(shown, sum(costs("elsa", kind, **chosen).values()) / 2)
        peaks = costs("elsa", "peak GB", **chosen)
        assert any(round(peak, 1) == float(row["peak"].removesuffix(" GB")) for peak in peaks.values())
    assert cells == 12


def test_the_first_token_behind_finished_blocks():
    found = {}
    with gzip.open(ROOT / "results" / "records" / "presets.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            if record["config"]["target"]["name"] == "stream":
                rows = {row["name"]: row["relative_loss"] for row in record["layers"]}
                level = record["sparsity"] if isinstance(record["sparsity"], str) else level_of(record["sparsity"])
                found[bool(record["finish"]), level] = (
                    record["drift"][11]["held out"]["first"],
                    rows["model.layers.12.self_attn.o_proj"],
                )
    rows = documented("docs/finishing.md", "spoils the first token")
    for number, row in enumerate(rows):
        for level, shown in list(row.items())[1:]:
            assert_rounded(shown, found[number % 2 == 1, level][number // 2])
    assert len(rows) == 4 and len(found) == 12


def level_of(pattern: dict) -> str:
    return str(pattern["level"]) if pattern["kind"] == "unstructured" else f"{pattern['kept']}:{pattern['width']}"


def test_calibration_texts():
    frame = pd.read_csv(TABLES / "overfitting.csv").set_index(["metric", "data.name", "target.name"])["mean"]
    rows = documented(BEYOND, "## The calibration text")
    for row, text in zip(rows, ("demo", "demo_wiki", "c4"), strict=True):
        for cell, name in zip(list(row.values())[1:], ("demo", "demo_wiki", "generated"), strict=True):
            plain, preset = (frame[f"{text} perplexity (2048)", name, target] for target in ("layer", "stream"))
            before, after, ratio = re.fullmatch(r"(\S+) → (\S+) \((\S+)\)", cell).groups()
            for shown, value in ((before, plain), (after, preset), (ratio, preset / plain)):
                assert_rounded(shown, value)


def ablated(level: str, words: str, windows: int = 32) -> list[float]:
    """The two perplexities of the run that a row of the ablation's tables describes."""
    stream = "plain" not in words
    whole = "cap" in words or re.search(r"\ball\b", words) is not None
    chosen = {
        "capture": "groups" if "group by group" in words else "block" if "at once" in words else "auto",
        "target.name": "stream" if stream else "layer",
        "target.strength": None if not stream else "0.5",
        "target.ridge": None if not stream else "0.01",
        "sensitivity.rows": "0.5" if whole else None,
        "sensitivity.windows": "8" if whole or "rows" in words else None,
        "allocation.name": "sensitivity" if whole else "uniform",
        "allocation.cap": "0.15" if whole else None,
    }
    for key, word in (("target.strength", "strength"), ("target.ridge", "ridge"), ("sensitivity.rows", "rows"),
                      ("allocation.cap", "cap"), ("sensitivity.windows", "over")):  # fmt: skip
        if found := re.search(rf"{word} (\d[.\d]*)", words):
            number = found[1]
            chosen[key] = (
                f"{number}.0" if key in ("target.strength", "sensitivity.rows") and "." not in number else number
            )
    if found := re.search(r"allocation=(\w+)", words):
        chosen |= {"allocation.name": found[1]}
        del chosen["allocation.cap"]
    frame = pd.read_csv(TABLES / "ablation.csv", dtype=str)
    frame = frame[(frame["sparsity"] == level) & (frame["nsamples"] == str(windows))]
    for key, value in chosen.items():
        frame = frame[frame[key].isna() if value is None else frame[key] == value]
    values = frame.set_index("metric")["mean"]
    return [float(values[f"{text} perplexity (2048)"]) for text in ("wikitext2_valid", "demo")]


def test_the_ablation():
    cells = 0
    for row in documented(BEYOND, "## Ablation"):
        for level in ("0.7", "2:4"):
            if (shown := row[f"SmolLM2, {level}"]) != "–":
                assert_pair(shown, ablated(level, row[""].partition(": ")[2] or row[""]))
                cells += 1
    for row in documented(BEYOND, "## Ablation", 1)[:4]:
        level, words = re.fullmatch(r"SmolLM2 at (\S+), (\w+)", row[""]).groups()
        for windows in (16, 32, 64):
            assert_pair(row[str(windows)], ablated(level, words, windows))
            cells += windows != 32
    assert cells == 40
