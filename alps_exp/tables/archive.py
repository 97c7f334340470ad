"""Records of many runs: below a folder, of a sweep, or kept in one file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..base.errors import UserError
from ..base.files import read_json, replacing
from ..base.redaction import without_paths
from ..runs import record
from ..runs.record import FILE

RUNS, RECORDS = Path("results/runs"), Path("results/records")
MANIFEST = ".sweep.json"
KEPT = ".jsonl.gz"
MISSING = "missing"


@dataclass(frozen=True)
class RunSet:
    """The runs that one table is made from.

    Attributes:
        name: the sweep's; the table's files carry it.
        records: run records as plain values, each with the name of its directory as `run`.
        missing: names of runs of the sweep that have no record.
        origin: what was read.
        table: the sweep's table node, where its file is not one of the package's.
        unreadable: runs whose record cannot be read, and why, in one line that names the file.
    """

    name: str
    records: list[dict]
    missing: list[str]
    origin: str
    table: dict | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def absent(self) -> dict[str, str]:
        """Runs of which nothing is known, and why: "missing" or "unreadable"."""
        return dict.fromkeys(self.missing, MISSING) | dict.fromkeys(self.unreadable, "unreadable")


def read_records(folder: Path, name: str = "") -> RunSet:
    """All records below a folder, in the order of their paths."""
    # The copy in model/ goes with a saved model.
    files = [file for file in sorted(folder.rglob(FILE)) if file.parent.name != "model"]
    records, unreadable = _read(files)
    return RunSet(name, records, [], str(folder), unreadable=unreadable)


def read_kept(path: Path) -> RunSet:
    """What `write_kept` wrote.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        rows = [json.loads(line) for line in lines if line]
        missing = [row["run"] for row in rows if row["status"] == MISSING]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise UserError(f"{path} is not a readable file of records ({error}): fetch or keep it again") from None
    found = [(number, row) for number, row in enumerate(rows, 1) if row["status"] != MISSING]
    records = [record.checked(row, f"{path}, line {number}") for number, row in found]
    return RunSet(path.name.removesuffix(KEPT), records, missing, str(path))


def read_sweep(manifest: Path) -> RunSet:
    """The records of the grid that a sweep was last asked for; its runs lie beside the manifest.

    Raises:
        UserError: a manifest that cannot be read.
    """
    try:
        content = read_json(manifest)
        runs = [str(run) for run in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is no readable list of a sweep's runs ({error}): start the sweep again") from None
    files = {run: manifest.parent / run / FILE for run in runs}
    records, unreadable = _read(file for file in files.values() if file.is_file())
    missing = [run for run, file in files.items() if not file.is_file()]
    name, table = manifest.name.removesuffix(MANIFEST), content.get("table")
    return RunSet(name, records, missing, str(manifest), table, unreadable)


def read_all(runs: Path | None, kept: Path | None) -> list[RunSet]:
    """One set per sweep, by name: the user's own runs, else the kept records of that name.

    Args:
        runs: folder of runs and manifests; may be absent. None: only kept records.
        kept: folder of kept records, None: only own runs.

    Returns:
        What could be read; what could not is named in the sets' `unreadable`.
    """
    found = {}
    if kept is not None:
        for file in sorted(kept.glob(f"*{KEPT}")):
            name = file.name.removesuffix(KEPT)
            found[name] = _or_why(read_kept, file, name)
    for manifest in sorted(runs.glob(f"*{MANIFEST}")) if runs is not None else ():
        sweep = _or_why(read_sweep, manifest, manifest.name.removesuffix(MANIFEST))
        if sweep.records:
            found[sweep.name] = sweep
        elif sweep.unreadable:  # kept ones serve still
            found.setdefault(sweep.name, sweep).unreadable.update(sweep.unreadable)
    return [found[name] for name in sorted(found)]


def _or_why(read: Callable[[Path], RunSet], file: Path, name: str) -> RunSet:
    """What is read from a file; an empty set that says why where it cannot be, so that the others go on."""
    try:
        return read(file)
    except UserError as error:
        return RunSet(name, [], [], str(file), unreadable={file.name: str(error)})


def keep(name: str, runs: Path, kept: Path) -> tuple[Path, RunSet]:
    """Write a sweep's records into one file, without what only this machine's paths say.

    The same records give the same bytes.

    Returns:
        The file, and what was kept.

    Raises:
        UserError: no such sweep among the runs, none of its runs has a record, or one has a record that cannot be read.
    """
    manifest = runs / f"{name}{MANIFEST}"
    if not manifest.is_file():
        raise UserError(f"{manifest} does not exist: run the sweep first, python -m alps_exp -m +sweeps={name}")
    sweep = read_sweep(manifest)
    if sweep.unreadable:
        raise UserError(next(iter(sweep.unreadable.values())))
    if not sweep.records:
        raise UserError(f"none of the {len(sweep.missing)} runs in {manifest} has a record: run the sweep first")
    path = kept / f"{name}{KEPT}"
    write_kept(sweep.records, path, sweep.missing)
    return path, sweep


def write_kept(records: Iterable[dict], path: Path, missing: Iterable[str] = ()) -> None:
    """Write records into one file, a line of JSON each, and a line for each run without a record."""
    rows = [without_paths(row) for row in records] + [{"status": MISSING, "run": run} for run in missing]
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def _read(files: Iterable[Path]) -> tuple[list[dict], dict[str, str]]:
    """The records with their runs' names; of files that hold none, the run and why."""
    records, unreadable = [], {}
    for file in files:
        try:
            records.append(record.load(file) | {"run": file.parent.name})
        except UserError as error:
            unreadable[file.parent.name] = str(error)
    return records, unreadable
