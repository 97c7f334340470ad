"""The report's plots as one Vega-Lite specification, by Altair; they answer the mouse by themselves.

Panels share what is chosen: the measure, the series picked in the legend, and the runs whose losses are drawn along the
depth, which are those clicked in a plot (`picked`) or ticked in the table (`ticked`).
"""

from __future__ import annotations

import colorsys
import itertools
import math
import warnings
from collections.abc import Sequence

import altair as alt

from ..patterns import written
from ..tables import figures, looks
from .gather import Sweep, columns

_OTHERS = ("#E69F00", "#AA4499", "#44AA99", "#882255", "#56B4E9", "#999933", "#CC6677", "#332288", "#DDCC77", "#117733")
_OTHERS += ("#CC79A7", "#661100", "#88CCEE", "#009E73", "#D55E00", "#0072B2")
_SHAPES = ["circle", "square", "triangle-up", "cross", "diamond", "triangle-right", "triangle-down", "triangle-left"]
_SHAPES += [
    "M-.9,0L-.45,-.8L.45,-.8L.9,0L.45,.8L-.45,.8Z",
    "M-.9,-.5H.9V.5H-.9Z",
    "M-.5,-.9V.9H.5V-.9Z",
    "arrow",
    "wedge",
]
_INK, _GRID = "currentColor", "light-dark(#dfe2e6, #3d434b)"
_HEIGHT = 260
_LISTED = 8  # series that a legend lists whole; of more, those of the measure that is shown
_FONT = 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif'  # by name, since Vega measures texts with it
_PLAIN = ",~r"  # of d3: no exponents, no zeros at the end


def charts(sweeps: Sequence[Sweep]) -> tuple[dict, list[str]]:
    """The specification, and the ids of the runs whose losses are drawn first.

    Returns:
        ({}, []) where no run has a measure that can be drawn.
    """
    rows = [row for sweep in sweeps for row in _rows(sweep)]
    if not rows:
        return {}, []
    # First, what most runs have been measured by.
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    first = max(panels, key=lambda name: (" perplexity" in name, sum(row["panel"] == name for row in rows)))
    ticked = _first_runs([row for row in rows if row["panel"] == first])
    depth = _losses(sweeps)
    series = sorted({row["series"] for row in (*rows, *depth) if not row.get("dense")})
    shown = {name: [row for row in rows if row["panel"] == name and not row["dense"]] for name in panels}
    labels = {name: sorted({row["series"] for row in own} & {*series}, key=_place) for name, own in shown.items()}
    patterns = {name: sorted({row["pattern"] for row in own}, key=_order) for name, own in shown.items()}
    if len(series) <= _LISTED:
        labels = dict.fromkeys(panels, sorted(series, key=_place))
    select = alt.binding_select(options=panels, name="measure", element="#measure")
    parameters = (
        alt.param("panel", value=first, bind=select),
        alt.param("labels", value=labels),
        alt.param("patterns", value=patterns),
        alt.param("measures", value={row["panel"]: row["measure"] for row in rows}),
        alt.param("ticked", value=ticked),
    )
    found = _styled(_panels(rows, series, bool(depth)).add_params(*parameters)).to_dict()
    # One legend below the other: beside a wide one there is no room. Altair has no word for it.
    found["config"]["legend"]["layout"] = {"bottom": {"direction": "vertical", "anchor": "start", "margin": 12}}
    # Beside Altair, which would look at every row.
    return found | {"datasets": {"runs": rows, "depth": depth}}, ticked


def _losses(sweeps: Sequence[Sweep]) -> list[dict]:
    """The losses of each run along the depth, for runs that have any."""
    runs = {run.id: run for sweep in sweeps for run in sweep.runs}
    return [
        {
            "id": run.id,
            "run": run.name,
            "series": run.series,
            "sparsity": run.record["sparsity"],
            "block": [block for block, _ in run.losses],
            "loss": [float(f"{loss:.4g}") for _, loss in run.losses],
        }
        for run in runs.values()
        if run.losses
    ]


