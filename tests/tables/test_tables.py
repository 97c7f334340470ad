"""Tables: what is averaged and what is refused, what cells say."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from table_records import METRIC, cells, failed, laid_out, record, save, several, task

from alps_exp.base.errors import UserError
from alps_exp.runs import record as records_of
from alps_exp.tables import figures, footnotes, layout, make, plots


@pytest.fixture
def grid_of_runs() -> list[dict]:
    return several()


class TestAveraging:
    def test_means_and_deviations_are_those_of_numpy(self):
        values, losses = [20.5, 23.25, 19.125], [0.11, 0.13, 0.07]
        records = [
            record(seed=seed, perplexity=value, loss=loss)
            for seed, (value, loss) in enumerate(zip(values, losses, strict=True))
        ]
        frame = figures.aggregate(records).frame.set_index("metric")
        for name, wanted in ((METRIC, values), ("relative loss", losses)):
            assert frame.loc[name, "mean"] == pytest.approx(np.mean(wanted), rel=1e-14)
            assert frame.loc[name, "std"] == pytest.approx(np.std(wanted, ddof=1), rel=1e-12)
            assert frame.loc[name, "n"] == 3
        assert frame.loc["seconds", "mean"] == 4.0 and frame.loc["seconds", "std"] == 0.0
        grid = laid_out(records)
        assert cells(grid)[("alps",)][METRIC] == "20.96 ± 2.10" and "n = 3 seeds" in " ".join(grid.notes)

    def test_one_seed_has_no_deviation_but_a_tasks_standard_error(self):
        grid = laid_out([record(evaluations=[task(0.5)])])
        assert cells(grid)[("alps",)]["piqa acc"] == "0.5000 ± 0.0100"
        assert "standard error" in " ".join(grid.notes)
        frame = figures.aggregate([record(evaluations=[task(0.5)])]).frame.set_index("metric")
        assert pd.isna(frame.loc["piqa acc", "std"]) and frame.loc["piqa acc", "stderr"] == 0.01

    def test_over_seeds_the_deviation_takes_the_standard_errors_place(self):
        records = [record(seed=seed, evaluations=[task(value)]) for seed, value in enumerate((0.5, 0.54))]
        assert cells(laid_out(records))[("alps",)]["piqa acc"] == "0.5200 ± 0.0283"

    def test_dense_is_one_row_whatever_its_seeds(self):
        dense = [record("dense", perplexity=9.0) | {"seed": seed} for seed in range(3)]
        shown = cells(laid_out([*dense, record()], metrics=["wiki*"]))
        assert shown == {("0", "dense"): {METRIC: "9.000"}, ("0.7", "alps"): {METRIC: "20.00"}}

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda r: r["environment"].update(code="0.1 (def)"), r"code is 0\.1 \(abc\) in .* and 0\.1 \(def\) in"),
            (lambda r: r["environment"].pop("code"), r"code is 0\.1 \(abc\) in .* and unknown in"),
            (lambda r: r["environment"].update(dtype="float16"), "dtype is float32 in .* and float16 in"),
            (lambda r: r["environment"].update(device="GPU"), "device is CPU in .* and GPU in"),
            (lambda r: r["calibration"].update(source="file"), "calibration source is hub in .* and file in"),
            (lambda r: r["evaluations"][0].update(source="x"), "source is wiki.test.raw in .* and x in"),
            (lambda r: r.update(seed=0), "have the same configuration and seed"),
        ],
    )
    def test_records_that_differ_in_more_than_the_seed_are_refused(self, tmp_path, capsys, change, words):
        other = record(seed=1)
        change(other)
        runs, out = save([record(), other], tmp_path / "runs"), tmp_path / "tables"
        assert make.main([str(runs), str(out)]) == 2
        error = capsys.readouterr().err
        assert re.search(words, error) and "tiny 0.7 alps" in error and error.count("\n") == 1
        assert not out.exists()
        assert make.report([record(), other]).startswith("no table: ")

    @pytest.mark.slow
    def test_one_refused_table_leaves_the_others(self, tmp_path, capsys):
        runs = save([record(), record(seed=1)], tmp_path / "runs", "good")
        stray = record(environment={"code": "other"})
        (runs / "stray").mkdir()
        (runs / "stray" / "record.json").write_text(json.dumps(stray))
        assert make.main([str(runs), str(tmp_path / "tables")]) == 2
        assert "comparison: tiny 0.7 alps" in capsys.readouterr().err
        assert {path.name for path in (tmp_path / "tables").glob("*.md")} == {"good.md"}

    @pytest.mark.parametrize(
        ("key", "values"), [("nsamples", (8, 64)), ("method.rho", (0.1, 0.3)), ("layers.include", (["*"], ["*.q"]))]
    )
    def test_other_configurations_are_other_rows(self, key, values):
        records = []
        for value, seed in itertools.product(values, range(2)):
            item = record(seed=seed, perplexity=20.0 + seed)
            node = item["config"]
            *parents, leaf = key.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
            records.append(item)
        grid = laid_out([*records, record("wanda"), record("dense")], metrics=["wiki*"])
        assert grid.labels == ["sparsity", "method", key]
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        for text in texts:
            assert cells(grid)["0.7", "alps", text][METRIC].strip("*") == "20.50 ± 0.71"
        assert ("0", "dense", "–") in cells(grid)

    def test_dense_evaluated_in_two_ways_is_two_rows(self):
        dense = [record("dense"), record("dense", evaluations=[task(0.5)])]
        dense[1]["config"] |= {"eval": {"name": "zeroshot"}, "nsamples": 99}
        shown = cells(laid_out([*dense, record()]))
        assert shown["0", "dense", "wanda"][METRIC] == shown["0.7", "alps", "wanda"][METRIC] == "20.00"
        assert shown["0", "dense", "zeroshot"] == dict.fromkeys(shown["0.7", "alps", "wanda"], "–") | {
            "piqa acc": "0.5000 ± 0.0100"
        }

    def test_what_a_model_brings_is_no_column(self):
        other = record() | {"model": "other"}
        other["config"]["nsamples"] = 128
        assert laid_out([record(), other]).labels == ["model"]

    def test_keys_that_change_no_result_make_no_rows(self):
        other = record(seed=1)
        other["config"] |= {"logger": {"name": "wandb"}, "stream": True}
        assert figures.aggregate([record(), other]).settings == []


class TestCells:
    def test_the_best_of_each_model_and_sparsity_is_marked(self, grid_of_runs):
        shown = cells(laid_out(grid_of_runs))
        for sparsity in ("0.5", "0.7", "2:4"):
            for metric in (METRIC, "relative loss"):
                means = {}
                for method in ("alps", "wanda"):
                    items = [r for r in grid_of_runs if (r["method"], r["sparsity"]) == (method, sparsity)]
                    means[method] = np.mean([figures.measures(item)[metric].value for item in items])
                for method in means:
                    best = bool(means[method] == min(means.values()))
                    assert shown[sparsity, method][metric].startswith("*") is best
        assert not any("*" in row["seconds"] for row in shown.values())
        assert "*" not in shown["0", "dense"][METRIC]

    def test_ties_are_both_marked_and_equal_is_what_looks_equal(self):
        pair = [record(perplexity=20.001), record("wanda", perplexity=20.002), record("dsnot", perplexity=21)]
        shown = cells(laid_out(pair, metrics=["wiki*"]))
        assert [shown[(name,)][METRIC] for name in ("wanda", "dsnot", "alps")] == ["*20.00*", "21.00", "*20.00*"]

    def test_accuracy_is_best_when_high_and_perplexity_of_tasks_when_low(self):
        def scored(method, acc, perplexity):
            return record(method, evaluations=[task(acc, None), task(perplexity, None, "perplexity", shown=True)])

        shown = cells(laid_out([scored("alps", 0.6, 9.0), scored("wanda", 0.5, 10.0)]))
        assert shown[("alps",)]["piqa acc"] == "*0.6000*" and shown[("wanda",)]["piqa acc"] == "0.5000"
        assert shown[("alps",)]["piqa perplexity"] == "*9.000*"

    @pytest.mark.parametrize(("better", "best"), [("lower", "wanda"), ("higher", "alps"), (None, None)])
    def test_rows_say_which_way_is_better(self, better, best):
        """Not the metric's name: a latency is best when low, and where nothing is said nothing is marked."""
        rows = [task(value, None, "latency", shown=True, better=better) for value in (0.6, 0.5)]
        pair = [record(method, evaluations=[row]) for method, row in zip(("alps", "wanda"), rows, strict=True)]
        shown = cells(laid_out(pair, metrics=["piqa*"]))
        assert [name for (name,), row in shown.items() if "*" in row["piqa latency"]] == [best] * (best is not None)

    def test_a_lone_figure_is_not_the_best(self):
        assert not any(cell.best for _, row in laid_out([record(), record("dense")]).rows for cell in row)

    def test_infinite_and_undefined_figures_are_shown_and_never_best(self):
        records = [record(perplexity="inf"), record("wanda", perplexity="nan"), record("dsnot", perplexity=9e9)]
        shown = cells(laid_out(records, metrics=["wiki*"]))
        assert shown == {("wanda",): {METRIC: "nan"}, ("dsnot",): {METRIC: "*9.000e+09*"}, ("alps",): {METRIC: "inf"}}

    @pytest.mark.parametrize(
        ("kind", "message", "text"),
        [
            ("OutOfMemoryError", "CUDA out of memory", "OOM"),
            ("UserError", "the device's memory does not suffice (CUDA out of memory): use shorter windows", "OOM"),
            ("MemoryError", "", "OOM"),
            ("ValueError", "device's memory does not suffice", "error"),
        ],
    )
    def test_a_failed_run_shows_how(self, kind, message, text):
        grid = laid_out([record("wanda"), failed(kind, message) | {"run": "that-run"}])
        assert set(cells(grid)[("alps",)].values()) == {text}
        assert f"that-run ({text})" in grid.notes[-1]

    def test_a_failed_seed_is_left_out_and_named(self):
        records = [record(seed=0), record(seed=1), failed("ValueError", seed=2) | {"run": "third"}]
        grid = laid_out([*records, *(record("wanda", seed=seed) for seed in range(3))], metrics=["wiki*"])
        assert cells(grid)[("alps",)] == {METRIC: "*20.00 ± 0.00*", "n": "2"}
        assert cells(grid)[("wanda",)]["n"] == "3" and "third (error)" in grid.notes[-1]

    def test_missing_and_unfinished_runs_have_a_row_of_dashes(self):
        running = record("dsnot") | {"status": "running", "evaluations": [], "layers": [], "run": "begun"}
        missing = ["tiny-sparsegpt-u0.7-s0-0123abcd", "tiny-dense-0123abcd", "nonsense"]
        grid = laid_out([record(), record("wanda", "2:4"), running], missing, metrics=["wiki*"])
        assert {key: row[METRIC] for key, row in cells(grid).items()} == {
            ("0", "dense"): "–",
            ("0.7", "dsnot"): "–",
            ("0.7", "sparsegpt"): "–",
            ("0.7", "alps"): "20.00",
            ("2:4", "wanda"): "20.00",
        }
        assert all(f"{run} (missing)" in grid.notes[-1] for run in missing) and "begun (unfinished)" in grid.notes[-1]

    def test_a_row_without_the_tables_metrics_stays(self):
        other = record("wanda", evaluations=[task(0.5)])
        shown = cells(laid_out([record(), other, failed("ValueError", method="dsnot")], metrics=["wiki*"]))
        assert {key: row[METRIC] for key, row in shown.items()} == {
            ("wanda",): "–",
            ("dsnot",): "error",
            ("alps",): "20.00",
        }

    @pytest.mark.parametrize(
        ("value", "error", "text"),
        [
            (0.0329812, 0.00043, "0.03298 ± 0.00043"),
            (137648.2, 11336.1, "137648 ± 11336"),
            (18.2, 1.23e-5, "18.20000 ± 0.00001"),
            (18.2, 0.0, "18.20 ± 0.00"),
            (18.2, float("nan"), "18.20 ± nan"),
            (0.0, 0.0, "0.0000 ± 0.0000"),
            (1234567890.0, 1000.0, "(1.234568 ± 0.000001)e+09"),
        ],
    )
    def test_digits(self, value, error, text):
        assert layout.with_deviation(value, error, layout.number(value, METRIC)) == text

    def test_a_partial_evaluation_says_so(self):
        some = record()
        some["evaluations"][0] |= {"partial": True, "total_windows": 141}
        some["evaluations"].append(task(0.5, partial=True, samples=7))
        header = cells(laid_out([some]))[("alps",)]
        assert "wikitext2 perplexity (2048, 10 of 141)" in header and "piqa acc (7 of 100)" in header

    def test_the_footnote_says_what_rows_differ_in(self):
        other = record("wanda")
        other["environment"] = other["environment"] | {"device": "GPU", "versions": {"torch": "2.12"}}
        line = laid_out([record(), other]).notes[0]
        assert "device GPU (wanda) / CPU (alps)" in line and "torch 2.12 (wanda) / 2.11 (alps)" in line
        assert "dtype float32;" in line and "windows wikitext2 10 × 2048" in line and "evaluation eval=wanda" in line
        assert "calibration 8 × 2048 tokens of c4" in line and "seeds 0" in line and "code 0.1 (abc)" in line

    def test_the_footnote_says_which_layers_were_pruned(self):
        some = record()
        some["config"]["layers"] = {"include": ["layers.[0-2].*"], "exclude": []}
        assert "; layers layers.[0-2].*; " in laid_out([some]).notes[0]
        some["config"]["layers"] = {"include": ["*"], "exclude": ["*.k_proj", "*.v_proj"]}
        note = laid_out([record("dense"), some, record("wanda")]).notes[0]
        assert "; layers all (wanda) / without *.k_proj, *.v_proj (alps); " in note
        some["config"]["layers"] = {"include": ["*"], "exclude": []}
        assert "layers" not in laid_out([some]).notes[0]


