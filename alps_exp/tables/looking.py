"""alps-exp list, show and diff: runs in the terminal, from their records."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from ..base.errors import UserError, nearest
from ..runs.record import FILE, load
from . import archive, figures
from .layout import number

RUNS = Path("results/runs")

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN_LAYERS = 10
_FACTS = ("status", "model", "method", "sparsity", "seed")


def main(words: Sequence[str]) -> int:
    """Do what the words after `alps-exp` ask; returns the exit status, 2 for no such run or a key that no run has."""
    # argparse would take `--sort -COLUMN` for two options.
    line = "\n".join(words).replace("--sort\n-", "--sort=-")
    options = _parser().parse_args(line.split("\n"))
    try:
        _do(options)
    except UserError as error:
        print(f"alps_exp: {error}", file=sys.stderr)
        return 2
    return 0


def _do(options: argparse.Namespace) -> None:
    if options.command == "list":
        found = _chosen(options.runs, options.filters)
        rows = _sorted([_facts(record) for record in found], options.sort)
        print(json.dumps(rows, indent=2, ensure_ascii=False) if options.json else _table(rows) or "no runs")
    elif options.command == "show":
        print(_shown(_run(options.run, options.runs), options.json))
    else:
        print(_difference(*(_run(run, options.runs) for run in (options.run, options.other)), options.json))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alps-exp", description="Runs, from their records.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="runs with what they measured, a line each")
    listing.add_argument(
        "filters", nargs="*", metavar="KEY=GLOB", help="method=alps status=failed target.name=stream …"
    )
    listing.add_argument("--sort", metavar="COLUMN", help="a column's name or the beginning of it; -COLUMN: downwards")
    showing = commands.add_parser("show", help="one run: its layers, worst first, its phases and warnings")
    differing = commands.add_parser("diff", help="two runs side by side: what differs in configuration and figures")
    for command in (showing, differing):
        command.add_argument("run", metavar="RUN", help="folder or name of a run, or the beginning of it")
    differing.add_argument("other", metavar="RUN")
    for command in (listing, showing, differing):
        command.add_argument("--runs", type=Path, default=RUNS, help=f"folder of runs ({RUNS})")
        command.add_argument("--json", action="store_true", help="for scripts")
    return parser


def _chosen(runs: Path, filters: Iterable[str]) -> list[Mapping]:
    found = archive.read_records(runs)
    for line in found.unreadable.values():
        print(f"left out: {line}", file=sys.stderr)
    records = found.records
    for word in filters:
        key, equals, glob = word.partition("=")
        if not equals:
            raise UserError(f"{word} is no filter: give KEY=GLOB, such as method=alps or target.name=stream")
        known = {name for record in found.records for name in _keys(record)}
        if found.records and key not in known:
            raise UserError(f"no run below {runs} has a key {key!r}; {_near(key, known)}")
        records = [record for record in records if fnmatchcase(_keys(record).get(key, ""), glob)]
    return records


def _keys(record: Mapping) -> dict[str, str]:
    """What a run can be found by: its facts, and the leaves of its configuration."""
    return figures.leaves(record.get("config") or {}) | {key: str(record[key]) for key in _FACTS}


def _facts(record: Mapping) -> dict:
    """A run's line in a list."""
    measures = {name: measure.value for name, measure in figures.measures(record).items() if measure.shown}
    choices = (
        figures.settings_of(record).get(f"{group}.name", "none") for group in ("target", "sensitivity", "finish")
    )
    said = " ".join(choice for choice in choices if choice not in ("none", "layer"))
    facts = {"run": record["run"], **{key: record[key] for key in _FACTS}, "choices": said}
    return {key: value for key, value in facts.items() if value != ""} | measures


def _sorted(rows: list[dict], column: str | None) -> list[dict]:
    if column is None or not rows:
        return rows
    name, down = column.lstrip("-"), column.startswith("-")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    matching = [key for key in columns if key == name] or [key for key in columns if key.startswith(name)]
    if not matching:
        raise UserError(f"--sort {column}: no such column; {nearest(name, columns)}")
    there = [row for row in rows if matching[0] in row]
    there.sort(key=lambda row: _order(row[matching[0]]), reverse=down)
    return there + [row for row in rows if matching[0] not in row]


def _order(value) -> tuple:
    return (0, value, []) if isinstance(value, (int, float)) else (1, 0, figures.natural(str(value)))