def _panels(rows: Sequence[dict], series: Sequence[str], depth: bool) -> alt.ConcatChart:
    """The chosen measure against everything that rows have, and losses along the depth, side by side."""
    picked = alt.selection_point("picked", fields=["id"], toggle=True, empty=False, on="click")
    legend = alt.selection_point("series", fields=["series"], bind="legend")
    colour, shape = _colour(series), _shape(rows)
    parts = [
        _scatter(x, title, colour, shape, picked, legend, **more)
        for x, title, more in (
            ("level", "sparsity", {"lines": True}),
            ("seconds", "seconds of pruning", {"scale": "log"}),
            ("megabytes", "packed size of the pruned layers, MB (computed)", {"lines": True}),
        )
        if any(row[x] is not None for row in rows)
    ]
    if depth:
        parts.append(_depth(colour, picked, legend))
    with warnings.catch_warnings():  # Altair tells that the panels share their selections, as they should
        warnings.filterwarnings("ignore", message="Automatically deduplicated")
        return alt.concat(*parts, columns=2, spacing=30)


def _colour(series: Sequence[str]) -> alt.Color:
    limit = "windowSize()[0] > 800 ? min(windowSize()[0], 1440) / 4 - 75 : windowSize()[0] - 150"
    legend = alt.Legend(
        title=None,
        orient="bottom",
        columns=alt.ExprRef("windowSize()[0] > 800 ? 4 : 1"),
        labelLimit=alt.ExprRef(limit),
        values=alt.ExprRef("labels[panel]"),
    )
    return alt.Color("series:N", scale=_colours(series), legend=legend)


def _shape(rows: Sequence[dict]) -> alt.Shape:
    patterns = sorted({row["pattern"] for row in rows if not row["dense"]} | {"unstructured"}, key=_order)
    legend = alt.Legend(
        title=None,
        orient="bottom",
        columns=alt.ExprRef("windowSize()[0] > 800 ? 8 : 2"),
        symbolFillColor=_INK,
        symbolStrokeColor=_INK,
        values=alt.ExprRef("patterns[panel]"),
    )
    return alt.Shape("pattern:N", scale=alt.Scale(domain=patterns, range=_SHAPES), legend=legend)


def _place(series: str) -> tuple:
    """Series come in the order of their methods in tables."""
    return looks.method_order(series.partition(" ")[0]), series


def _order(pattern: str) -> tuple:
    return pattern != "unstructured", () if pattern == "unstructured" else written.order(pattern)


def _styled(whole: alt.ConcatChart) -> alt.ConcatChart:
    """In the ink of the page, light or dark."""
    return (
        whole.resolve_scale(color="shared", shape="shared")
        .configure(background="transparent", font=_FONT)
        .configure_axis(
            labelColor=_INK, titleColor=_INK, gridColor=_GRID, domainColor=_GRID, tickColor=_GRID, titleFontWeight=500
        )
        .configure_legend(labelColor=_INK, titleColor=_INK, symbolStrokeWidth=2)
        .configure_view(stroke=None)
        .configure_title(color=_INK, anchor="start", fontWeight=600)
    )


def _rows(sweep: Sweep) -> list[dict]:
    """A row for each run and measure that a logarithmic axis can show."""
    names = [name for name in columns(sweep.runs) if " perplexity" in name or name.startswith("relative loss")]
    several = len({run.record["model"] for run in sweep.runs}) > 1
    rows = []
    for name in sorted(names, key=lambda name: " perplexity" not in name):
        for run in sweep.runs:
            value = run.figures[name].value if name in run.figures else math.nan
            if math.isfinite(value) and value > 0 and run.record["status"] == "complete":
                model = f", {run.record['model']}" if several else ""
                rows.append(
                    {
                        "id": run.id,
                        "panel": f"{sweep.name or 'runs'}{model}: {name}",
                        "measure": name,
                        "run": run.name,
                        "model": run.record["model"],
                        "series": run.series,
                        "dense": figures.is_dense(run.record),
                        "sparsity": run.record["sparsity"],
                        "pattern": run.pattern,
                        "seed": run.record["seed"],
                        "level": run.level,
                        "seconds": _short(run.seconds),
                        "megabytes": _short(run.megabytes),
                        "value": _short(value),
                    }
                )
    return rows


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _first_runs(rows: Sequence[dict]) -> list[str]:
    """One run of each series, at the sparsity that most of them have been pruned to."""
    at: dict[str, dict[str, str]] = {}
    for row in rows:
        if not row["dense"]:
            at.setdefault(row["sparsity"], {}).setdefault(row["series"], row["id"])
    return list(max(at.values(), key=len).values()) if at else []