def damaged(value, path=()):
    """Every leaf and branch of a record replaced by what does not belong there."""
    for odd in (None, [], {}, [None], {"a": []}, "x", "inf", -1, 1e308, 10**400, True):
        yield path, odd
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from damaged(item, (*path, key))


@pytest.mark.slow
def test_a_record_that_was_edited_is_named_or_tabulated():
    """Nothing between: whatever was written into it, a table of it and of others never ends in an error of its own."""
    good = record("wanda")
    whole = record() | {"started": "2026", "config_hash": "a", "cached_blocks": [0], "schema": 1}
    whole["environment"] |= {"inputs": {"text": "a"}, "threads": 1, "git_commit": "abc"}
    whole["config"] |= {"refit": "none", "propagate": "pruned", "layers": {"include": ["*"]}}
    outcomes = {"named": 0, "tabulated": 0}
    for path, odd in damaged(whole):
        edited = copy.deepcopy(whole)
        if path:
            *outer, last = path
            functools.reduce(lambda node, key: node[key], outer, edited)[last] = odd
        try:
            checked = records_of.checked(edited if path else odd, "here")
        except UserError as error:
            assert str(error).startswith("here is ") and "\n" not in str(error), path
            outcomes["named"] += 1
            continue
        found = figures.aggregate([checked, good])
        footnotes.footnotes(found, {}, ["seconds"])
        for gather, _ in plots.KINDS.values():
            gather(found, layout.Spec())
        if outcomes["tabulated"] % 25 == 0:  # laying out takes longer, and reads nothing of a record any more
            make.report([checked, good])
        outcomes["tabulated"] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_perplexities_beyond_all_numbers():
    """Infinite ones are in the table as such, take part in no plot, and win nothing; squares of large ones overflow."""
    found = laid_out([record(perplexity="inf"), record("wanda", perplexity=20.0)])
    row = cells(found)
    assert row["alps",][METRIC] == "inf" and row["wanda",][METRIC] == "*20.00*"
    several = figures.aggregate([record(seed=seed, perplexity=value) for seed, value in enumerate(("inf", 20.0))])
    assert figures.measures({**record(perplexity="inf")})[METRIC].value == math.inf
    (panel,) = [several.frame[several.frame["metric"] == METRIC]]
    assert panel["mean"].item() == math.inf and math.isnan(panel["std"].item())
    assert not plots.KINDS["perplexity"][0](several, layout.Spec())
    assert figures.mean_and_std([1e300, 3e300]) == (2e300, pytest.approx(2**0.5 * 1e300))
    assert figures.mean_and_std([1e308, 1.5e308])[0] == pytest.approx(1.25e308)


