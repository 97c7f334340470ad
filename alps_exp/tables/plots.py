"""Plots of a table's records; the same records give the same bytes.

Each kind is one function that gathers what is drawn as plain data, and one that draws it. The files carry a digest of
the data, by which tables --check knows them: their bytes depend on matplotlib's version.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..base.files import replacing, sha256
from ..patterns import Unstructured, written
from ..runs.naming import NEUTRAL
from . import looks
from .figures import FINISHING, PHASES, TRAINING, Aggregate, Group, key_of, mean_and_std, measures, trainings, varying
from .layout import Spec, shown_metrics

FORMATS = ("svg", "png")

_VARIANTS = "D<>P*d8"
_SHADES = (-0.5, 0.45, -0.8, 0.7)  # of the settings of one method: a share of black or white in its colour
_SHADES_OF_DARK = (0.45, 0.7, 0.25, 0.85)  # of a colour that is nearly black
_PHASES = {
    "weigh": ("#DDDDDD", "xxx"),
    "calibrate, transfer": ("#FFFFFF", "///"),
    "solve": ("#555555", ""),
    "propagate": ("#BBBBBB", ".."),
    "finish": ("#FFFFFF", "++"),
    "distil": ("#888888", "\\\\"),
    "train": ("#888888", "oo"),
}
# Moving a block to the device and back takes a hundredth of the rest: too little to see by itself.
_MERGED = {"calibrate": "calibrate, transfer", "transfer": "calibrate, transfer"}
_COLUMNS = 3
# Groups of choices beside the method that change what a run costs and brings.
_BEYOND = ("target", "sensitivity", "allocation", "capture", "refit", "finish")
# What eval=speed measures of each form, as far as it is drawn, and the forms beside the dense one.
_COSTS = ("decode at batch 1, tokens/s", "resident, MiB", "on disk, MiB")
_FORMS = ("packed", "semi-structured")
# Colour and marker of the kinds of patterns, in their order.
_KINDS = [
    ("#000000", "o"), ("#0072B2", "s"), ("#E69F00", "^"), ("#009E73", "v"), ("#CC79A7", "D"), ("#56B4E9", "P"),
    ("#D55E00", "X"), ("#999999", "*"),
]  # fmt: skip
_ITEMS = ("series", "points", "bars")  # of a panel, what is drawn
_DIGEST = re.compile(rb"alps_exp data ([0-9a-f]{64})")


def draw(found: Aggregate, spec: Spec, folder: Path, name: str, drawn: bool = True) -> list[Path]:
    """Draw the plots that a table asks for and for which there are data; or write their digests alone.

    Returns:
        The files written, NAME-PLOT.svg and .png, in the order of `spec.plots`.
    """
    paths = []
    for kind in spec.plots:
        gather, panel = KINDS[kind]
        panels = gather(found, spec)
        if panels:
            folder.mkdir(parents=True, exist_ok=True)
            files = [folder / f"{name}-{kind}.{suffix}" for suffix in FORMATS]
            data = json.dumps([panel.__name__, panels], sort_keys=True)
            mark = f"alps_exp data {sha256(data)}"
            if drawn:
                _save(panels, panel, files, mark)
            else:
                for file in files:
                    file.write_text(mark)
            paths += files
    return paths


def digest_of(path: Path) -> bytes | None:
    """The digest of the data that a plot was drawn from; None if the file carries none."""
    match = _DIGEST.search(path.read_bytes())
    return match[1] if match else None


def _save(panels: list[dict], panel: Callable, files: Sequence[Path], mark: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    columns = 2 if len(panels) == 4 else min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context({"svg.hashsalt": "alps_exp", "font.size": 9, "hatch.linewidth": 0.6}):
        beside = max((len(bar["label"]) for content in panels for bar in content.get("bars", ())), default=0)
        wide = 3.4 + 0.07 * max(beside - 16, 0)
        size = (0.4 + wide * columns + (1.2 if columns == 1 else 0), 0.8 + 2.7 * rows)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        handles: dict = {}
        for axis, content in zip(axes.flat, panels, strict=False):
            panel(axis, content, handles)
            axis.set_title(content["title"], fontsize=9)
            axis.grid(alpha=0.3, which="major")
            axis.set_axisbelow(True)
        handles = {label: handles[label] for label in _in_order(handles, panels)}
        room = 0.5 + 0.07 * max(map(len, handles))  # inches that an entry takes
        entries = max(1, min(len(handles), int(size[0] / room)))
        names, entries = _by_method(list(handles), panels, entries)
        most = int((size[0] - 0.5) / 0.07)  # characters; what is longer, of many settings, takes several lines
        shown = [textwrap.fill(name, most, subsequent_indent="    ") for name in names]
        more = sum(name.count("\n") for name in shown)
        lower = 0.18 * max(math.ceil(len(names) / entries) - 2, 0) + (0.15 * more + 0.05 * len(names) if more else 0)
        figure.set_figheight(size[1] + lower)
        blank = Line2D([], [], linestyle="none")
        figure.legend(
            [handles.get(name, blank) for name in names], shown, loc="outside lower center", frameon=False,
            handlelength=3, columnspacing=1.2, ncols=entries,
        )  # fmt: skip
        _share_scales(list(axes.flat[: len(panels)]), panels)
        if len(models := {content["model"] for content in panels}) == 1:
            figure.suptitle(*models, fontsize=10)
        figure.draw_without_rendering()  # places everything; once is enough for all formats
        figure.set_layout_engine("none")
        for file in files:
            kept = {"Date": None} if file.suffix == ".svg" else {"Software": None}
            with replacing(file) as temporary:
                figure.savefig(temporary, format=file.suffix[1:], dpi=130, metadata=kept | {"Description": mark})
        pyplot.close(figure)


def _in_order(names: Iterable[str], panels: Sequence[Mapping]) -> list[str]:
    """Entries of a legend: methods and their settings in the order of tables, then what is no method's."""
    places = {}
    for item in itertools.chain.from_iterable(panel.get(key, ()) for panel in panels for key in _ITEMS):
        if isinstance(item, Mapping) and "method" in item:
            places[item["label"]] = (looks.method_order(item["method"]), item["variant"])
    return sorted(names, key=lambda name: (name not in places, places.get(name, ())))


