"""Layouts of tables, published figures, and the report on the terminal."""

from __future__ import annotations

import pandas as pd
import pytest
import yaml
from helpers import ROOT
from table_records import METRIC, cells, failed, laid_out, record, several, task

from alps_exp.base.errors import UserError
from alps_exp.base.resources import resource_root
from alps_exp.cli import overrides
from alps_exp.tables import archive, figures, layout, make, plots, render

LAYER = "model.decoder.layers.0.self_attn.k_proj"


@pytest.fixture
def grid_of_runs() -> list[dict]:
    return several()


class TestLayouts:
    """The tables that the sweeps need."""

    def test_losses_of_one_layer_by_sparsity_and_method(self):
        def solved(method, sparsity, loss, refit="exact"):
            item = record(method, sparsity) | {"model": "opt-13b"}
            item["layers"] = [item["layers"][0] | {"name": LAYER, "relative_loss": loss}]
            item["config"]["refit"] = refit
            return item

        records = [
            solved("alps", "0.5", 0.00756 * 1.1),
            solved("wanda", "0.5", 0.0117),
            solved("alps", "0.6", 0.0147),
            solved("wanda", "0.6", 0.01),
        ]
        grid = laid_out(records, rows=["sparsity"], columns=["method"], metrics=["relative loss*"])
        assert grid.labels == ["sparsity"]
        assert cells(grid) == {
            ("0.5",): {
                "wanda": "0.01170",
                "wanda, published": "0.01170",
                "wanda, ours / published": "1.000",
                "alps": "*0.008316*",
                "alps, published": "0.007560",
                "alps, ours / published": "1.100",
            },
            ("0.6",): {
                "wanda": "*0.01000*",
                "wanda, published": "0.02390",
                "wanda, ours / published": "0.418",
                "alps": "0.01470",
                "alps, published": "0.01470",
                "alps, ours / published": "1.000",
            },
        }
        assert "Published (not measured here): Meng et al., NeurIPS 2024, Table 1." in grid.notes
        assert f"metric relative loss of {LAYER}" in grid.notes[0] and "refit exact" in grid.notes[0]
        both = laid_out(
            [*records, solved("magnitude", "0.5", 0.0318, "none"), solved("magnitude", "0.5", 0.0124, "pcg")]
        )
        assert both.labels == ["sparsity", "method", "refit"]
        assert cells(both)["0.5", "magnitude", "none"][f"relative loss of {LAYER}, published"] == "0.03180"
        assert cells(both)["0.5", "magnitude", "pcg"][f"relative loss of {LAYER}, ours / published"] == "1.000"

    def test_what_a_data_set_brings_is_no_axis_beside_its_name(self):
        def calibrated(name, perplexity, **more):
            item = record(perplexity=perplexity)
            item["config"]["data"] = {"name": name} | more
            return item

        records = [calibrated("demo", 20.0, lines="plain"), calibrated("demo_wiki", 30.0, lines="articles")]
        grid = laid_out(records, rows=["method"], columns=["data.name"], metrics=["*perplexity*"])
        (found,) = cells(grid).values()
        assert found == {"demo": "*20.00*", "demo_wiki": "30.00"}
        records.append(calibrated("demo", 25.0, lines="articles"))
        assert "data.lines" in laid_out(records, rows=["method"], columns=["data.name"]).labels

    @pytest.mark.parametrize(
        ("rows", "columns"),
        [
            (["metric", "method"], ["data.name"]),
            (["metric"], ["data.name", "refit"]),
            (["metric"], ["sparsity", "data.name"]),
            (["metric", "data.name"], ["method"]),
            (["method"], ["data.name"]),
            (["data.name"], ["metric"]),
            ([], ["data.name"]),
            ([], ["method", "refit"]),
        ],
    )
    def test_axes_that_do_not_vary_or_are_in_no_record(self, rows, columns):
        """As at the end of a sweep whose columns the command line has fixed."""
        for methods in (["alps"], ["alps", "wanda"]):
            records = [record(method, perplexity=20.0 + len(method)) for method in methods]
            for item in records:
                item["config"]["data"] = {"name": "generated"}
            grid = laid_out(records, rows=rows, columns=columns)
            shown = {cell.text.strip("*") for _, row in grid.rows for cell in row}
            assert {f"{20.0 + len(method):.2f}" for method in methods} <= shown
            assert not {*grid.labels} & {"data.name", "refit"}
            words = {word for labels, _ in grid.rows for word in labels} | {w for head in grid.header for w in head}
            assert METRIC in words and (len(methods) == 1 or {*methods} <= words)
            table = {"rows": rows, "columns": columns}
            assert "no table" not in make.report(records, "test", node=table, width=100)

    def test_metrics_and_methods_by_model(self):
        records = [
            record(method, perplexity=value, evaluations=[*record(perplexity=value)["evaluations"], task(0.5, None)])
            | {"model": model}
            for model, value in (("opt-2.7b", 30.0), ("opt-13b", 20.0))
            for method in ("alps", "wanda")
        ]
        node = {"rows": ["metric", "method"], "columns": ["model"], "metrics": ["*perplexity*", "* acc"]}
        grid = laid_out(records, published=False, **node)
        assert grid.header == [("opt-2.7b",), ("opt-13b",)], "in the order of their sizes"
        assert cells(grid)["piqa acc", "alps"] == {"opt-2.7b": "*0.5000*", "opt-13b": "*0.5000*"}
        assert cells(grid)[METRIC, "wanda"] == {"opt-2.7b": "*30.00*", "opt-13b": "*20.00*"}
        beside = cells(laid_out(records, **node))
        assert beside[METRIC, "alps"]["opt-13b, published"] == "16.71"
        assert beside[METRIC, "alps"]["opt-13b, ours / published"] == f"{20 / 16.71:.3f}"

    def test_one_model_where_several_were_meant(self):
        grid = laid_out([record(), record("wanda")], rows=["metric", "method"], columns=["model"])
        assert grid.labels == ["metric", "method"] and grid.header == [("tiny",)]
        assert cells(grid)[METRIC, "alps"] == {"tiny": "*20.00*"}

    def test_several_metrics_in_the_columns_of_each_model(self):
        records = [record(method) | {"model": model} for model in ("a", "b") for method in ("alps", "wanda")]
        grid = laid_out(records, columns=["model"], rows=["method"], metrics=["wiki*", "seconds"])
        assert grid.header == [("a", METRIC), ("a", "seconds"), ("b", METRIC), ("b", "seconds")]
        text = render.latex(grid)
        assert r"\multicolumn{2}{c}{a}" in text and r"\multicolumn{2}{c}{b}" in text

    def test_dense_is_in_every_column_of_sparsities(self, grid_of_runs):
        grid = laid_out(grid_of_runs, rows=["metric", "method"], columns=["sparsity"], metrics=["wiki*", "relative*"])
        assert grid.header == [("0.5",), ("0.7",), ("2:4",)] and grid.labels == ["metric", "method"]
        assert cells(grid)[METRIC, "dense"] == {"0.5": "15.00", "0.7": "15.00", "2:4": "15.00"}
        assert ("relative loss", "dense") not in cells(grid)

    def test_runtimes_by_method_and_model(self):
        records = [record(method) | {"model": model} for model in ("opt-1.3b", "x") for method in ("alps", "wanda")]
        grid = laid_out(records, rows=["method"], columns=["model"], metrics=["seconds"])
        assert cells(grid)[("alps",)] == {
            "opt-1.3b": "4.0",
            "opt-1.3b, published": "963.0",
            "opt-1.3b, ours / published": "0.004",
            "x": "4.0",
        }
        assert "one V100 32 GB" in " ".join(grid.notes)

    def test_an_ablation_has_its_settings_as_rows(self):
        records = []
        for number, (schedule, growth) in enumerate((("geometric", 1.1), ("geometric", 1.2), ("paper", 1.2))):
            item = record(perplexity=20.0 + number)
            item["config"]["method"] |= {"schedule": schedule, "growth": growth}
            records.append(item)
        grid = laid_out(records, rows=["method.schedule"], metrics=["wiki*"])
        assert grid.labels == ["method.schedule", "method.growth"], "what is not named is not lost"
        assert cells(grid)["geometric", "1.1"] == {METRIC: "*20.00*"}
        assert cells(grid)["paper", "1.2"] == {METRIC: "22.00"}

    def test_metrics_are_picked_by_globs_in_their_order(self, grid_of_runs, tmp_path):
        grid = laid_out(grid_of_runs, metrics=["zeros", "wiki*"])
        assert grid.header == [("zeros",), (METRIC,)]
        with pytest.raises(UserError, match=r"match none of what was measured: relative loss, wikitext2"):
            laid_out(grid_of_runs, metrics=["c4*"])
        # At the end of a sweep that the command line evaluated on other data, there is a table all the same.
        table = make.report(grid_of_runs, "test", node={"metrics": ["c4*"], "rows": ["method"]}, width=100)
        assert "no table" not in table and "The table's metrics=['c4*'] match none" in " ".join(table.split())
        runs = archive.RunSet("test", grid_of_runs, [], "here", table={"metrics": ["c4*"], "plots": ["perplexity"]})
        assert "test-perplexity.svg" in {path.name for path in make.make(runs, tmp_path, drawn=False)}
        assert "match none of what was measured" in (tmp_path / "test.md").read_text(encoding="utf-8")

    def test_unshown_metrics_are_in_the_files_of_numbers(self):
        found = figures.aggregate([record(evaluations=[task(0.5), task(0.6, metric="acc_norm")])])
        assert "piqa acc_norm" in set(found.frame["metric"])
        assert ("piqa acc_norm",) not in layout.grid(found, layout.Spec()).header

    @pytest.mark.slow
    def test_without_seconds_there_are_none_anywhere(self, grid_of_runs, tmp_path):
        spec = layout.parse({"seconds": False}, "test")
        found = figures.aggregate(grid_of_runs, seconds=spec.seconds)
        assert "seconds" not in set(found.frame["metric"])
        drawn = {path.stem for path in plots.draw(found, spec, tmp_path, "a")}
        assert drawn == {"a-perplexity", "a-losses"}

    @pytest.mark.parametrize(
        ("node", "words"),
        [
            ({"row": ["method"]}, "has the key row; did you mean rows"),
            ({"rows": "method"}, "give a list of names"),
            ({"rows": ["methods"]}, "methods is no axis; did you mean method"),
            ({"plots": ["pareto"]}, "there is no plot pareto"),
            ({"seconds": "no"}, "give true or false"),
            ({"rows": ["model"], "columns": ["model"]}, "name it once"),
            ({"rows": ["metric"]}, "metric in rows and no columns"),
        ],
    )
    def test_a_wrong_node_is_refused(self, node, words):
        with pytest.raises(UserError, match=words):
            layout.parse(node, "test")

    @pytest.mark.parametrize("path", sorted((resource_root() / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_sweeps_node_is_understood_and_hidden_from_hydra(self, path):
        assert layout.spec_of(path.stem).title
        with overrides.initialized():
            cfg = overrides.compose_prepared([f"+sweeps={path.stem}"], with_hydra=True)
        assert "table" not in cfg and "hydra" in yaml.safe_load(path.read_text())


class TestPublished:
    def test_figures_stand_where_everything_agrees(self):
        def figure(**more):
            frame = figures.aggregate([record(**more) | {"model": more.pop("model", "opt-13b")}]).frame
            return frame.set_index("metric").loc[METRIC]

        ours = figure(perplexity=33.42)
        assert ours["mean"] == 33.42 and ours["published"] == 16.71 and ours["ratio"] == 2.0
        assert ours["source"] == "Meng et al., NeurIPS 2024, Table 2"
        assert figure(method="alps-paper")["published"] == 16.71
        for other in ({"sparsity": "0.65"}, {"method": "alps-simple"}):
            assert pd.isna(figure(**other)["published"]) and pd.isna(figure(**other)["ratio"])
        shorter = record() | {"model": "opt-13b"}
        shorter["evaluations"][0]["seqlen"] = 4096
        assert figures.aggregate([shorter]).frame["published"].dropna().index.size == 1, "the seconds only"
        assert figures.aggregate([record() | {"model": "opt-13b"}], published=False).frame["published"].isna().all()

    def test_the_files_name_what_we_name(self):
        conf, seen = resource_root() / "conf", set()
        models, methods = ({path.stem for path in (conf / group).glob("*.yaml")} for group in ("model", "method"))
        for file in sorted((ROOT / "alps_exp" / "published").glob("*.csv")):
            frame = pd.read_csv(file, dtype={"sparsity": str}, keep_default_na=False)
            assert list(frame) == ["source", "table", "model", "sparsity", "method", "metric", "value"]
            assert set(frame["model"]) <= models and set(frame["method"]) <= methods
            assert frame.loc[frame["metric"].str.contains(" acc"), "value"].between(0, 1).all()
            keys = set(frame[["model", "sparsity", "method", "metric"]].itertuples(index=False, name=None))
            assert len(keys) == len(frame) and not keys & seen and frame["source"].all()
            seen |= keys
        assert ("opt-13b", "0.7", "alps", "arc_easy acc") in seen

    def test_ours_is_never_filled_from_them(self):
        grid = laid_out([failed("ValueError") | {"model": "opt-13b"}, record("wanda") | {"model": "opt-13b"}])
        assert cells(grid)[("alps",)][METRIC] == "error" and cells(grid)[("alps",)][f"{METRIC}, published"] == "–"


class TestReport:
    @pytest.mark.parametrize("width", [60, 80, 200])
    def test_it_fits_and_nothing_is_lost(self, grid_of_runs, width):
        for item in grid_of_runs:
            item["evaluations"] += [task(0.5, dataset=f"task{number}") for number in range(6)]
        text = make.report(grid_of_runs, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert "tiny" not in text.split("\n\n")[0] and "odel tiny" in text, "what does not vary is in the footnote"
        assert all(f"task{number}" in text for number in range(6)) and "seconds" in text and "±" in text

    def test_a_sweeps_own_layout(self, grid_of_runs):
        assert make.report(grid_of_runs, "zeroshot").startswith("Zero-shot accuracy")
        assert "seconds" not in make.report(grid_of_runs, "zeroshot")

    def test_what_was_not_measured(self):
        assert make.report([]) == "no table: there are no records"
        assert "error" in make.report([failed("ValueError")]) and "status" in make.report([failed("ValueError")])
        dense = make.report([record("dense")])
        assert "20.00" in dense and "dense" in dense