def test_threads_are_told_where_they_differ_on_a_cpu():
    def on(device: str, threads: int, seed: int = 0) -> dict:
        made = record(seed=seed)
        return made | {"environment": {**made["environment"], "device": device, "threads": threads}}

    def note(*records: dict) -> str:
        return laid_out(records).notes[0]

    assert "threads 1 (0.7 alps) / 2 (0.7 alps)" in note(on("x86_64 CPU", 1), on("x86_64 CPU", 2, seed=1))
    assert "threads" not in note(on("x86_64 CPU", 2), on("x86_64 CPU", 2, seed=1))
    assert "threads" not in note(on("NVIDIA H200", 1), on("NVIDIA H200", 2, seed=1))


@pytest.mark.parametrize("count", [6, 14])
def test_rows_of_another_commit_are_named(count):
    """Where no axis tells which rows are of which commit, all are listed, or of many rows those of the fewest."""
    records = []
    for number in range(count):
        item = record(sparsity="0.5" if number % 2 else "0.7")
        item["config"]["nsamples"] = number // 2
        item["environment"] = item["environment"] | {"git_commit": "b" * 40 if number in (0, 3) else "a" * 40}
        records.append(item)
    text = laid_out(records).notes[0]
    assert "bbbbbbbb (0.5 alps 1, 0.7 alps 0)" in text
    assert ("aaaaaaaa (the other rows)" in text) == (count > 12)
    assert ("aaaaaaaa (0.5 alps 0, 0.5 alps 2, " in text) == (count < 12)