def _by_method(names: list[str], panels: Sequence[Mapping], columns: int) -> tuple[list[str], int]:
    """Entries of a legend with empty ones between them, so that each method has a column of its own, and the number of
    columns; as they are where they need one line, or where methods have one entry each or too many for that."""
    methods = {item["label"]: item["method"] for panel in panels for key in _ITEMS for item in panel.get(key, ())
               if isinstance(item, Mapping) and "method" in item}  # fmt: skip
    stacks: dict[str, list[str]] = {}
    for name in names:
        stacks.setdefault(methods.get(name, ""), []).append(name)
    others = stacks.pop("", [])
    if len(names) <= columns or not 1 < len(stacks) <= columns or max(map(len, stacks.values())) == 1:
        return names, columns
    found = list(stacks.values())
    if len(found) < columns:
        found += [others] if others else []
    else:
        found[-1] += others
    height = max(map(len, found))  # of all, since matplotlib makes columns equally long
    return [name for stack in found for name in [*stack, *[""] * (height - len(stack))]], len(found)


def _series(found: Aggregate, groups: Sequence[Group]) -> Iterator[tuple[dict, list[Group]]]:
    """What is drawn alike: a method, with its settings where these vary. Its label and look, and its groups; settings
    of one method have shades of its colour and markers of their own."""
    variants: dict[str, dict[tuple, int]] = {}
    # What has least to say beside its method looks as the method does everywhere.
    for group in sorted(found.groups, key=lambda group: len(list(_words(found, group.key[3:])))):
        method = variants.setdefault(group.key[2], {})
        method.setdefault(group.key[3:], len(method))
    members: dict[tuple, list[Group]] = {}
    for group in groups:
        if group.records and group.key[1] != "0":
            members.setdefault(group.key[2:], []).append(group)
    for key in sorted(members, key=lambda key: (looks.method_order(key[0]), variants[key[0]][key[1:]])):
        label = " ".join([key[0], *_words(found, key[1:])])
        yield {"label": label, "method": key[0], "variant": variants[key[0]][key[1:]]}, members[key]


def labels(records: Sequence[Mapping]) -> list[str]:
    """What plots call each of the records: its method, and what else was done otherwise than to the others."""
    settings = [key for key in varying(records) if not key.startswith("eval.")]
    keys = [key_of(record, settings) for record in records]
    groups = [Group(key, [], "complete") for key in dict.fromkeys(keys)]
    found = Aggregate(settings, groups, pd.DataFrame(), False, {})
    return [" ".join([key[2], *_words(found, key[3:])]) for key in keys]


def _words(found: Aggregate, values: Sequence[str]) -> Iterator[str]:
    """What a label says of the settings that vary: the choices of groups by name, but for those that say nothing, and
    other keys with their values, but for those that a choice decides about."""
    told = _told(tuple(found.settings), tuple(group.key for group in found.groups))
    for name, value in sorted(zip(found.settings, values, strict=False), key=lambda pair: _order(pair[0])):
        group, _, last = name.rpartition(".")
        if last == "name":
            if value and value != NEUTRAL.get(group, {}).get("name"):
                yield value
        elif name == "refit":  # always told, since it makes another method of one
            if value not in ("", "none"):
                yield f"{last}={value}"
        elif value and name in told:
            yield f"{last}={value}"


@functools.lru_cache(maxsize=2)  # every label of every plot asks, and of many runs and settings it takes seconds
def _told(settings: tuple[str, ...], groups: tuple[tuple, ...]) -> frozenset[str]:
    """Keys that a label tells, by the settings that vary and the keys of all groups."""
    columns = {name: index for index, name in enumerate(settings)}
    apart = {key[2:] for key in groups if key[1] != "0"}
    keys = [key[1:] for key in apart]

    def count(*places: int) -> int:
        return len({tuple(key[place] for place in places) for key in keys})

    # A key without which all would still differ, as where it goes with another one, says nothing to who reads a label.
    told = list(columns.values())
    for index in [index for name, index in columns.items() if not name.endswith(".name")]:
        rest = [place for place in told if place != index]
        if len({(key[0], *(key[1 + place] for place in rest)) for key in apart}) == len(apart):
            told = rest

    def decided(name: str) -> bool:
        choice = columns.get(f"{name.rpartition('.')[0]}.name")
        return choice is not None and count(choice, columns[name]) <= count(choice)

    return frozenset(name for name, index in columns.items() if index in told and not decided(name))