def _table(rows: Sequence[Mapping]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns] + [[_text(row.get(column), column) for column in columns] for row in rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _text(value, column: str) -> str:
    if value is None:
        return ""
    return number(value, column) if isinstance(value, float) else str(value)


def _run(name: str, runs: Path) -> dict:
    """The record of a run given by its folder, its name, or the beginning of one run's name."""
    for folder in (Path(name), runs / name):
        if (folder / FILE).is_file():
            return load(folder / FILE) | {"run": folder.resolve().name}
    names = sorted(file.parent.name for file in runs.glob(f"*/{FILE}"))
    matching = [known for known in names if known.startswith(name)]
    if len(matching) != 1:
        what = f"{len(matching)} begin so" if matching else _near(name, names)
        raise UserError(f"there is no one run {name!r} below {runs}; {what} (alps-exp list shows all)")
    return load(runs / matching[0] / FILE) | {"run": matching[0]}


def _near(given: str, known: Iterable[str]) -> str:
    """The likely meant, of which there may be hundreds."""
    known = sorted(known)
    if not known:
        return "there are none"
    if close := get_close_matches(given, known, 3, 0.5):
        return nearest(given, close)
    return f"known: {', '.join(known[:5])}" + (f" and {len(known) - 5} more" if len(known) > 5 else "")


def _shown(record: Mapping, as_json: bool) -> str:
    layers = [row for row in record.get("layers") or [] if row.get("relative_loss") is not None]
    worst = sorted(layers, key=lambda row: -row["relative_loss"])[:_SHOWN_LAYERS]
    about = {
        **_facts(record),
        **_trained(record),
        "started": record.get("started"),
        "device": (record.get("environment") or {}).get("device"),
        "seconds by phase": {key.removesuffix("_seconds"): value for key, value in _phases(record).items()},
        "warnings": record.get("warnings") or [],
        "error": record.get("error"),
        "loss by block": _by_block(record),
        "worst layers": [
            {key: row.get(key) for key in ("name", "sparsity", "relative_loss", "status")} for row in worst
        ],
    }
    if as_json:
        return json.dumps(about, indent=2, ensure_ascii=False)
    depth, worst, phases = (about.pop(key) for key in ("loss by block", "worst layers", "seconds by phase"))
    warnings, error = about.pop("warnings"), about.pop("error")
    width = max(map(len, (*about, "seconds by phase")))
    lines = [f"{key:<{width}}  {_text(value, key)}" for key, value in about.items() if value is not None]
    if phases:
        text = ", ".join(f"{key} {value:.1f}" for key, value in phases.items())
        lines.append(f"{'seconds by phase':<{width}}  {text}")
    if depth:
        lines += ["", f"relative loss by block, {min(depth):.3g} to {max(depth):.3g}", picture(depth)]
    if worst:
        lines += ["", "worst layers", _table(worst)]
    lines += ["", *(f"warning: {line}" for line in warnings)] if warnings else []
    lines += ["", f"error: {error.get('message', error)}"] if error else []
    return "\n".join(lines)


def _trained(record: Mapping) -> dict[str, str]:
    """What following gradients brought on held-out windows: of the blocks, on average, and of the model."""
    told = {}
    stages = {
        "blocks finished": ("error", figures.trainings(record, ("blocks",))),
        "distilled": ("divergence", figures.trainings(record, ("distil",))),
        "trained": ("loss", [record["training"]] if record.get("training") else []),
    }
    for stage, (what, rows) in stages.items():
        pairs = [(row.get("before"), row.get("after")) for row in rows]
        if pairs and not any(None in pair for pair in pairs):
            before, after = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
            steps = sum(row.get("steps", 0) for row in rows)
            told[stage] = f"{what} on held-out windows {before:.4g} → {after:.4g} in {steps} steps"
    return told


def _difference(one: Mapping, other: Mapping, as_json: bool) -> str:
    runs = (one["run"], other["run"])
    keys = [_keys(record) for record in (one, other)]
    settings = {
        key: [found.get(key) for found in keys]
        for key in sorted(keys[0].keys() | keys[1].keys())
        if keys[0].get(key) != keys[1].get(key) and "._" not in key
    }
    measured = [figures.measures(record) for record in (one, other)]
    metrics = {
        name: [found[name].value if name in found else None for found in measured]
        for name in dict.fromkeys([*measured[0], *measured[1]])
    }
    phases = [_phases(record) for record in (one, other)]
    seconds = {key: [found.get(key) for found in phases] for key in dict.fromkeys([*phases[0], *phases[1]])}
    depth = [_by_block(record) for record in (one, other)]
    if as_json:
        parts = {
            "runs": runs,
            "configuration": settings,
            "metrics": metrics,
            "seconds": seconds,
            "loss by block": depth,
        }
        return json.dumps(parts, indent=2, ensure_ascii=False)
    lines = [f"1  {runs[0]}", f"2  {runs[1]}", ""]
    rows = [{"": key, "1": pair[0], "2": pair[1]} for key, pair in settings.items()]
    lines += [_table(rows) if rows else "the configurations are equal", ""]
    rows = [_compared(key, pair) for key, pair in metrics.items()]
    rows += [_compared(key.replace("_", " "), pair) for key, pair in seconds.items()]
    lines += [_table(rows)]
    if all(depth) and len(depth[0]) == len(depth[1]):
        ratios = [b / a if a else math.inf for a, b in zip(*depth, strict=True)]
        finite = [ratio for ratio in ratios if math.isfinite(ratio)] or [1.0]
        lines += ["", f"relative loss by block, 2 over 1: {min(finite):.3g} to {max(finite):.3g}", picture(ratios)]
    return "\n".join(lines)


def _compared(name: str, pair: Sequence[float | None]) -> dict:
    row = {"": name, "1": _text(pair[0], name), "2": _text(pair[1], name)}
    return row | ({"2 / 1": f"{pair[1] / pair[0]:.3f}"} if pair[0] and pair[1] is not None else {})


def _phases(record: Mapping) -> dict[str, float]:
    return {key: value for key, value in record["phases"].items() if key.endswith("_seconds") and value}


def _by_block(record: Mapping) -> list[float]:
    """Mean relative loss of each block's layers, in order."""
    return [loss for _, loss in figures.by_block(record)]


def picture(values: Sequence[float]) -> str:
    """A bar for each value, as high as it is between the smallest and the largest; wider than the terminal, means."""
    width = shutil.get_terminal_size((100, 24)).columns
    step = -(-len(values) // width)
    parts = [values[begin : begin + step] for begin in range(0, len(values), step)]
    means = [sum(part) / len(part) for part in parts]
    finite = [value for value in means if math.isfinite(value)] or [0.0]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    places = [
        min(int((value - low) / span * len(_BARS)), len(_BARS) - 1) if math.isfinite(value) else -1 for value in means
    ]
    return "".join(_BARS[place] for place in places)
