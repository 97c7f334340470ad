"""Files of tables: read, written to the same bytes, kept, and checked."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from table_records import METRIC, laid_out, record, save, several, task

from alps_exp.base.errors import UserError
from alps_exp.layer import registry
from alps_exp.tables import archive, figures, layout, looks, make, plots, render


@pytest.fixture
def grid_of_runs() -> list[dict]:
    return several()


class TestReading:
    def test_every_run_once(self, tmp_path):
        runs = save([record(), record("wanda")], tmp_path)
        copied = runs / "tiny-alps-u0.7-s0-00000000" / "model"
        copied.mkdir()
        shutil.copy(copied.parent / "record.json", copied)
        assert [item["method"] for item in archive.read_records(runs).records] == ["alps", "wanda"]

    @pytest.mark.parametrize(("content", "words"), [('{"a": ', "not a readable record"), ("[1]", "is no run record")])
    def test_a_bad_file_is_named(self, tmp_path, capsys, content, words):
        runs = save([record()], tmp_path / "runs")
        (runs / "tiny-alps-u0.7-s0-00000000" / "record.json").write_text(content)
        assert make.main([str(runs), str(tmp_path / "tables")]) == 2
        error = capsys.readouterr().err
        assert words in error and "00000000/record.json" in error and error.count("\n") == 1

    @pytest.mark.parametrize(
        "content",
        [b"no gzip", b"\x1f\x8b\x08\x00broken", gzip.compress(b"[1]"), gzip.compress(b"{")],
        ids=["no gzip", "broken gzip", "no object", "no JSON"],
    )
    def test_a_bad_kept_file_is_named(self, tmp_path, content):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz is not a readable file of records"):
            archive.read_kept(path)

    @pytest.mark.parametrize("content", ["[]", "{", '{"runs": 3}'])
    def test_a_bad_manifest_is_named(self, tmp_path, content):
        (tmp_path / "a.sweep.json").write_text(content)
        (found,) = archive.read_all(tmp_path, None)
        assert "a.sweep.json is no readable list" in found.unreadable["a.sweep.json"] and not found.records

    @pytest.mark.slow
    def test_a_bad_file_costs_no_other_its_place(self, tmp_path, capsys):
        runs = save([record(), record("wanda"), record("dsnot")], tmp_path / "runs", "mine")
        (runs / "tiny-wanda-u0.7-s0-00000001" / "record.json").write_text("null")
        assert make.main([str(runs), str(tmp_path / "tables")]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and "00000001/record.json is no run record" in captured.err
        for name in ("mine", "comparison"):
            text = (tmp_path / "tables" / f"{name}.md").read_text()
            assert "dsnot" in text and ("wanda-u0.7-s0-00000001 (unreadable)" in text) == (name == "mine")

    def test_nothing_to_tabulate(self, tmp_path, capsys):
        assert make.main([str(tmp_path), str(tmp_path / "tables")]) == 2
        assert "run something first" in capsys.readouterr().err and not (tmp_path / "tables").exists()


class TestFiles:
    @pytest.mark.slow
    def test_the_same_bytes_in_any_order_of_records(self, grid_of_runs, tmp_path):
        shuffled = copy.deepcopy(grid_of_runs)
        random.Random(1).shuffle(shuffled)
        contents = []
        for records in (grid_of_runs, shuffled):
            make.make(archive.RunSet("a", records, [], "here"), tmp_path)
            contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        assert contents[0] == contents[1]
        absent = {"frontier", "drift", "allocation", "finishing", "tokens", "costs", "structure", "trace"}
        drawn = plots.KINDS.keys() - absent  # these lack what the others show
        pictures = {f"a-{plot}.{suffix}" for plot in drawn for suffix in ("png", "svg")}
        assert set(contents[0]) == {f"a.{suffix}" for suffix in render.FORMATS} | pictures

    @pytest.mark.slow
    def test_csv_and_parquet_hold_the_numbers_unrounded(self, grid_of_runs, tmp_path):
        make.make(archive.RunSet("a", grid_of_runs, [], "here"), tmp_path)
        read = pd.read_csv(tmp_path / "a.csv", dtype={"sparsity": str})
        whole = pd.read_parquet(tmp_path / "a.parquet")
        assert list(read) == list(whole) and {"mean", "std", "n", "stderr", "published", "ratio"} <= set(read)
        pick = (read["metric"] == METRIC) & (read["method"] == "alps") & (read["sparsity"] == "2:4")
        values = [
            item["evaluations"][0]["value"]
            for item in grid_of_runs
            if (item["method"], item["sparsity"]) == ("alps", "2:4")
        ]
        assert read.loc[pick, "mean"].item() == pytest.approx(np.mean(values), rel=1e-14)
        assert whole.loc[pick, "std"].item() == pytest.approx(np.std(values, ddof=1), rel=1e-12)

    def test_signs_of_markdown_and_latex_are_escaped(self):
        odd = [record() | {"model": model} for model in ("a_b|c*", r"50%&#\x")]
        grid = laid_out(odd, title="T_1 & 2")
        text, markdown = render.latex(grid), render.markdown(grid)
        for words in (r"a\_b|c*", r"50\%\&\#\textbackslash{}x", r"\caption{T\_1 \& 2}", r"\toprule", r"\bottomrule"):
            assert words in text
        assert r"a\_b\|c\*" in markdown and r"relative loss" in markdown
        rows = [line for line in markdown.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
        header = laid_out([record(evaluations=[task(0.5, dataset="arc_easy")])], metrics=["arc*", "seconds"])
        assert r"arc\_easy acc" in render.latex(header) and "$\\pm$" in render.latex(header)

    def test_bold_in_each_format(self):
        grid = laid_out([record(perplexity=1.5), record("wanda")], metrics=["wiki*"])
        assert "**1.500**" in render.markdown(grid) and r"\textbf{1.500}" in render.latex(grid)
        assert "1.500*" in render.plain(grid, 80)

    @pytest.mark.slow
    def test_plots_no_longer_asked_for_are_removed(self, grid_of_runs, tmp_path, monkeypatch):
        runs = archive.RunSet("a", grid_of_runs, [], "here")
        (tmp_path / "a-phases.png").touch(), (tmp_path / "ab-phases.png").touch()
        monkeypatch.setattr(make, "spec_of", lambda name, node=None: layout.parse({"plots": ["seconds"]}, name))
        make.make(runs, tmp_path)
        assert {path.name for path in tmp_path.glob("*.png")} == {"a-seconds.png", "ab-phases.png"}

    def test_no_plot_without_its_data(self, tmp_path):
        found = figures.aggregate([record("dense")])
        assert plots.draw(found, layout.Spec(), tmp_path / "none", "a") == [] and not (tmp_path / "none").exists()

    def test_methods_keep_their_looks_apart(self):
        drawn = [method for method in looks.methods() if method != "dense"]
        for signs in zip(*map(looks.look, drawn), strict=True):
            assert len(set(map(str, signs))) == len(drawn)
        assert {"dense", *drawn} == set(registry.methods())
        variants = {str(plots._look({"method": "alps", "variant": index})) for index in range(6)}
        assert len(variants) == 6 and sum("#0072B2" in look for look in variants) == 1  # the others: shades of it
        for method in ("alps", "elsa", "magnitude"):  # of dark colours, too, the shades can be told apart
            colours = [plots._look({"method": method, "variant": index})[0] for index in range(4)]
            sums = sorted(sum(int(colour[place : place + 2], 16) for place in (1, 3, 5)) for colour in colours)
            assert all(above - below > 60 for below, above in itertools.pairwise(sums)), (method, colours)

    def test_settings_of_one_method_are_drawn_apart(self):
        records = [record(sparsity=sparsity) for sparsity in ("0.5", "0.7") for _ in range(2)]
        for number, item in enumerate(records):
            item["config"]["method"]["rho"] = number % 2
        (panel,) = plots.KINDS["perplexity"][0](figures.aggregate(records), layout.Spec())
        found = [(item["label"], item["variant"], len(item["points"])) for item in panel["series"]]
        assert found == [("alps rho=0", 0, 2), ("alps rho=1", 1, 2)]


class TestScales:
    def drawn(self, monkeypatch, tmp_path, kind, records):
        """Limits, labels and heading of a plot's panels."""
        from matplotlib import pyplot

        found = {}

        def look(figure):
            axes = [axis for axis in figure.axes if axis.get_visible()]
            found["x"], found["y"] = ({getattr(axis, f"get_{name}lim")() for axis in axes} for name in "xy")
            found["labels"] = [label.get_text() for label in axes[0].get_yticklabels() if label.get_text()]
            found["titles"] = [axis.get_title() for axis in axes]
            found["heading"] = figure.get_suptitle()

        monkeypatch.setattr(pyplot, "close", look)
        spec = layout.parse({"plots": [kind]}, "test")
        assert plots.draw(figures.aggregate(records), spec, tmp_path, "a")
        return found

    @pytest.mark.slow
    def test_panels_share_scales_and_every_decade_has_a_label(self, tmp_path, monkeypatch):
        grown = [
            record(method, sparsity, perplexity=p, loss=loss)
            for sparsity, p, loss in (("0.5", 20.0, 0.01), ("0.7", 4e6, 0.9))
            for method in ("alps", "wanda")
        ]
        found = self.drawn(monkeypatch, tmp_path, "losses", grown)
        assert len(found["x"]) == len(found["y"]) == 1 and found["heading"] == "tiny"
        assert found["titles"] == ["sparsity 0.5", "sparsity 0.7"]
        assert {"0.01", "0.1", "1"} <= set(found["labels"]) and len(found["labels"]) <= 6
        found = self.drawn(monkeypatch, tmp_path, "perplexity", grown)
        assert found["labels"] == ["100", "1000", *(f"$10^{{{power}}}$" for power in (4, 5, 6))]
        two = self.drawn(monkeypatch, tmp_path, "losses", [*grown, *(item | {"model": "big"} for item in grown)])
        assert two["heading"] == "" and two["titles"][0] == "big, sparsity 0.5"

    def test_bands_are_of_the_logarithms(self):
        seeds = [record(seed=seed, perplexity=p) for seed, p in enumerate((1.0, 10.0, 1000.0))]
        (group,) = figures.aggregate(seeds).groups
        mean, low, high = plots._statistic(group, METRIC)
        logs = np.log([1.0, 10.0, 1000.0])
        assert mean == pytest.approx(337.0)
        assert np.log([low, high]) == pytest.approx([logs.mean() - logs.std(ddof=1), logs.mean() + logs.std(ddof=1)])