def _order(name: str) -> tuple[bool, int]:
    """Where a key stands in labels."""
    return not name.endswith(".name"), _place(name)


def _place(name: str) -> int:
    """Where a key's group stands in labels."""
    group = name.partition(".")[0]
    return _BEYOND.index(group) if group in _BEYOND else len(_BEYOND)


def _statistic(group: Group, *metrics: str) -> tuple[float, float, float] | None:
    """Mean of what is finite and positive, as a logarithmic axis needs it, and one standard deviation of the logarithms
    about their own mean, down and up (the mean itself of a single seed); of a metric, or of the sum of those that there
    are of several."""
    rows = [[found[name].value for name in metrics if name in found] for found in map(measures, group.records)]
    values = [math.fsum(row) for row in rows if row]
    mean = mean_and_std(values)[0] if values else math.nan
    if not math.isfinite(mean) or min(values) <= 0:
        return None
    middle, spread = mean_and_std([math.log(value) for value in values])
    return (mean, math.exp(middle - spread), math.exp(middle + spread)) if spread else (mean, mean, mean)


def _titles(found: Aggregate) -> Callable[[str, str], dict]:
    """A panel's title, which names the model where the figure shows several; else the model is its heading."""
    several = len({group.key[0] for group in found.groups}) > 1
    nodes = [(group.key[0], record.get("config", {}).get("model") or {}) for group in found.groups
             for record in group.records[:1]]  # fmt: skip
    files = {model: node["gguf_file"] for model, node in nodes if node.get("gguf_file")}

    def title(model: str, rest: str) -> dict:
        heading = f"{model} ({Path(files[model]).stem})" if model in files else model  # which model demo is
        return {"model": heading, "title": f"{model}, {rest}" if several else rest}

    return title


def _models(found: Aggregate) -> dict[str, list[Group]]:
    models: dict[str, list[Group]] = {}
    for group in found.groups:
        models.setdefault(group.key[0], []).append(group)
    return models


def _cells(found: Aggregate) -> dict[tuple[str, str], list[Group]]:
    """Groups by model and sparsity, without the dense model."""
    cells: dict[tuple[str, str], list[Group]] = {}
    for group in found.groups:
        if group.key[1] != "0":
            cells.setdefault(group.key[:2], []).append(group)
    return cells


def _perplexity(found: Aggregate, spec: Spec) -> list[dict]:
    panels, title = [], _titles(found)
    metrics = [name for name in shown_metrics(found.frame, spec.metrics) if " perplexity (" in name]
    for model, groups in _models(found).items():
        for metric in metrics:
            series = []
            for look, members in _series(found, groups):
                points = [(group.key[1], *figures) for group in members if (figures := _statistic(group, metric))]
                if points:
                    series.append(look | {"points": points})
            patterns = {point[0] for item in series for point in item["points"]}
            dense = [group for group in groups if written.is_dense(group.key[1]) and group.records]
            level = _statistic(dense[0], metric) if dense else None
            if len(patterns) > 1:
                panels.append(
                    {
                        **title(model, metric),
                        "patterns": sorted(patterns, key=written.order),
                        "dense": level and level[0],
                        "series": series,
                    }
                )
    return panels


def _level(name: str) -> float | None:
    """The place of an unstructured pattern on the axis of levels; None for the others, which stand apart."""
    pattern = written.read(name)
    return pattern.sparsity if isinstance(pattern, Unstructured) else None


def _draw_perplexity(axis, panel: dict, handles: dict) -> None:
    """Levels on a line, N:M apart on their right; band and bars are one standard deviation of the logarithms."""
    levels = [level for name in panel["patterns"] if (level := _level(name)) is not None]
    apart = [name for name in panel["patterns"] if _level(name) is None]
    step = 0.1 if len(levels) < 2 else (levels[-1] - levels[0]) / 3.5
    places = {name: (levels[-1] if levels else 0) + step * (index + 1) for index, name in enumerate(apart)}
    for index, item in enumerate(panel["series"]):
        colour, marker, style = _look(item)
        line = [(x, *figures) for name, *figures in item["points"] if (x := _level(name)) is not None]
        (handle,) = axis.plot(
            [x for x, *_ in line],
            [y for _, y, *_ in line],
            color=colour, marker=marker, linestyle=style, linewidth=1.4, markersize=5,
        )  # fmt: skip
        handles.setdefault(item["label"], handle)
        axis.fill_between(
            [x for x, *_ in line],
            [low for *_, low, _ in line],
            [high for *_, high in line],
            color=colour, alpha=0.2, linewidth=0,
        )  # fmt: skip
        shift = step * 0.1 * (index - (len(panel["series"]) - 1) / 2)
        marks = [(places[name] + shift, *figures) for name, *figures in item["points"] if _level(name) is None]
        axis.errorbar(
            [x for x, *_ in marks],
            [y for _, y, *_ in marks],
            yerr=_bars([figures for _, *figures in marks]),
            color=colour, marker=marker, linestyle="none", markersize=5, capsize=2, elinewidth=1,
        )  # fmt: skip
    if panel["dense"]:
        handles.setdefault("dense", axis.axhline(panel["dense"], color="#555555", linewidth=1, linestyle=(0, (6, 3))))
    if levels and apart:
        axis.axvline(levels[-1] + step / 2, color="#999999", linewidth=0.8, linestyle=":")
    axis.set(xlabel="sparsity", ylabel="perplexity", yscale="log")
    turned = {"rotation": 90, "fontsize": 7} if len(levels) + len(apart) > 10 else {}  # so many overlap side by side
    axis.set_xticks([*levels, *places.values()], [f"{level:g}" for level in levels] + apart, **turned)


