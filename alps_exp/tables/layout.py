"""From figures to a table: which axes make its rows and columns, what its cells say, which are best.

docs/tables.md describes the node `table:` of a sweep that decides about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import TYPE_CHECKING

import yaml

from ..base.errors import UserError, nearest
from ..patterns import written
from . import looks
from .figures import AXES, Aggregate, finish_of, is_trained, natural, sees_gradients
from .footnotes import footnotes

if TYPE_CHECKING:
    import pandas as pd

PLOTS = (
    "perplexity",
    "losses",
    "seconds",
    "phases",
    "frontier",
    "drift",
    "allocation",
    "finishing",
    "tokens",
    "costs",
    "structure",
    "trace",
)
NONE = "–"


class NotMeasured(UserError):
    """None of the table's metrics was measured."""


@dataclass(frozen=True)
class Spec:
    """How the table of a sweep looks; see docs/tables.md."""

    title: str = ""
    rows: tuple[str, ...] = AXES
    columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] | None = None
    seconds: bool = True
    published: bool = True
    plots: tuple[str, ...] = PLOTS


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and whether it is the best of its kind."""

    text: str = NONE
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table as text.

    Attributes:
        title: one line.
        labels: the axes that label rows.
        header: of each column of figures, its words from the outside in.
        rows: labels and cells of each row.
        notes: lines below the table.
    """

    title: str
    labels: list[str]
    header: list[tuple[str, ...]]
    rows: list[tuple[list[str], list[Cell]]]
    notes: list[str]


def spec_of(name: str, node: Mapping | None = None) -> Spec:
    """The table node of a sweep.

    Args:
        name: the sweep's; without `node`, that of the package's `sweeps/NAME.yaml`, or the default.
        node: of a user's own file.

    Raises:
        UserError: unknown keys or values that are not allowed.
    """
    if node is not None:
        return parse(node, name)
    file = files("alps_exp.sweeps") / f"{name}.yaml"
    node = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return parse((node or {}).get("table") or {}, name)


def parse(node: Mapping, name: str) -> Spec:
    """The table node as a value.

    Raises:
        UserError: unknown keys or values that are not allowed.
    """
    place = f"the table of sweeps/{name}.yaml"
    if not isinstance(node, Mapping):
        raise UserError(f"{place}: {node} is not allowed: give keys and values, as in title: TEXT")
    given = dict(node)
    for key, value in given.items():
        if key not in Spec.__dataclass_fields__:
            raise UserError(f"{place} has the key {key}; {nearest(str(key), Spec.__dataclass_fields__)}")
        if key == "title":
            good, form = isinstance(value, str), "a text"
        elif key in ("seconds", "published"):
            good, form = isinstance(value, bool), "true or false"
        else:
            good, form = isinstance(value, list) and all(isinstance(word, str) for word in value), "a list of names"
            given[key] = tuple(value) if good else value
        if not good:
            raise UserError(f"{place}: {key}={value} is not allowed: give {form}")
    spec = Spec(**({"title": name} | given))
    for plot in spec.plots:
        if plot not in PLOTS:
            raise UserError(f"{place}: there is no plot {plot}; {nearest(plot, PLOTS)}")
    for axis in (*spec.rows, *spec.columns):
        if axis not in (*AXES, "metric") and not _is_key(axis):
            raise UserError(f"{place}: {axis} is no axis; {nearest(axis, (*AXES, 'metric'))} Or a configuration's key")
        if (*spec.rows, *spec.columns).count(axis) > 1:
            raise UserError(f"{place} has {axis} twice in rows and columns: name it once")
    if "metric" in spec.rows and not spec.columns:
        raise UserError(f"{place} has metric in rows and no columns: name them, as in columns: [sparsity]")
    return spec


def _is_key(axis: str) -> bool:
    config = yaml.safe_load((files("alps_exp.conf") / "config.yaml").read_text(encoding="utf-8"))
    groups = {group for part in config["defaults"] if isinstance(part, dict) for group in part}
    return axis.partition(".")[0] in {*config, *groups}


