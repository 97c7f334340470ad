"""Plots and marks of what goes beyond the method: targets, sensitivity, allocations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from table_records import METRIC, laid_out, record, save

from alps_exp.tables import figures, layout, make, plots

CHOICES = {
    ("layer", "none", "uniform"): (171.0, 17.0),
    ("stream", "none", "uniform"): (84.0, 30.0),
    ("layer", "outputs", "uniform"): (134.0, 19.0),
    ("stream", "outputs", "sensitivity"): (65.0, 34.0),
}
KEYS = {
    "stream": {"strength": 0.5, "ridge": 0.01},
    "outputs": {"windows": 8, "rows": 0.5},
    "sensitivity": {"cap": 0.15},
}


def chosen(target, sensitivity, allocation, method="alps", seed=0, sparsity="0.7", **more):
    """A record of a run with these choices."""
    perplexity, seconds = CHOICES[target, sensitivity, allocation]
    factor = (1 if method == "alps" else 2) * (1 + 0.01 * seed)
    item = record(method, sparsity, seed, perplexity * factor, **more)
    for group, name in (("target", target), ("sensitivity", sensitivity), ("allocation", allocation)):
        item["config"][group] = {"name": name, **KEYS.get(name, {})}
    spread = 0.1 if allocation == "sensitivity" else 0.0
    item["layers"] = [
        {
            "name": f"b.{block}.{layer}",
            "block": block,
            "shape": [4, size],
            "sparsity_target": 0.7 + spread * (block - 1) + (0.05 * spread * 10 if layer == "q" else 0),
            "relative_loss": 0.1 * (block + 1),
        }
        for block in range(3)
        for layer, size in (("q", 8), ("up", 24))
    ]
    if target == "stream":
        item["drift"] = [
            {name: {"mean": 0.1 * (block + 1) + extra + 0.2 * seed, "median": 0.0, "first": 0.0}}
            | {"held out": {"mean": 0.2 * (block + 1), "median": 0.0, "first": 0.0}}
            for block in range(3)
            for name, extra in (("calibration", 0.0),)
        ]
    item["phases"] = {"weigh_seconds": 2.0 if sensitivity == "outputs" else None, "solve_seconds": seconds}
    item["phases"] = {name: value for name, value in item["phases"].items() if value is not None}
    return item


@pytest.fixture(scope="module")
def records():
    pruned = [
        chosen(*names, method=method, seed=seed)
        for names, method, seed in itertools.product(CHOICES, ("alps", "sparsegpt"), range(2))
    ]
    return [record("dense", perplexity=15.0), *pruned]


def panels(kind, records):
    found = figures.aggregate(records)
    return plots.KINDS[kind][0](found, layout.Spec())


def test_the_frontier_is_of_perplexity_against_all_seconds(records):
    (panel,) = panels("frontier", records)
    assert panel["title"] == "sparsity 0.7, wikitext2 perplexity" and panel["loss"] == METRIC
    found = {item["label"]: (item["seconds"][0], item["loss"][0]) for item in panel["points"]}
    assert found["alps"] == (17.0, pytest.approx(171 * 1.005))
    assert found["alps stream"] == (30.0, pytest.approx(84 * 1.005))
    assert found["alps outputs"] == (21.0, pytest.approx(134 * 1.005)), "the passes count"
    assert found["sparsegpt stream outputs sensitivity"][0] == 36.0
    assert len(found) == 8
    marks = {(item["method"], item["variant"]) for item in panel["points"]}
    assert len(marks) == 8, "every point has a look of its own"


def test_keys_that_vary_within_a_choice_are_named(records):
    more = [chosen("stream", "none", "uniform", seed=seed) for seed in range(2)]
    for item in more:
        item["config"]["target"]["strength"] = 0.7
    (panel,) = panels("frontier", [*records, *more])
    labels = {item["label"] for item in panel["points"]}
    assert {"alps stream strength=0.5", "alps stream strength=0.7", "alps"} <= labels


def test_a_refit_that_goes_with_a_method_is_named(records):
    for item in (more := [chosen(*names, method="wanda") for names in CHOICES]):
        item["config"]["refit"] = "pcg"
    for item in records:
        item["config"].setdefault("refit", "none")
    (panel,) = panels("frontier", [*records, *more])
    labels = {item["label"] for item in panel["points"]}
    assert {"wanda refit=pcg", "wanda stream refit=pcg", "alps stream", "alps"} <= labels


def test_each_method_has_a_column_of_the_legend(records):
    (panel,) = panels("frontier", records)
    names = [item["label"] for item in panel["points"]]
    assert [name.partition(" ")[0] for name in names] == ["sparsegpt"] * 4 + ["alps"] * 4
    front = [*names, "Pareto front"]
    found, columns = plots._by_method(front, [panel], 2)
    assert [list(filter(None, stack)) for stack in np.array_split(found, columns)] == [front[:4], front[4:]]
    assert plots._by_method(front, [panel], 9) == (front, 9), "one line"
    assert plots._by_method(front, [panel], 1) == (front, 1), "more methods than columns"


def test_columns_of_a_legend_where_methods_have_entries_of_different_number(records):
    (panel,) = panels("frontier", records)
    names = [item["label"] for item in panel["points"]]
    for front in ([*names, "Pareto front"], names[:5], [*names[:4], names[4], "Pareto front"]):
        wanted = [[name for name in front if name.startswith(word)] for word in ("sparsegpt", "alps", "Pareto")]
        found, columns = plots._by_method(front, [panel], 3)
        # As matplotlib divides entries among columns.
        assert [list(filter(None, stack)) for stack in np.array_split(found, columns)] == list(filter(None, wanted))


def test_drift_is_drawn_along_the_depth(records):
    (panel,) = panels("drift", records)
    found = {(item["label"], item["kind"]): item["points"] for item in panel["series"]}
    assert len(found) == 8, "two methods, two choices with a stream, two kinds of windows"
    assert found["alps stream", "relative_loss"] == [(0, pytest.approx(0.2)), (1, pytest.approx(0.3)), (2, 0.4)]
    assert found["alps stream", "held_out_loss"][2] == (2, pytest.approx(0.6))
    broken = [chosen("stream", "none", "uniform")]
    broken[0]["drift"][1]["calibration"]["mean"] = "nan"
    (panel,) = panels("drift", broken)
    assert [block for block, _ in panel["series"][0]["points"]] == [0, 2]


def test_the_allocation_is_drawn_where_there_is_one(records):
    (panel,) = panels("allocation", records)
    found = {item["label"]: item["points"] for item in panel["series"]}
    points = found["alps stream outputs sensitivity"]
    # 8 of 32 columns are of the layer that is 0.05 sparser.
    assert points[0] == (0, pytest.approx(0.6 + 0.05 / 4), pytest.approx(0.6), pytest.approx(0.65))
    assert found["alps"][2] == (2, *[pytest.approx(0.7)] * 3)
    assert panels("allocation", [item for item in records if item["config"].get("allocation", {}) != {}][:4]) == []


def test_sweeps_without_these_axes_have_no_such_plots(tmp_path):
    plain = [record(method, level) for method in ("alps", "wanda") for level in ("0.5", "0.7")]
    for kind in ("frontier", "drift", "allocation"):
        assert panels(kind, plain) == []
    assert all("weigh" not in bar["seconds"] for panel in panels("phases", plain) for bar in panel["bars"])


def test_what_has_seen_gradients_is_marked(records):
    grid = laid_out(records, title="x", rows=["method", "target.name", "sensitivity.name"])
    marked = [labels for labels, _ in grid.rows if labels[-1].endswith("†")]
    assert len(marked) == 4 and all("outputs" in labels for labels in (" ".join(words) for words in marked))
    assert any("†: has seen gradients of the dense model" in note for note in grid.notes)
    # Where only some cells of a row have, these are marked.
    columns = laid_out(records, rows=["method", "target.name"], columns=["sensitivity.name"], metrics=[METRIC])
    (place,) = [index for index, words in enumerate(columns.header) if words[-1] == "outputs"]
    for labels, row in columns.rows:
        if labels[0] == "dense":
            continue
        there = {index: cell.text for index, cell in enumerate(row) if cell.text not in ("–", "2")}
        if labels[-1].endswith("†"):
            assert list(there) == [place]
        else:
            assert all(text.endswith("†") == (index == place) for index, text in there.items()), labels
    plain = laid_out([item for item in records if item["config"].get("sensitivity", {}).get("name") != "outputs"])
    assert "†" not in str(plain)


@pytest.mark.slow
def test_they_are_drawn_by_make_tables_to_the_same_bytes(records, tmp_path, monkeypatch):
    kinds = ("frontier", "drift", "allocation", "phases")  # the others: test_table_files.py
    for kind in plots.KINDS.keys() - {*kinds}:
        monkeypatch.setitem(plots.KINDS, kind, (lambda *_: [], None))
    runs = save(records, tmp_path / "runs", "mine")
    for place in ("one", "two"):
        make.main([str(runs), str(tmp_path / place)])
    drawn = {path.name for path in (tmp_path / "one").glob("mine-*.png")}
    assert {f"mine-{kind}.png" for kind in kinds} <= drawn
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