class TestSweeps:
    @pytest.fixture
    def place(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.slow
    def test_own_runs_take_the_place_of_kept_ones(self, place, capsys):
        archive.write_kept([record(perplexity=99.0)], place / make.KEPT / "mine.jsonl.gz")
        archive.write_kept([record(perplexity=88.0)], place / make.KEPT / "other.jsonl.gz")
        save([record()], place / make.RUNS, "mine", missing=("tiny-wanda-u0.7-s0-0123abcd",))
        assert make.main([]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == [f"{make.TABLES}/{x}" for x in ("mine", "other", "comparison")]
        assert "in place of results/records/mine.jsonl.gz" in lines[0] and "in place" not in lines[1]
        text = (make.TABLES / "mine.md").read_text()
        assert "20.00" in text and "99.00" not in text and "tiny-wanda-u0.7-s0-0123abcd (missing)" in text
        assert "88.00" in (make.TABLES / "other.md").read_text()

    def test_a_sweep_without_records_leaves_the_kept_ones(self, place):
        archive.write_kept([record()], place / make.KEPT / "mine.jsonl.gz")
        save([], place / make.RUNS).mkdir(parents=True)
        (make.RUNS / "mine.sweep.json").write_text('{"runs": ["none"]}')
        assert [found.origin for found in archive.read_all(make.RUNS, make.KEPT)] == ["results/records/mine.jsonl.gz"]

    @pytest.mark.slow
    def test_keeping_writes_the_sweeps_records_without_this_machines_paths(self, place, capsys):
        odd = record(
            error={"type": "X", "message": "in /home/me/alps/x.py (https://a.org/b/c, conversion/d/e) 3 tokens/s"}
        )
        odd["config"]["data"] = {"path": "/data/texts/c4.jsonl.gz", "files": ["~/x/y", "../a/b"], "sep": "a\u2028b / c"}
        other = record("wanda")
        other["config"]["data"] = odd["config"]["data"]
        save([odd, other], place / make.RUNS, "mine", missing=("gone",))
        (place / make.RUNS / "unrelated").mkdir()
        (place / make.RUNS / "unrelated" / "record.json").write_text(json.dumps(record("dsnot")))
        contents = []
        for _ in range(2):
            assert make.main(["--keep", "mine"]) == 0
            contents.append((make.KEPT / "mine.jsonl.gz").read_bytes())
        out = capsys.readouterr().out
        assert contents[0] == contents[1] and "2 records" in out and "1 runs have none" in out
        kept = archive.read_kept(make.KEPT / "mine.jsonl.gz").records
        assert [item["method"] for item in kept] == ["alps", "wanda"] and kept[0]["run"].startswith("tiny-alps")
        assert kept[0]["config"]["data"] == {"path": "c4.jsonl.gz", "files": ["~/x/y", "../a/b"], "sep": "a\u2028b / c"}
        assert kept[0]["error"]["message"] == "in x.py (https://a.org/b/c, conversion/d/e) 3 tokens/s"
        own = make.make(archive.read_sweep(make.RUNS / "mine.sweep.json"), place / "own")
        archived = make.make(archive.read_all(place / "none", make.KEPT)[0], place / "archived")
        assert [path.read_bytes() for path in own] == [path.read_bytes() for path in archived]
        assert "gone (missing)" in (place / "archived" / "mine.md").read_text()

    def test_only_a_sweep_can_be_kept(self, place, capsys):
        assert make.main(["--keep", "none"]) == 2
        assert "none.sweep.json does not exist" in capsys.readouterr().err

    @pytest.mark.slow
    def test_a_kept_file_can_be_named(self, place, capsys):
        archive.write_kept([record()], place / "some.jsonl.gz")
        assert make.main(["some.jsonl.gz", "out"]) == 0
        assert (place / "out" / "some.md").is_file()


class TestCheck:
    @pytest.mark.slow
    @pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="no results/: not a checkout")
    def test_the_committed_tables_are_those_of_the_committed_records(self):
        assert make.check(ROOT / make.KEPT, ROOT / make.TABLES) == []

    def test_what_checks_nothing_says_so(self, committed, capsys):
        (make.KEPT / "a.jsonl.gz").rename(make.KEPT / "b.jsonl.gz")
        assert make.main(["--check"]) == 1 and "a.md has no records" in capsys.readouterr().err
        (make.KEPT / "b.jsonl.gz").unlink()
        assert make.main(["--check"]) == 2 and "nothing to check" in capsys.readouterr().err

    @pytest.fixture
    def committed(self, tmp_path, monkeypatch, grid_of_runs) -> Path:
        monkeypatch.chdir(tmp_path)
        archive.write_kept(grid_of_runs, make.KEPT / "a.jsonl.gz")
        monkeypatch.setattr(make, "spec_of", lambda name, node=None: layout.parse({"plots": ["perplexity"]}, name))
        assert make.main([]) == 0 and make.main(["--check"]) == 0
        return make.TABLES

    def test_a_changed_table_is_named(self, committed, capsys):
        for suffix in ("md", "csv", "tex"):
            path = committed / f"a.{suffix}"
            path.write_text(path.read_text().replace("15.0", "14.0"))
        (committed / "a-losses.svg").touch()
        (committed / "comparison.md").touch()
        (committed / "a-perplexity.png").unlink()
        numbers = pd.read_parquet(committed / "a.parquet")
        numbers.assign(mean=numbers["mean"] + 1e-12).to_parquet(committed / "a.parquet")
        assert make.main(["--check"]) == 1
        lines = capsys.readouterr().err.splitlines()
        named = {Path(line.split()[1]).name for line in lines}
        assert named == {"a.md", "a.csv", "a.tex", "a.parquet", "a-losses.svg", "a-perplexity.png"} and len(lines) == 6

    def test_other_records_change_the_plots(self, committed, grid_of_runs):
        grid_of_runs[1]["evaluations"][0]["value"] += 1e-9
        archive.write_kept(grid_of_runs, make.KEPT / "a.jsonl.gz")
        assert any("a-perplexity.svg does not match" in line for line in make.check(make.KEPT, committed))

    def test_other_libraries_bytes_are_no_difference(self, committed):
        numbers = pd.read_parquet(committed / "a.parquet")
        numbers.to_parquet(committed / "a.parquet", compression="gzip")
        for suffix in ("png", "svg"):
            with (committed / f"a-perplexity.{suffix}").open("ab") as file:
                file.write(b"other bytes")
        assert make.main(["--check"]) == 0
