"""Figures of results that documents repeat are those of the records' tables, rounded."""

from __future__ import annotations

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
