"""Finished runs in tables, plots and W&B: which rows they are, what they cost apart, how their losses fell."""

from __future__ import annotations

import copy

import pytest
from table_records import METRIC, Logged, cells, laid_out, record

from alps_exp.runs import loggers
from alps_exp.runs.naming import NEUTRAL
from alps_exp.tables import figures, layout, plots


def training(scale: float, ended: int = 8, **more) -> dict:
    looks = [(0, 4.0), (2, 2.0), (4, 1.5), (8, 1.0)]
    curve = [
        {"step": step, "held_out": scale * value, "seconds": float(step)} | ({"loss": scale * value} if step else {})
        for step, value in looks
        if step <= ended
    ]
    return {"before": 4 * scale, "after": curve[-1]["held_out"], "curve": curve, "tokens": 640, **more}


def finished(name: str, perplexity: float, seed: int = 0, **stages) -> dict:
    made = record(perplexity=perplexity, seed=seed)
    made["config"]["finish"] = {"name": name} | {stage: {"rate": 0.001} for stage in name.split("+") if name != "none"}
    made["finish"], phases = {}, made["phases"]
    if "block" in name:
        made["finish"]["blocks"] = [training(0.1, block=0), training(0.3, ended=4, block=1)]
        phases["finish_seconds"] = 3.0
    if "distil" in name:
        made["finish"]["distil"] = training(1.0)
        phases["distil_seconds"] = 5.0
    return made


RECORDS = [record(), finished("block", 15.0), finished("distil", 14.0), finished("block+distil", 12.0)]


def test_finish_is_an_axis_whose_own_keys_are_none():
    assert figures.varying(RECORDS) == ["finish.name"]
    grid = laid_out(RECORDS)
    assert grid.labels == ["finish.name"]
    assert [labels for labels, _ in grid.rows] == [["block‡"], ["block+distil‡"], ["distil‡"], ["none"]]
    other = finished("block", 16.0)
    other["config"]["finish"]["block"]["rate"] = 0.01
    assert figures.varying([*RECORDS, other]) == ["finish.block.rate", "finish.name"]
    assert NEUTRAL["finish"] == {"name": "none"}


def test_tables_mark_gradients_and_say_whose_losses_they_are():
    notes = " ".join(laid_out(RECORDS).notes)
    marked = "‡: kept weights followed gradients on the pruned model (finish block, block+distil, distil)"
    assert marked.lower() in notes.lower()
    assert "losses of distilled rows are those before the distillation" in notes
    both = finished("block", 15.0)
    both["config"]["sensitivity"] = {"name": "outputs"}
    assert "†" not in str(laid_out([both, RECORDS[0]]))  # nothing read them: no backward pass was made
    both["phases"]["weigh_seconds"] = 2.0
    assert "†‡" in str(laid_out([both, RECORDS[0]]).rows)
    assert "gradients on the pruned" not in " ".join(laid_out(RECORDS[:1]).notes)
    assert "before the distillation" not in " ".join(laid_out(RECORDS[:2]).notes)


def test_seconds_and_tokens_of_finishing_are_apart():
    measures = figures.measures(RECORDS[3])
    assert measures["seconds"].value == 4.0
    assert measures["finishing seconds"].value == 8.0 and measures["finishing tokens"].value == 3 * 640
    assert "finishing seconds" not in figures.measures(RECORDS[0])
    assert "finishing tokens" not in str(laid_out(RECORDS).header)
    assert cells(laid_out(RECORDS))[("block‡",)]["finishing seconds"].startswith("3")
    assert "finishing seconds" not in str(laid_out(RECORDS, seconds=False).header)


def test_the_most_that_a_device_held_is_shown_where_a_table_asks_for_it():
    record = finished("block", 15.0)
    record["phases"]["pruning_peak_device_bytes"] = 2_780_793_344
    assert "peak GB" not in str(laid_out([record]).rows)
    table = laid_out([record], metrics=["peak GB"])
    assert "2.8" in str(table.rows) and "until the model was pruned" in " ".join(table.notes)


@pytest.mark.slow
def test_plots_of_finishing_exist_where_something_was_finished(tmp_path):
    spec = layout.Spec(title="x", metrics=("wikitext2*",))
    found = figures.aggregate(RECORDS)
    frontier = plots.KINDS["frontier"][0](found, spec)
    assert [point["seconds"][0] for point in frontier[0]["points"]] == pytest.approx([4.0, 7.0, 12.0, 9.0])
    assert frontier[0]["loss"] == METRIC
    blocks, distil = plots.KINDS["finishing"][0](found, spec)
    assert (blocks["what"], distil["what"]) == ("error of a block's output", "KL(dense ‖ pruned)")
    # The second block ended after step 4 and stays at 0.45.
    expected = {0: 0.8, 2: 0.4, 4: 0.3, 8: (0.1 + 0.45) / 2}
    assert dict(blocks["series"][1]["points"]) == pytest.approx(expected)
    files = plots.draw(found, spec, tmp_path, "t")
    names = {file.name for file in files}
    assert {"t-frontier.png", "t-finishing.svg"} <= names and all(file.stat().st_size > 1000 for file in files)
    assert not {"t-tokens.png"} & names, "nothing says how many of the tokens differ"
    plain = plots.draw(figures.aggregate(RECORDS[:1]), spec, tmp_path, "p")
    assert not {"p-frontier.png", "p-finishing.svg"} & {file.name for file in plain}
    phases = plots.KINDS["phases"][0](found, spec)[0]["bars"]
    assert {tuple(bar["seconds"])[3:] for bar in phases} == {(), ("finish",), ("distil",), ("finish", "distil")}


