"""The plot of perplexity against what a model costs to run."""

from matplotlib import pyplot
from table_records import record

from alps_exp.tables import figures, layout, plots


def priced(method: str, sparsity: str = "0", perplexity: float = 15.0, **rates: float) -> dict:
    item = record(method, sparsity, perplexity=perplexity)
    fixed = {"stderr": None, "shown": True, "partial": False, "better": "higher"}
    item["evaluations"] += [
        {"dataset": form, "metric": "decode at batch 1", "unit": "tokens/s", "value": rate, **fixed}
        for form, rate in rates.items()
    ]
    return item


def gathered(records):
    return plots.KINDS["costs"][0](figures.aggregate(records), layout.Spec())


def test_a_line_for_each_method_and_form_and_the_dense_point():
    runs = [priced("alps", "0.7", 30.0, dense=100, packed=150), priced("alps", "0.5", 20.0, dense=100, packed=120)]
    (panel,) = gathered([priced("dense", dense=101), *runs])
    assert (panel["cost"], panel["title"]) == ("decode at batch 1, tokens/s", "wikitext2 perplexity")
    assert panel["dense"] == [101, 15.0]
    (line,) = panel["series"]
    assert line["label"] == "alps, packed"
    assert line["points"] == [(120, 20.0, "0.5"), (150, 30.0, "0.7")]
    figure, axis = pyplot.subplots()
    handles = {}
    plots.KINDS["costs"][1](axis, panel, handles)
    assert set(handles) == {"alps, packed", "dense"} and axis.get_xlabel() == panel["cost"]
    pyplot.close(figure)


def test_runs_without_costs_have_no_such_plot():
    assert gathered([record("alps", level) for level in ("0.5", "0.7")]) == []
    (panel,) = gathered([priced("alps", "0.5", packed=120)])
    assert panel["dense"] is None


def test_the_plot_is_written(tmp_path):
    runs = [priced("alps", level, value, packed=120 + value) for level, value in (("0.5", 20.0), ("0.7", 30.0))]
    found = figures.aggregate([priced("dense", dense=101), *runs])
    assert [file.name for file in plots.draw(found, layout.parse({"plots": ["costs"]}, "t"), tmp_path, "t")]