def _colours(series: Sequence[str]) -> alt.Scale:
    """A method in its own colour; what a sweep varies beside the method in others, in turn."""
    own = {name: looks.look(name)[0] for name in series if name in looks.methods()}
    free = [colour for colour in _OTHERS if colour not in own.values()]
    others = itertools.cycle(free)
    colours = [own[name] if name in own else next(others) for name in series]
    return alt.Scale(domain=list(series), range=[_on_both(colour) for colour in colours])


def _on_both(colour: str) -> str:
    """The colour, lighter on a dark page where it would not be seen."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    hue, light, full = colorsys.rgb_to_hls(red, green, blue)
    lifted = colorsys.hls_to_rgb(hue, max(light, 0.62), full)
    return f"light-dark({colour}, #{''.join(f'{round(255 * part):02x}' for part in lifted)})"


def _up() -> alt.Y:
    scale = alt.Scale(type="log", nice=False, padding=8)
    return alt.Y("value:Q", scale=scale, axis=alt.Axis(format=_PLAIN, title=None, tickCount=5))


def _scatter(x: str, title: str, colour, shape, picked, legend, scale: str = "linear", lines: bool = False):
    """The chosen measure against x: a point for each run, a line through the means of the unstructured levels, the
    dense model as a level."""
    base = alt.Chart(alt.NamedData("runs"), height=_HEIGHT).transform_filter("datum.panel === panel")
    zero = {} if scale == "log" else {"zero": False}
    across = alt.Scale(type=scale, nice=False, padding=12, **zero)
    ticks = alt.Axis(format=_PLAIN, tickCount=6)
    seen = alt.condition(legend, alt.value(1), alt.value(0.1))
    points = (
        base.transform_filter(f"!datum.dense && isValid(datum.{x})")
        .mark_point(filled=True, size=55)
        .encode(
            x=alt.X(f"{x}:Q", title=title, scale=across, axis=ticks),
            y=_up(),
            color=colour,
            shape=shape,
            opacity=seen,
            stroke=alt.condition(picked, alt.value(_INK), alt.value(None)),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("model:N"),
                alt.Tooltip("series:N", title="method"),
                alt.Tooltip("sparsity:N"),
                alt.Tooltip("seed:Q"),
                alt.Tooltip("value:Q", title="measure", format=_PLAIN),
                alt.Tooltip("seconds:Q", format=".1f"),
                alt.Tooltip("megabytes:Q", title="packed MB", format=".1f"),
            ],
        )
        .add_params(picked, legend)
    )
    layers = [points]
    if lines:
        means = base.transform_filter(f"!datum.dense && datum.pattern === 'unstructured' && isValid(datum.{x})")
        means = means.transform_aggregate(value="mean(value)", at=f"mean({x})", groupby=["series", "sparsity"])
        line = means.mark_line(strokeWidth=1.8)
        layers.insert(0, line.encode(x=alt.X("at:Q", title=title), y=_up(), color=colour, opacity=seen))
    dense = base.transform_filter("datum.dense").transform_aggregate(value="mean(value)", groupby=["series"])
    told = [alt.Tooltip("value:Q", title="dense", format=_PLAIN)]
    layers.append(dense.mark_rule(strokeDash=[6, 4], color=_INK, opacity=0.6).encode(y=_up(), tooltip=told))
    return alt.layer(*layers, title=alt.Title(text=alt.ExprRef("measures[panel]")))


def _depth(colour: alt.Color, picked: alt.Parameter, legend: alt.Parameter) -> alt.Chart:
    """Mean relative loss of each block of the chosen runs."""
    return (
        alt.Chart(alt.NamedData("depth"), height=_HEIGHT, title="relative loss of the chosen runs")
        .transform_filter({"or": [{"param": picked.name, "empty": False}, "indexof(ticked, datum.id) >= 0"]})
        .transform_flatten(["block", "loss"], ["block", "value"])
        .mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=22))
        .encode(
            # Ticks between whole numbers, which few blocks have, are left without a label.
            x=alt.X("block:Q", axis=alt.Axis(labelExpr="datum.value % 1 ? '' : format(datum.value, 'd')")),
            y=_up(),
            color=colour,
            strokeDash=alt.StrokeDash("sparsity:N", legend=None),
            detail="id:N",
            opacity=alt.condition(legend, alt.value(1), alt.value(0.1)),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("series:N", title="method"),
                alt.Tooltip("sparsity:N"),
                alt.Tooltip("block:Q"),
                alt.Tooltip("value:Q", title="relative loss", format=_PLAIN),
            ],
        )
    )