def test_names_of_many_settings_stay_within_the_plot(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    beyond, draw = [], Figure.draw_without_rendering

    def drawn(figure: Figure) -> None:
        draw(figure)
        extent = figure.legends[0].get_window_extent()
        beyond.append(max(-extent.x0, extent.x1 - figure.bbox.x1, -extent.y0, 0))

    monkeypatch.setattr(Figure, "draw_without_rendering", drawn)
    many = [record(), *(finished("distil", 14.0) for _ in range(9))]
    for number, made in enumerate(many):
        made["config"]["method"] |= {f"a_key_of_some_length_{key}": int(key == number) for key in range(9)}
    spec = layout.Spec(title="x", metrics=("wikitext2*",), plots=["frontier"])
    plots.draw(figures.aggregate(many), spec, tmp_path, "t")
    assert beyond == [0]


@pytest.mark.slow
def test_traces_are_drawn_by_iteration(tmp_path):
    fixed, growing = record(), record()
    growing["config"]["method"]["growth"] = 1.2
    layers = [("a", [0.4, 0.2], [0.0, 0.1]), ("b", [0.2, 0.1, 0.06, 0.05], [0.0, 0.2, 0.04, 0.0])]
    for made in (fixed, growing):
        stats = [{"trace": {"loss": loss, "change": change, "rho": [1.0] * len(loss)}} for _, loss, change in layers]
        made["layers"] = [dict(made["layers"][0], name=layers[k][0], stats=stats[k]) for k in range(2)]
    growing["layers"][0]["stats"] = {}
    spec, found = layout.Spec(title="x"), figures.aggregate([fixed, growing])
    loss, change = plots.KINDS["trace"][0](found, spec)
    assert (loss["what"], change["what"]) == ("mean relative loss, unfitted", "entries in and out / support")
    expected = [(1, 0.3), (2, 0.15), (3, 0.13), (4, 0.125)]  # the first layer stays at 0.2
    assert loss["series"][0]["points"] == [(n, pytest.approx(value)) for n, value in expected]
    assert change["series"][0]["points"] == [(2, pytest.approx(0.15)), (3, pytest.approx(0.02))]
    assert [value for _, value in loss["series"][1]["points"]] == layers[1][1]
    assert plots.KINDS["trace"][0](figures.aggregate([record()]), spec) == []
    names = {file.name for file in plots.draw(found, layout.Spec(title="x", plots=("trace",)), tmp_path, "t")}
    assert names == {"t-trace.svg", "t-trace.png"}


def test_wandb_is_given_the_curves():
    run = Logged()
    loggers._log_finish(run, RECORDS[3]["finish"])
    blocks = [row for row in run.logged if "finish/row" in row]
    assert [row["finish/row"] for row in blocks] == list(range(7))
    assert [row["finish/block"] for row in blocks] == [0] * 4 + [1] * 3
    distil = [row for row in run.logged if "distil/step" in row]
    assert [row["distil/held_out"] for row in distil] == [4.0, 2.0, 1.5, 1.0]
    assert ("distil/*", {"step_metric": "distil/step"}) in run.metrics
    run = Logged()
    loggers._log_finish(run, {})
    assert run.logged == []


def test_perplexity_is_drawn_against_the_tokens_that_a_distillation_saw(tmp_path):
    records = [record(perplexity=30.0)]
    for epochs, tokens, fresh, perplexity in [
        (1, 100, 0, 20.0),
        (4, 400, 0, 18.0),
        (1, 200, 100, 17.0),
        (1, 400, 300, 15.0),
        (2, 800, 300, 14.0),
    ]:
        made = finished("distil", perplexity)
        made["config"]["finish"] |= {"distil": {"epochs": epochs}, "tokens": fresh or None}
        made["finish"]["distil"] |= {"tokens": tokens, "distinct_tokens": 100 + fresh, "fresh_tokens": fresh}
        records.append(made)
    spec = layout.Spec(title="x", metrics=("wikitext2*",), plots=("tokens",))
    found = figures.aggregate(records)
    (panel,) = plots.KINDS["tokens"][0](found, spec)
    lines = {item["label"]: [(point[0], round(point[1], 6)) for point in item["points"]] for item in panel["series"]}
    assert lines == {
        "the calibration windows again": [(100, 20.0), (400, 18.0)],
        "fresh text, every window once": [(200, 17.0), (400, 15.0)],
        "the same 300 fresh tokens again": [(400, 15.0), (800, 14.0)],
    }
    assert panel["unfinished"] == pytest.approx(30.0) and panel["what"] == METRIC
    assert {file.name for file in plots.draw(found, spec, tmp_path, "t")} == {"t-tokens.svg", "t-tokens.png"}
    assert not plots.KINDS["tokens"][0](figures.aggregate([records[0], records[1], records[5]]), spec), "single points"
    ended = copy.deepcopy(records[3])  # before a third of its text
    ended["config"]["finish"]["tokens"], ended["finish"]["distil"]["fresh_tokens"] = 200, 200
    ended["finish"]["distil"] |= {"tokens": 90, "distinct_tokens": 300}
    (panel,) = plots.KINDS["tokens"][0](figures.aggregate([*records, ended]), spec)
    assert [len(item["points"]) for item in panel["series"]] == [3, 2, 2], "drawn with every window once"
    another = [copy.deepcopy(made) for made in (*records[1:3], records[5])]
    for made in another:  # has no line of every window once
        made["sparsity"] = made["config"]["sparsity"] = "0.8"
    panels = plots.KINDS["tokens"][0](figures.aggregate(records + another), spec)
    places = [{item["label"]: item["place"] for item in panel["series"]} for panel in panels]
    assert len(panels) == 2 and places[1].items() < places[0].items() and len(set(places[0].values())) == 3