def grid(found: Aggregate, spec: Spec) -> Grid:
    """Lay out the figures.

    Args:
        found: what `aggregate` made of the records.
        spec: how the table looks.

    Raises:
        UserError: no records, or none of the table's metrics was measured.
    """
    if found.frame.empty:
        raise UserError("there are no records")
    metrics = shown_metrics(found.frame, spec.metrics) or ["status"]
    frame = _shown_rows(found, metrics)
    varies = {axis for axis in (*AXES, *found.settings) if frame[axis].nunique() > 1}
    rows, columns = _axes(spec, found.settings, varies, metrics)
    cells = _cells(frame, metrics, (*AXES, *found.settings), columns)
    lines = _sorted({tuple(at[axis] for axis in rows) for at, _ in cells}, rows, metrics)
    keys = _sorted({tuple(at[axis] for axis in columns) for at, _ in cells}, columns, metrics)
    places = {}
    for at, row in cells:
        place = tuple(at[axis] for axis in rows), tuple(at[axis] for axis in columns)
        if place in places and places[place] is not row:
            raise UserError(f"two figures in {' '.join(map(str, sum(place, ())))}: name their difference in the rows")
        places[place] = row
    best = _best(frame)
    header, picks = [], []
    for key in keys:
        present = [places[line, key] for line in lines if (line, key) in places]
        header.append(tuple(map(_word, key)))
        picks.append((key, _ours))
        if any(_known(row["published"]) for row in present):
            *outer, last = header[-1]
            header += [(*outer, f"{last}, published"), (*outer, f"{last}, ours / published")]
            picks += [(key, _published), (key, _ratio)]
    marked, body = _marked(found), []
    axes = (*AXES, *found.settings)
    with_n = _varying_n(frame)
    for line in lines:
        texts = [pick(places.get((line, key)), best) for key, pick in picks]
        own = [
            marked.get(tuple(places[line, key][axis] for axis in axes), "") if (line, key) in places else ""
            for key, _ in picks
        ]
        marks = {mine for mine, (key, _) in zip(own, picks, strict=True) if (line, key) in places}
        whole = marks.pop() if len(marks) == 1 else ""
        if not whole:  # only some of the row's cells
            texts = [replace(cell, text=cell.text + mine) for cell, mine in zip(texts, own, strict=True)]
        counts = {int(places[line, key]["n"]) for key in keys if (line, key) in places}
        count = [Cell("/".join(map(str, sorted(counts))))] if with_n else []
        words = [_word(word) for word in line]
        body.append(([*words[:-1], words[-1] + whole], texts + count))
    if with_n:
        header.append((*[""] * (len(columns) - 1), "n"))
    named = {*rows, *columns}
    constant = {axis: str(frame[axis].iloc[0]) for axis in AXES if axis not in varies | named}
    constant |= {"metric": metrics[0]} if "metric" not in named else {}
    return Grid(spec.title, list(rows), header, body, footnotes(found, constant, metrics))


def _marked(found: Aggregate) -> dict[tuple, str]:
    """Key of each group → † if it has seen gradients of the dense model, ‡ if its weights followed those of the pruned
    one, § if the method has trained the model, or several of them."""
    signs = {"†": sees_gradients, "‡": lambda record: finish_of(record) != "none", "§": is_trained}
    return {
        group.key: "".join(sign for sign, holds in signs.items() if any(map(holds, group.records)))
        for group in found.groups
    }


def _shown_rows(found: Aggregate, metrics: Sequence[str]) -> pd.DataFrame:
    """The table's figures; a row without a metric for pruned models of which nothing that it shows was measured."""
    frame = found.frame[found.frame["metric"].isin(metrics) | found.frame["metric"].isna()]
    axes = [*AXES, *found.settings]
    there = set(frame[axes].itertuples(index=False, name=None))
    absent = [group.key for group in found.groups if group.key not in there and group.key[1] != "0"]
    rows = found.frame[found.frame[axes].apply(tuple, axis=1).isin(absent)].drop_duplicates(axes)
    nothing = {"metric": None, "mean": math.nan, "std": math.nan, "n": 0, "published": math.nan, "ratio": math.nan}
    if not absent:
        return frame
    import pandas as pd

    return pd.concat([frame, rows.assign(**nothing)])


def shown_metrics(frame: pd.DataFrame, globs: Sequence[str] | None) -> list[str]:
    """The metrics of a table in its order.

    Raises:
        NotMeasured: globs that match none.
    """
    measured = frame[frame["metric"].notna()]
    # Losses, then perplexities and scores in the order of the records, then the rest.
    names = sorted(
        dict.fromkeys(measured["metric"]),
        key=lambda name: (" loss" not in name, name in ("seconds", "finishing seconds", "training seconds", "zeros")),
    )
    if globs is None:
        shown = set(measured.loc[measured["shown"].astype(bool), "metric"])
        return [name for name in names if name in shown]
    found = [name for glob in globs for name in names if fnmatchcase(name, glob)]
    if not found and names:
        raise NotMeasured(f"metrics={list(globs)} match none of what was measured: {', '.join(names)}")
    return list(dict.fromkeys(found))


def _axes(spec: Spec, settings: Sequence[str], varies: set[str], metrics: Sequence[str]) -> tuple[list, list]:
    def kept(axes: Iterable[str]) -> list[str]:
        return [axis for axis in axes if axis in varies or (axis == "metric" and len(metrics) > 1)]

    rows, columns = kept(spec.rows), kept(spec.columns)
    named = {*spec.rows, *spec.columns}
    rows += [axis for axis in (*AXES, *settings) if axis in varies and axis not in named]
    if "metric" not in rows and (not columns or ("metric" not in named and len(metrics) > 1)):
        columns.append("metric")
    if not columns:  # nothing that the table puts there varies: one column, of an axis that every record has
        columns = [axis for axis in spec.columns if axis in AXES][:1] or ["metric"]
        rows = [axis for axis in rows if axis not in columns]
    if not rows:
        rows, columns = ["method"], [axis for axis in columns if axis != "method"] or ["metric"]
    return rows, columns


