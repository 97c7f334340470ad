"""Comparison tables from run records: `python -m alps_exp.tables [RUNS] [TABLES]`, or `make tables`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from .errors import UserError
from .plots import losses_by_depth
from .record import FILE

_METHODS = ("dense", "magnitude", "wanda", "dsnot", "sparsegpt", "alps")


def read_records(folder: Path) -> list[dict]:
    """All records below a folder, in the order of their paths.

    Raises:
        UserError: a record that cannot be read.
    """
    records = []
    for path in sorted(folder.rglob(FILE)):
        if path.parent.name == "model":  # the copy that travels with a saved model
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable record ({error}): delete it or run it again") from None
        if not isinstance(record, dict) or not {"summary", "phases", "evaluations", "status"} <= set(record):
            raise UserError(f"{path} is no run record: move it elsewhere, or name another folder")
        records.append(record)
    return records


def comparison(records: Iterable[Mapping], every_metric: bool = False) -> pd.DataFrame:
    """One row per record: what ran, the sparsity reached, mean relative loss, perplexities, task scores and seconds.

    Perplexity columns name data set, windows and seqlen, since a perplexity without them means nothing; columns of
    what was evaluated in part say so, and a column "X ±" holds the standard errors of X. The seconds are those
    of calibration, solving and propagation; loading and evaluation are left out.

    Args:
        records: run records as plain values.
        every_metric: all metrics instead of each task's usual one.
    """
    rows = []
    for record in records:
        summary, phases = record["summary"], record["phases"]
        row = {
            "model": record["model"],
            "sparsity": record["sparsity"],
            "method": record["method"],
            "seed": record["seed"],
            "status": record["status"],
            "zeros": summary.get("sparsity"),
            "mean relative loss": summary.get("mean_relative_loss"),
        }
        if summary.get("mean_held_out_loss") is not None:
            row["held-out loss"] = summary["mean_held_out_loss"]
        for item in record["evaluations"]:
            if every_metric or item.get("shown", True):
                row[_column(item)] = float(item["value"])
                if item.get("stderr") is not None:
                    row[f"{_column(item)} ±"] = float(item["stderr"])
        spent = [phases.get(f"{phase}_seconds") for phase in ("calibrate", "solve", "propagate")]
        row["seconds"] = sum(value for value in spent if value is not None) if any(spent) else None
        rows.append(row)
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    known = {name: place for place, name in enumerate(_METHODS)}
    order = frame["method"].map(lambda name: known.get(name, len(known)))
    return (
        frame.assign(_order=order)
        .sort_values(["model", "sparsity", "_order", "method", "seed"], kind="stable")
        .drop(columns="_order")
        .reset_index(drop=True)
    )


def report(records: Iterable[Mapping]) -> str:
    """The comparison of complete runs as text for the terminal."""
    frame = comparison(record for record in records if record["status"] == "complete")
    return "no run is complete" if frame.empty else markdown(frame.drop(columns=["status"]))


def _column(item: Mapping) -> str:
    name = f"{item['dataset']} {item['metric']}"
    if "windows" in item:
        partial = f" of {item['total_windows']}" if item.get("partial") else ""
        return f"{name} ({item['windows']}{partial} × {item['seqlen']})"
    return f"{name} ({item['samples']} of {item['total_samples']})" if item["partial"] else name


def markdown(frame: pd.DataFrame) -> str:
    """The table as GitHub Markdown; what is missing shows as –."""
    return _as_text(frame).to_markdown(index=False, disable_numparse=True) + "\n"


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    def cell(column: str, value, error=None) -> str:
        if value is None or pd.isna(value):
            return "–"
        if error is not None and not pd.isna(error):
            return f"{value:.4f} ± {error:.2g}"
        if isinstance(value, float):
            return f"{value:.1f}" if column == "seconds" else f"{value:.4f}" if column == "zeros" else f"{value:.4g}"
        return str(value)

    shown = {}
    for column in frame:
        if not column.endswith(" ±"):
            errors = frame.get(f"{column} ±", [None] * len(frame))
            shown[column] = [cell(column, value, error) for value, error in zip(frame[column], errors, strict=True)]
    return pd.DataFrame(shown)


def write(frame: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write NAME.md, NAME.csv and NAME.tex; the same frame gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _as_text(frame)
    latex = text.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    contents = {
        "md": markdown(frame),
        "csv": frame.to_csv(index=False, lineterminator="\n"),
        "tex": latex.to_latex(hrules=True),
    }
    paths = []
    for suffix, content in contents.items():
        path = folder / f"{name}.{suffix}"
        path.write_text(content, encoding="utf-8")
        paths.append(path)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Read every record and write the comparison tables; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m alps_exp.tables", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="?", type=Path, default=Path("results/runs"), help="folder of run records")
    parser.add_argument("tables", nargs="?", type=Path, default=Path("results/tables"), help="folder to write to")
    parser.add_argument("--all-metrics", action="store_true", help="every metric of every task")
    parser.add_argument("--no-seconds", action="store_true", help="leave out times, as of runs that shared a device")
    options = parser.parse_args(arguments)
    try:
        records = read_records(options.runs)
        frame = comparison(records, options.all_metrics)
        frame = frame.drop(columns="seconds", errors="ignore") if options.no_seconds else frame
        if frame.empty:
            raise UserError(f"no {FILE} below {options.runs}: run something first, such as make demo")
        paths = write(frame, options.tables, "comparison") + losses_by_depth(records, options.tables)
    except UserError as error:
        print(f"alps_exp: {error}", file=sys.stderr)
        return 2
    print(markdown(frame))
    print("written: " + ", ".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
