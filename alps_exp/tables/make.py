"""Tables and plots from run records: `python -m alps_exp.tables`, or `make tables`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ..base.errors import UserError
from . import archive, plots, render
from .figures import Aggregate, aggregate
from .layout import Grid, NotMeasured, Spec, grid, spec_of

RUNS, KEPT, TABLES = archive.RUNS, archive.RECORDS, Path("results/tables")
COMPARISON = "comparison"


def make(runs: archive.RunSet, folder: Path, drawn: bool = True) -> list[Path]:
    """Write the tables and plots of one set of runs, and remove plots of it that are no longer made.

    Args:
        runs: their records.
        folder: where to.
        drawn: draw the plots; otherwise their files hold only the digest of what would be drawn.

    Returns:
        The files written.

    Raises:
        UserError: records that cannot be averaged, or a table node that does not fit them.
    """
    spec = spec_of(runs.name, runs.table)
    found = _aggregate(runs.records, runs.absent, spec)
    table, spec = _laid_out(found, spec)
    pictures = plots.draw(found, spec, folder, runs.name, drawn)
    for old in _files_of(runs.name, folder):
        if old.stem != runs.name and old not in pictures:
            old.unlink()
    return [*render.write(found, table, pictures, folder, runs.name), *pictures]


def report(
    records: Iterable[Mapping],
    name: str = "",
    missing: Iterable[str] | Mapping[str, str] = (),
    width: int | None = None,
    node: Mapping | None = None,
) -> str:
    """The table of a sweep for the terminal.

    Args:
        records: run records as plain values.
        name: the sweep's, for its table node; without one the default layout.
        missing: names of runs without a record; or with why, as `aggregate` takes them.
        width: columns to fill; by default the terminal's.
        node: the sweep's table node, where its file is not one of the package's.

    Returns:
        The table, or a line that says why there is none.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    try:
        spec = spec_of(name, node) if name else Spec()
        table, _ = _laid_out(_aggregate(records, missing, spec), spec)
        return render.plain(table, width)
    except UserError as error:
        return f"no table: {error}"


def _aggregate(records: Iterable[Mapping], missing: Iterable[str] | Mapping[str, str], spec: Spec) -> Aggregate:
    return aggregate(records, missing, spec.seconds, spec.published)


def _laid_out(found: Aggregate, spec: Spec) -> tuple[Grid, Spec]:
    """The table and its spec: without metrics, and with a note, where none of them was measured, as when the command
    line evaluates on other data than the sweep's file."""
    try:
        return grid(found, spec), spec
    except NotMeasured as error:
        spec = replace(spec, metrics=None)
        table = grid(found, spec)
        return replace(table, notes=[*table.notes, f"The table's {error}."]), spec


def sets_of(runs: Path, kept: Path | None) -> list[archive.RunSet]:
    """What tables are made of: a kept file, or each sweep below a folder and all of its own runs together."""
    if runs.name.endswith(archive.KEPT):
        return [archive.read_kept(runs)]
    sets = archive.read_all(runs, kept)
    own = archive.read_records(runs, COMPARISON)
    named = {run for found in sets for run in found.unreadable}
    for run in own.unreadable.keys() & named:
        del own.unreadable[run]
    return [*sets, own] if own.records or own.unreadable else sets


def _files_of(name: str, folder: Path) -> list[Path]:
    stems = {f"{name}.{suffix}" for suffix in render.FORMATS}
    stems |= {f"{name}-{plot}.{suffix}" for plot in plots.KINDS for suffix in plots.FORMATS}
    return [folder / stem for stem in sorted(stems) if (folder / stem).is_file()]