def _losses(found: Aggregate, spec: Spec) -> list[dict]:
    panels, title = [], _titles(found)
    for (model, sparsity), groups in _cells(found).items():
        series = []
        for look, members in _series(found, groups):
            for kind in ("relative_loss", "held_out_loss"):
                blocks: dict[int, list[float]] = {}
                for record in members[0].records:
                    for row in record.get("layers") or []:
                        if row.get(kind) is not None and math.isfinite(float(row[kind])):
                            blocks.setdefault(row["block"], []).append(float(row[kind]))
                points = [(block, mean_and_std(blocks[block])[0]) for block in sorted(blocks)]
                if points:
                    series.append(look | {"kind": kind, "points": points})
        if any(len(item["points"]) > 1 for item in series):
            panels.append(title(model, f"sparsity {sparsity}") | {"series": series})
    return panels


def _draw_losses(axis, panel: dict, handles: dict) -> None:
    """Mean relative loss of each block's layers; the thin lines with crosses are those on held-out windows."""
    for item in panel["series"]:
        colour, marker, style = _look(item)
        held_out = item["kind"] == "held_out_loss"
        blocks, values = zip(*item["points"], strict=True)
        (handle,) = axis.plot(
            blocks, values, color=colour, linestyle=style, linewidth=0.7 if held_out else 1.4,
            marker="x" if held_out else marker, markersize=4, markevery=max(1, len(blocks) // 8),
        )  # fmt: skip
        if not held_out:
            handles.setdefault(item["label"], handle)
    if any(item["kind"] == "held_out_loss" for item in panel["series"]) and "held out" not in handles:
        (handles["held out"],) = axis.plot([], [], color="#666666", linewidth=0.7, marker="x", markersize=4)
    axis.set(xlabel="block", ylabel="mean relative loss", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _seconds(found: Aggregate, spec: Spec) -> list[dict]:
    metrics = [name for name in shown_metrics(found.frame, None) if name.startswith("relative loss")]
    return _against_seconds(found, metrics[:1], "")


def _frontier(found: Aggregate, spec: Spec) -> list[dict]:
    """Of tables in which more than the method varies of what is done to a model."""
    if not any(name.partition(".")[0] in _BEYOND for name in found.settings):
        return []
    metrics = [name for name in shown_metrics(found.frame, spec.metrics) if " perplexity (" in name]
    return _against_seconds(found, metrics, ", {}", ("seconds", "finishing seconds", "training seconds"))


def _against_seconds(
    found: Aggregate, metrics: Sequence[str], suffix: str, times: Sequence[str] = ("seconds",)
) -> list[dict]:
    """A panel for each model, sparsity and metric; `suffix` names the metric in its title, `times` what is summed."""
    panels, title = [], _titles(found)
    for (model, sparsity), groups in _cells(found).items() if found.seconds else ():
        for metric in metrics:
            points = []
            for look, members in _series(found, groups):
                time, value = _statistic(members[0], *times), _statistic(members[0], metric)
                if time and value:
                    points.append(look | {"seconds": time, "loss": value})
            if len(points) > 1:
                name = title(model, f"sparsity {sparsity}{suffix.format(metric.partition(' (')[0])}")
                panels.append(name | {"loss": metric, "points": points})
    return sorted(panels, key=lambda panel: metrics.index(panel["loss"]))


def _costs(found: Aggregate, spec: Spec) -> list[dict]:
    """Of runs that measured what the model costs to run, by eval=speed."""
    panels, title = [], _titles(found)
    for (model, groups), cost in itertools.product(_models(found).items(), _COSTS):
        for metric in (name for name in shown_metrics(found.frame, None) if " perplexity (" in name):
            series = []
            for (look, members), form in itertools.product(_series(found, groups), _FORMS):
                points = [
                    (group.key[1], price, value)
                    for group in members
                    if (price := _statistic(group, f"{form} {cost}")) and (value := _statistic(group, metric))
                ]
                if points:
                    line = sorted((price[0], value[0], name) for name, price, value in points)
                    series.append(look | {"label": f"{look['label']}, {form}", "form": form, "points": line})
            if series:
                dense = [group for group in groups if written.is_dense(group.key[1]) and group.records]
                point = [_statistic(dense[0], name) for name in (f"dense {cost}", metric)] if dense else [None]
                panels.append(
                    {
                        **title(model, metric.partition(" (")[0]),
                        "cost": cost,
                        "dense": [mean for mean, *_ in point] if all(point) else None,
                        "series": series,
                    }
                )
    return panels


def _draw_costs(axis, panel: dict, handles: dict) -> None:
    """Perplexity against a cost, a point for each sparsity; semi-structured ones with open marks."""
    for item in panel["series"]:
        colour, marker, style = _look(item)
        prices, values, _ = zip(*item["points"], strict=True)
        (handle,) = axis.plot(
            prices, values, color=colour, marker=marker, linestyle=style, linewidth=1.2, markersize=5,
            markerfacecolor="none" if item["form"] != "packed" else colour,
        )  # fmt: skip
        handles.setdefault(item["label"], handle)
        for price, value, name in item["points"] if item is panel["series"][0] else ():
            # Fractions to the right, patterns to the left, which may lie close by.
            place = {"xytext": (3, 3)} if _level(name) is not None else {"xytext": (-4, -8), "ha": "right"}
            axis.annotate(name, (price, value), textcoords="offset points", fontsize=7, **place)
    if panel["dense"]:
        handles.setdefault("dense", axis.plot(*panel["dense"], "k*", markersize=9)[0])
    axis.set(xlabel=panel["cost"], ylabel="perplexity", yscale="log")


def _drift(found: Aggregate, spec: Spec) -> list[dict]:
    panels, title = [], _titles(found)
    for (model, sparsity), groups in _cells(found).items():
        series = []
        for look, members in _series(found, groups):
            for kind, stream in (("relative_loss", "calibration"), ("held_out_loss", "held out")):
                points = []
                for block in range(max((len(record.get("drift") or []) for record in members[0].records), default=0)):
                    rows = [(record.get("drift") or [])[block : block + 1] for record in members[0].records]
                    values = [float(row[0][stream]["mean"]) for row in rows if row and "mean" in row[0].get(stream, {})]
                    values = [value for value in values if math.isfinite(value) and value > 0]
                    points += [(block, mean_and_std(values)[0])] if values else []
                if points:
                    series.append(look | {"kind": kind, "points": points})
        if any(len(item["points"]) > 1 for item in series):
            panels.append(title(model, f"sparsity {sparsity}") | {"series": series})
    return panels


def _draw_drift(axis, panel: dict, handles: dict) -> None:
    """Mean of ‖h_p - h_d‖² / ‖h_d‖² behind each block; thin with crosses: of held-out windows."""
    _draw_losses(axis, panel, handles)
    axis.set(ylabel="drift of the hidden states")


def _allocation(found: Aggregate, spec: Spec) -> list[dict]:
    """Of sweeps in which a run's sparsity is divided among its layers."""
    panels, title = [], _titles(found)
    for (model, sparsity), groups in _cells(found).items():
        series, divided = [], False
        for look, members in _series(found, groups):
            blocks: dict[int, list[tuple[float, float]]] = {}
            for record in members[0].records:
                for row in record.get("layers") or []:
                    size = float(row["shape"][0] * row["shape"][1])
                    blocks.setdefault(row["block"], []).append((size, float(row["sparsity_target"])))
            points = []
            for block, rows in sorted(blocks.items()):
                levels, weights = [level for _, level in rows], math.fsum(size for size, _ in rows)
                if weights > 0 and all(map(math.isfinite, levels)):
                    mean = math.fsum(size * level for size, level in rows) / weights
                    points.append((block, mean, min(levels), max(levels)))
            if points:
                divided |= max(point[3] for point in points) - min(point[2] for point in points) > 1e-3
                series.append(look | {"points": points})
        if divided:
            panels.append(title(model, f"sparsity {sparsity}") | {"series": series})
    return panels


def _draw_allocation(axis, panel: dict, handles: dict) -> None:
    """Share of zeros in each block; the band spans its layers."""
    for item in panel["series"]:
        colour, marker, style = _look(item)
        blocks, means, least, most = zip(*item["points"], strict=True)
        (handle,) = axis.plot(
            blocks, means, color=colour, linestyle=style, marker=marker, linewidth=1.4, markersize=4,
            markevery=max(1, len(blocks) // 8),
        )  # fmt: skip
        handles.setdefault(item["label"], handle)
        axis.fill_between(blocks, least, most, color=colour, alpha=0.1, linewidth=0)
    axis.set(xlabel="block", ylabel="sparsity")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_seconds(axis, panel: dict, handles: dict) -> None:
    """Loss against time, bars are one standard deviation of the logarithms; the front: what no other beats in both."""
    for point in panel["points"]:
        colour, marker, _ = _look(point)
        time, loss = point["seconds"], point["loss"]
        own = looks.look(point["method"])[0]  # round a shade, since dark ones are alike
        handle = axis.errorbar(
            time[:1], loss[:1], xerr=_bars([time]), yerr=_bars([loss]), color=colour, marker=marker, markersize=7,
            markeredgecolor=own, markeredgewidth=1.3, linestyle="none", capsize=2, elinewidth=1, zorder=3,
        )  # fmt: skip
        handles.setdefault(point["label"], handle[0])  # without its bars, whose caps would hide the marker
    front, lowest = [], math.inf
    for time, loss in sorted((point["seconds"][0], point["loss"][0]) for point in panel["points"]):
        if loss < lowest:
            front.append((time, loss))
            lowest = loss
    (handles["Pareto front"],) = axis.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=2)
    name = "perplexity" if " perplexity (" in panel["loss"] else panel["loss"].partition(" of ")[0]
    axis.set(xlabel="seconds", ylabel=name, xscale="log", yscale="log")


def _phases(found: Aggregate, spec: Spec) -> list[dict]:
    panels, title = [], _titles(found)
    if not found.seconds:
        return []
    for (model, sparsity), groups in _cells(found).items():
        bars = []
        for look, members in _series(found, groups):
            phases = [record["phases"] for record in members[0].records]
            there = [phase for phase in PHASES if phase != "weigh" or any(item.get("weigh_seconds") for item in phases)]
            there += [phase for phase in (*FINISHING, *TRAINING) if any(f"{phase}_seconds" in item for item in phases)]
            means: dict[str, float] = {}
            for phase in there:
                mean = mean_and_std([item.get(f"{phase}_seconds") or 0.0 for item in phases])[0]
                name = _MERGED.get(phase, phase)
                means[name] = means.get(name, 0.0) + mean
            if any(means.values()):
                bars.append(look | {"seconds": means})
        if bars:
            panels.append(title(model, f"sparsity {sparsity}") | {"bars": bars})
    return panels


def _draw_phases(axis, panel: dict, handles: dict) -> None:
    names = [bar["label"] for bar in panel["bars"]]
    left = [0.0] * len(names)
    for phase, (colour, hatch) in _PHASES.items():
        widths = [bar["seconds"].get(phase, 0.0) for bar in panel["bars"]]
        if not any(phase in bar["seconds"] for bar in panel["bars"]):
            continue
        bars = axis.barh(names, widths, left=left, color=colour, hatch=hatch, edgecolor="#333333", linewidth=0.6)
        handles.setdefault(phase, bars)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="seconds")


_STAGES = {"blocks": "error of a block's output", "distil": "KL(dense ‖ pruned)"}


def _finishing(found: Aggregate, spec: Spec) -> list[dict]:
    """The losses of trainings along their steps; of blocks the mean over all of them."""
    panels, title = [], _titles(found)
    for (model, sparsity), groups in _cells(found).items():
        for stage, what in _STAGES.items():
            series = []
            for look, members in _series(found, groups):
                curves = [row["curve"] for record in members[0].records for row in trainings(record, [stage])]
                for kind in ("loss", "held_out"):
                    if points := _mean_curve(curves, kind):
                        series.append(look | {"kind": kind, "points": points})
            if series:
                panels.append(title(model, f"sparsity {sparsity}") | {"what": what, "series": series})
    return sorted(panels, key=lambda panel: list(_STAGES.values()).index(panel["what"]))


def _mean_curve(curves: Sequence[Sequence[Mapping]], kind: str) -> list[tuple[int, float]]:
    """Mean over trainings at each of their looks; one that ended early stays where it was."""
    values = [{row["step"]: float(row[kind]) for row in curve if row.get(kind) is not None} for curve in curves]
    values = [found for found in values if found]
    steps = sorted(set().union(*values)) if values else []

    def at(found: Mapping[int, float], step: int) -> float:
        return found[max((known for known in found if known <= step), default=min(found))]

    return [(step, mean_and_std([at(found, step) for found in values])[0]) for step in steps]


def _draw_finishing(axis, panel: dict, handles: dict) -> None:
    """Loss of the held-out windows; the thin lines are those of the windows trained on."""
    for item in panel["series"]:
        colour, marker, style = _look(item)
        held_out = item["kind"] == "held_out"
        steps, values = zip(*item["points"], strict=True)
        (handle,) = axis.plot(
            steps, values, color=colour, linestyle=style, linewidth=1.4 if held_out else 0.7,
            marker=marker if held_out else "", markersize=4,
        )  # fmt: skip
        if held_out:
            handles.setdefault(item["label"], handle)
    if any(item["kind"] == "loss" for item in panel["series"]) and "trained on" not in handles:
        (handles["trained on"],) = axis.plot([], [], color="#666666", linewidth=0.7)
    axis.set(xlabel="step", ylabel=panel["what"], yscale="log")


def _tokens(found: Aggregate, spec: Spec) -> list[dict]:
    """Perplexity against the tokens that distillations saw: a line for the calibration windows again and again, one for
    ever more fresh text, every window once, one for each amount of it that is seen again; where one has two points."""
    panels, title = [], _titles(found)
    metrics = [name for name in shown_metrics(found.frame, spec.metrics) if " perplexity (" in name]
    for metric, ((model, sparsity), groups) in itertools.product(metrics, _cells(found).items()):
        lines: dict[str, list[tuple[int, float, float, float]]] = {}
        level = None
        several, seen = len({group.key[2] for group in groups}) > 1, []
        for group in groups:
            if not (figures := _statistic(group, metric)):
                continue
            rows = [row for record in group.records for row in trainings(record, ["distil"])]
            rows = [row for row in rows if row.get("distinct_tokens")]
            if rows:
                seen.append((f"{group.key[2]}, " if several else "", rows[0], (rows[0]["tokens"], *figures)))
            elif not any(record.get("finish") for record in group.records) and not several:
                level = figures[0]
        again = {(name, _again(row)) for name, row, _ in seen if row.get("fresh_tokens") and _passes(row) > 1}
        for name, row, point in seen:
            if not row.get("fresh_tokens"):
                lines.setdefault(f"{name}the calibration windows again", []).append(point)
            elif _passes(row) == 1:
                lines.setdefault(f"{name}fresh text, every window once", []).append(point)
            if (name, _again(row)) in again:  # this line starts where the text was seen once
                lines.setdefault(f"{name}{_again(row)}", []).append(point)
        series = [{"label": label, "points": sorted(points)} for label, points in sorted(lines.items())]
        if max((len({point[0] for point in item["points"]}) for item in series), default=0) > 1:
            name = title(model, f"sparsity {sparsity}, {metric.partition(' (')[0]}")
            panels.append(name | {"what": metric, "unfinished": level, "series": series})
    labels = sorted({item["label"] for panel in panels for item in panel["series"]})
    for item in itertools.chain.from_iterable(panel["series"] for panel in panels):
        item["place"] = labels.index(item["label"])  # one legend serves all panels
    return panels


def _passes(row: Mapping) -> int:
    """How often a distillation saw its text; 1 where it ended before it had seen all."""
    return max(1, round(row["tokens"] / row["distinct_tokens"]))


def _again(row: Mapping) -> str:
    """The line of a distillation that sees fresh text more than once."""
    return f"the same {row.get('fresh_tokens') or 0:,} fresh tokens again".replace(",", "\N{NO-BREAK SPACE}")


def _draw_tokens(axis, panel: dict, handles: dict) -> None:
    """Bars are one standard deviation of the logarithms."""
    for item in panel["series"]:
        colour, marker = _KINDS[item["place"] % len(_KINDS)]
        handle = axis.errorbar(
            [point[0] for point in item["points"]],
            [point[1] for point in item["points"]],
            yerr=_bars([point[1:] for point in item["points"]]),
            color=colour, marker=marker, markersize=5, linewidth=1.2, capsize=2, elinewidth=1,
        )  # fmt: skip
        handles.setdefault(item["label"], handle[0])
    if panel["unfinished"]:
        handle = axis.axhline(panel["unfinished"], color="#555555", linewidth=1, linestyle=(0, (6, 3)))
        handles.setdefault("not finished", handle)
    axis.set(xlabel="tokens seen", ylabel="perplexity", xscale="log", yscale="log")


_TRACED = {"loss": "mean relative loss, unfitted", "change": "entries in and out / support"}


def _traces(found: Aggregate, spec: Spec) -> list[dict]:
    """Loss and change of the support by iteration, means over layers and seeds (`method.trace`)."""
    panels, title = [], _titles(found)
    for (model, sparsity), groups in _cells(found).items():
        for kind, what in _TRACED.items():
            series = []
            for look, members in _series(found, groups):
                rows = [row for record in members[0].records for row in record.get("layers") or []]
                traces = [row["stats"]["trace"] for row in rows if "trace" in (row.get("stats") or {})]
                if points := _mean_trace([list(map(float, trace[kind])) for trace in traces], kind == "loss"):
                    series.append(look | {"points": points})
            if series:
                panels.append(title(model, f"sparsity {sparsity}") | {"what": what, "series": series})
    return sorted(panels, key=lambda panel: list(_TRACED.values()).index(panel["what"]))


def _mean_trace(traces: Sequence[Sequence[float]], stays: bool) -> list[tuple[int, float]]:
    """Mean over layers at each iteration, from 1; one that has ended stays where it was, or changes no more."""
    traces = [trace for trace in traces if trace]

    def at(trace: Sequence[float], index: int) -> float:
        return trace[index] if index < len(trace) else trace[-1] * stays

    means = [mean_and_std([at(trace, i) for trace in traces])[0] for i in range(max(map(len, traces), default=0))]
    return [(number, value) for number, value in enumerate(means, 1) if value > 0]  # a logarithm is drawn


def _draw_traces(axis, panel: dict, handles: dict) -> None:
    for item in panel["series"]:
        colour, marker, style = _look(item)
        numbers, values = zip(*item["points"], strict=True)
        (handle,) = axis.plot(
            numbers, values, color=colour, linestyle=style, linewidth=1.4, marker=marker, markersize=4,
            markevery=max(1, len(numbers) // 8),
        )  # fmt: skip
        handles.setdefault(item["label"], handle)
    axis.set(xlabel="iteration", ylabel=panel["what"], yscale="log")


def _bars(figures: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Lengths of error bars, down and up, of (mean, low, high)."""
    return [[max(0.0, mean - low) for mean, low, _ in figures], [max(0.0, high - mean) for mean, _, high in figures]]


def _structure(found: Aggregate, spec: Spec) -> list[dict]:
    """Of tables with patterns of more kinds than anywhere and N:M: a panel for each model and method, of what each
    pattern loses and how many zeros it asks for."""
    panels, title = [], _titles(found)
    metrics = [name for name in shown_metrics(found.frame, None) if name.startswith("relative loss")][:1]
    for model, groups in _models(found).items() if metrics else ():
        for look, members in _series(found, groups):
            points = []
            for group in members:
                pattern, figures = written.read(group.key[1]), _statistic(group, metrics[0])
                if pattern is not None and figures:
                    points.append((pattern.kind, group.key[1], pattern.sparsity, *figures))
            if {point[0] for point in points} - {"unstructured", "nm"}:
                points.sort(key=lambda point: (written.order(point[1]), point[1]))
                panels.append(title(model, look["label"]) | {"loss": metrics[0], "points": points})
    return panels


def _draw_structure(axis, panel: dict, handles: dict) -> None:
    """A colour and a marker for each kind of pattern. Those with about as many zeros have their names beside them, from
    the smallest loss to the largest."""
    kinds = list(written.kinds())
    for kind in dict.fromkeys(point[0] for point in panel["points"]):
        place = kinds.index(kind) if kind in kinds else len(kinds)
        found = [point for point in panel["points"] if point[0] == kind]
        handle = axis.errorbar(
            [point[2] for point in found],
            [point[3] for point in found],
            yerr=_bars([point[3:] for point in found]),
            color=_KINDS[place % len(_KINDS)][0], marker=_KINDS[place % len(_KINDS)][1], linestyle="none",
            markersize=5, capsize=2, elinewidth=1,
        )  # fmt: skip
        handles.setdefault(kind, handle[0])
    stacks: list[list] = []
    for point in sorted(panel["points"], key=lambda point: point[2]):
        if not stacks or point[2] - stacks[-1][-1][2] > 0.03:
            stacks.append([])
        stacks[-1].append(point)
    for stack in stacks:
        right = max(point[2] for point in stack) + 0.02
        for rank, (_, text, zeros, loss, *_) in enumerate(sorted(stack, key=lambda point: point[3])):
            axis.annotate(
                text, (zeros, loss), (right, (rank + 0.5) / len(stack)), textcoords=axis.get_xaxis_transform(),
                va="center", fontsize=6, arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "0.6"},
            )  # fmt: skip
    axis.margins(x=0.15, y=0.12)
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.45 * (high - low))  # room for the names beside the last
    axis.set(xlabel="zeros", ylabel=panel["loss"].partition(" (")[0], yscale="log")


def _share_scales(axes: Sequence, panels: Sequence[Mapping]) -> None:
    """Give panels that show the same the same ends of their axes, where these are numbers, and logarithmic ones their
    ticks."""
    alike: dict[str, list] = {}
    for axis, panel in zip(axes, panels, strict=True):
        alike.setdefault(panel.get("what") or panel.get("cost") or "", []).append(axis)
    # Bars have names there; perplexities of a frontier lie too far apart between sparsities.
    free = any("bars" in panel or " perplexity (" in panel.get("loss", "") for panel in panels)
    for group in alike.values():
        for name in ("xaxis", "yaxis"):
            if free and name == "yaxis":
                continue
            ends = [getattr(axis, f"get_{name[0]}lim")() for axis in group]
            low, high = min(low for low, _ in ends), max(high for _, high in ends)
            if (
                len(group) > 1 and getattr(group[0], name).get_scale() == "log"
            ):  # room for markers, beyond a panel's own
                low, high = low / (high / low) ** 0.04, high * (high / low) ** 0.04
            for axis in group:
                axis.set(**{f"{name[0]}lim": (low, high)})
    for axis in axes:
        for line in (axis.xaxis, axis.yaxis):
            if line.get_scale() == "log":
                _log_ticks(line)


def _log_ticks(axis) -> None:
    """A label at each power of ten that is in view; where there are few of them, at other round numbers, too."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 4, 6), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 6:
            break
    axis.set_major_locator(FixedLocator(ticks) if len(ticks) > 1 else MaxNLocator(3))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _written(value)))
    axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
    axis.set_minor_formatter(NullFormatter())


def _written(value: float) -> str:
    """A number of an axis: plain below 10 000, from there on by powers of ten."""
    if value < 1e4:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    step = value / 10.0**power
    return f"$10^{{{power}}}$" if round(step, 6) == 1 else f"${step:g}\\cdot 10^{{{power}}}$"


def _look(item: Mapping) -> tuple:
    """Colour, marker and line style."""
    colour, marker, style = looks.look(item["method"])
    if item["variant"]:
        styles = looks.line_styles()
        colour = _shade(colour, item["variant"] - 1)
        marker = _VARIANTS[(item["variant"] - 1) % len(_VARIANTS)]
        style = styles[item["variant"] % len(styles)]
    return colour, marker, style


def _shade(colour: str, number: int) -> str:
    """A colour (#RRGGBB) mixed with white or black, by how many settings of its method come before."""
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    shades = _SHADES if sum(parts) > 240 else _SHADES_OF_DARK
    share = shades[number % len(shades)]
    return "#" + "".join(f"{round(part + abs(share) * ((255 if share > 0 else 0) - part)):02X}" for part in parts)


KINDS = {
    "perplexity": (_perplexity, _draw_perplexity),
    "losses": (_losses, _draw_losses),
    "seconds": (_seconds, _draw_seconds),
    "phases": (_phases, _draw_phases),
    "frontier": (_frontier, _draw_seconds),
    "drift": (_drift, _draw_drift),
    "allocation": (_allocation, _draw_allocation),
    "finishing": (_finishing, _draw_finishing),
    "tokens": (_tokens, _draw_tokens),
    "costs": (_costs, _draw_costs),
    "structure": (_structure, _draw_structure),
    "trace": (_traces, _draw_traces),
}
