"""Runs of methods that train the model: they are marked, and what they cost stands apart from one-shot seconds."""

from __future__ import annotations

from table_records import Logged, cells, laid_out, record

from alps_exp.runs import loggers
from alps_exp.runs.record import checked
from alps_exp.tables import figures, layout, plots

TRAINING = {"tokens": 640, "curve": [{"step": 0, "seconds": 0.0}, {"step": 4, "loss": 3.0, "seconds": 7.0}]}
TRAINED = record("elsa", perplexity=12.0) | {"training": TRAINING, "phases": {"train_seconds": 7.0}}
RECORDS = [record(), TRAINED]


def test_trained_rows_are_marked_and_named():
    grid = laid_out(RECORDS)
    assert {labels[0] for labels, _ in grid.rows} == {"alps", "elsa§"}
    assert "§: trained on text against the model's own loss, not one-shot" in " ".join(grid.notes)
    assert "§" not in " ".join(laid_out(RECORDS[:1]).notes)
    checked(TRAINED, "here")


def test_seconds_and_tokens_of_training_are_apart():
    found = figures.measures(TRAINED)
    assert found["training seconds"].value == 7.0 and found["training tokens"].value == 640
    assert "seconds" not in found and "training seconds" not in figures.measures(RECORDS[0])
    assert cells(laid_out(RECORDS))[("elsa§",)]["training seconds"].startswith("7")


def test_plots_know_the_phase_and_wandb_the_curve():
    spec = layout.Spec(title="x", metrics=("wikitext2*",))
    found = figures.aggregate(RECORDS)
    bars = plots.KINDS["phases"][0](found, spec)[0]["bars"]
    assert [bar["seconds"].get("train") for bar in bars] == [None, 7.0]
    other = record(perplexity=15.0)
    other["config"]["target"] = {"name": "stream"}
    points = plots.KINDS["frontier"][0](figures.aggregate([*RECORDS, other]), spec)[0]["points"]
    assert sorted(point["seconds"][0] for point in points) == [4.0, 4.0, 7.0]
    run = Logged()
    loggers._log_training(run, TRAINING)
    assert [row["training/step"] for row in run.logged] == [0, 4]