def check(kept: Path, tables: Path) -> list[str]:
    """Which committed tables are not what the committed records give.

    Markdown, csv and LaTeX are compared byte by byte; parquet by its content and plots by the digest of what they were
    drawn from, which they carry, since libraries of other versions write other bytes.

    Returns:
        A line per file that differs.
    """
    sets = archive.read_all(None, kept)
    if not sets:
        raise UserError(f"{kept} holds no records: there is nothing to check")
    known = {runs.name for runs in sets} | {COMPARISON}
    found = [f"{file} has no records in {kept}" for file in sorted(tables.glob("*.md")) if file.stem not in known]
    with tempfile.TemporaryDirectory() as folder:
        for runs in sets:
            found += runs.unreadable.values()
            if not runs.records:
                continue
            new = make(runs, Path(folder) / runs.name, drawn=False)
            names = {path.name for path in new}
            for path in new:
                there = tables / path.name
                if not there.is_file():
                    found.append(f"{there} is missing")
                elif not _same(path, there):
                    found.append(f"{there} does not match {runs.origin}")
            stale = [old for old in _files_of(runs.name, tables) if old.name not in names]
            found += [f"{old} is no longer made from {runs.origin}" for old in stale]
    return found


def _same(new: Path, old: Path) -> bool:
    if new.suffix == ".parquet":
        return pd.read_parquet(new).equals(pd.read_parquet(old))
    if new.suffix[1:] in plots.FORMATS:
        return plots.digest_of(new) == plots.digest_of(old)
    return new.read_bytes() == old.read_bytes()


def main(arguments: list[str] | None = None) -> int:
    """Make, check or keep, as the arguments say; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m alps_exp.tables", description="Tables and plots from run records.")
    parser.add_argument("runs", nargs="?", type=Path, help=f"folder of run records, or a {archive.KEPT} file")
    parser.add_argument("tables", nargs="?", type=Path, default=TABLES, help="folder to write to")
    parser.add_argument("--check", action="store_true", help="compare the committed tables with the committed records")
    parser.add_argument("--keep", metavar="NAME", help=f"write the sweep's records into {KEPT}/NAME{archive.KEPT}")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return _check(options.tables)
        if options.keep:
            return _keep(options.keep, options.runs or RUNS)
        return _make_all(options.runs, options.tables)
    except OSError as error:
        return _refuse(UserError(f"cannot read or write {error.filename} ({error.strerror}): name another folder"))
    except UserError as error:
        return _refuse(error)


def _make_all(runs: Path | None, tables: Path) -> int:
    sets = sets_of(runs or RUNS, KEPT if runs is None else None)
    if not sets:
        raise UserError(f"no records below {runs or RUNS}: run something first, such as make demo")
    status, kept = 0, {file.name for file in KEPT.glob(f"*{archive.KEPT}")}
    for found in sets:
        for line in found.unreadable.values():
            status = _refuse(UserError(line))
        if not found.records:
            continue
        try:
            paths = make(found, tables)
        except UserError as error:  # of one table; the others can be made
            status = _refuse(UserError(f"{found.name}: {error}"))
            continue
        instead = ""
        if f"{found.name}{archive.KEPT}" in kept and found.origin.endswith(archive.MANIFEST):
            instead = f", in place of {KEPT / found.name}{archive.KEPT}"
        print(f"{tables / found.name}: {len(paths)} files from {len(found.records)} records, {found.origin}{instead}")
    return status


def _check(tables: Path) -> int:
    differences = check(KEPT, tables)
    for line in differences:
        print(f"alps_exp: {line}: make tables", file=sys.stderr)
    if not differences:
        print(f"{tables} matches {KEPT}")
    return 1 if differences else 0


def _keep(name: str, runs: Path) -> int:
    path, sweep = archive.keep(name, runs, KEPT)
    missing = f"; {len(sweep.missing)} runs have none" if sweep.missing else ""
    print(f"{path}: {len(sweep.records)} records, {path.stat().st_size / 1e6:.2f} MB{missing}")
    return 0


def _refuse(error: UserError) -> int:
    print(f"alps_exp: {error}", file=sys.stderr)
    return 2