def _cells(frame: pd.DataFrame, metrics: Sequence[str], axes: Sequence[str], columns: Sequence[str]) -> list:
    """(axis → value, figure) of every cell; a group without figures has its status under every metric, and the dense
    model stands in every column that tells pruned ones apart."""
    values = {axis: list(dict.fromkeys(frame.loc[frame["sparsity"] != written.DENSE, axis])) for axis in axes}
    found = []
    for row in frame.to_dict("records"):
        names = metrics if row["metric"] is None or row["metric"] != row["metric"] else [row["metric"]]
        places = [{axis: row[axis] for axis in axes}]
        if written.is_dense(row["sparsity"]):
            for axis in columns:
                if axis == "sparsity" or (axis in axes and not row[axis]):
                    places = [at | {axis: value} for at in places for value in values[axis] or [row[axis]]]
        found += [(at | {"metric": name}, row) for at in places for name in names]
    return found


def _sorted(keys: Iterable[tuple], axes: Sequence[str], metrics: Sequence[str]) -> list[tuple]:
    orders = {"sparsity": written.order, "method": looks.method_order, "metric": metrics.index}
    return sorted(keys, key=lambda key: [orders.get(axis, natural)(word) for axis, word in zip(axes, key, strict=True)])


def _best(frame: pd.DataFrame) -> dict[tuple, str]:
    """(model, sparsity, metric) → the best mean as it is shown, so that equal figures are equally bold. The dense model
    does not compete, and a figure without another beside it has won nothing."""
    found = {}
    competing = frame[(frame["sparsity"] != written.DENSE) & (frame["better"] != 0)]
    for key, rows in competing.groupby(["model", "sparsity", "metric"]):
        means = [value for value in rows["mean"] if math.isfinite(value)]
        if len(rows) > 1 and means:
            found[key] = number((max if rows["better"].iloc[0] > 0 else min)(means), key[-1])
    return found


def _ours(row: Mapping | None, best: Mapping) -> Cell:
    if row is None:
        return Cell()
    if not row["n"]:
        return Cell(row["status"] if row["status"] in ("OOM", "error") else NONE)
    text = number(row["mean"], row["metric"])
    error = row["std"] if row["n"] > 1 else row["stderr"]
    is_best = row["sparsity"] != written.DENSE and best.get((row["model"], row["sparsity"], row["metric"])) == text
    return Cell(text if not _known(error) else with_deviation(row["mean"], error, text), is_best)


def _published(row: Mapping | None, best: Mapping) -> Cell:
    return Cell() if row is None or not _known(row["published"]) else Cell(number(row["published"], row["metric"]))


def _ratio(row: Mapping | None, best: Mapping) -> Cell:
    return Cell() if row is None or not _known(row["ratio"]) else Cell(f"{row['ratio']:.3f}")


def _known(value) -> bool:
    return value is not None and value == value  # not nan


def _word(word: str) -> str:
    return str(word) or NONE


def _varying_n(frame: pd.DataFrame) -> bool:
    pruned = frame[(frame["sparsity"] != written.DENSE) & frame["metric"].notna()]
    return pruned["n"].nunique() > 1


def number(value: float, metric: str) -> str:
    """Losses and perplexities with four significant digits, no exponent below ten million; tokens whole; the rest with
    fixed decimals."""
    if not math.isfinite(value):
        return str(value)
    if metric.endswith(("seconds", "GB")):
        return f"{value:.1f}"
    if metric.endswith(" tokens"):
        return f"{value:.0f}"
    if " loss" not in metric and " perplexity" not in metric:
        return f"{value:.4f}"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-6:
        return f"{value:.3e}"
    decimals = 4 if size == 0 else max(0, 3 - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}"


def with_deviation(mean: float, deviation: float, text: str) -> str:
    """Mean ± deviation to the same last digit: that of the mean as it is shown alone, or, where this shows nothing of
    the deviation, the deviation's first.

    Args:
        mean, deviation: the figures.
        text: what `number` makes of the mean.
    """
    if not math.isfinite(mean) or not math.isfinite(deviation):
        return f"{text} ± {deviation}"
    digits, exponent, power = text.partition("e")
    size = 10.0 ** int(power or 0)
    _, _, decimals = digits.partition(".")
    places = len(decimals)
    if deviation and not float(f"{deviation / size:.{places}f}"):
        places = -math.floor(math.log10(deviation / size))
    both = f"{mean / size:.{places}f} ± {deviation / size:.{places}f}"
    return f"({both})e{power}" if exponent else both
