"""The picture of what structure costs: loss against zeros, pattern by pattern."""

from __future__ import annotations

import pytest
from table_records import record

from alps_exp.tables import figures, layout, plots

LOSSES = {"0.5": 0.01, "2:4": 0.02, "2:4T": 0.03, "block=16@0.5": 0.2, "row@0.5": 0.4, "4:8>2:4": 0.1}


def of(sparsity: str, method: str = "alps", seed: int = 0) -> dict:
    return record(method, sparsity, seed, loss=LOSSES[sparsity] * (1 if method == "alps" else 2) * (1 + 0.1 * seed))


@pytest.mark.slow
def test_a_panel_for_each_method_with_a_point_for_each_pattern(tmp_path):
    runs = [of(text, method, seed) for text in LOSSES for method in ("alps", "magnitude") for seed in (0, 1)]
    found, spec = figures.aggregate(runs), layout.Spec(plots=("structure",))
    panels = plots.KINDS["structure"][0](found, spec)
    assert [panel["title"] for panel in panels] == ["magnitude", "alps"]
    points = panels[1]["points"]
    texts = ["0.5", "2:4", "2:4T", "4:8>2:4", "block=16@0.5", "row@0.5"]
    assert [point[1] for point in points] == texts, "by kind, then by zeros"
    assert [point[2] for point in points] == [0.5, 0.5, 0.5, 0.75, 0.5, 0.5]
    assert [point[3] for point in points] == pytest.approx([1.05 * LOSSES[text] for text in texts])
    files = plots.draw(found, spec, tmp_path, "t")
    assert {file.name for file in files} == {"t-structure.svg", "t-structure.png"}
    assert all(file.stat().st_size > 1000 for file in files)


def test_tables_of_weights_anywhere_and_groups_alone_have_none():
    found = figures.aggregate([of("0.5"), of("2:4")])
    assert plots.KINDS["structure"][0](found, layout.Spec()) == []
