"""Whether a run can go on where an earlier attempt ended: the same configuration, code, versions, weights and texts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from ..base.errors import UserError
from ..base.files import leftovers, remove
from ..pruning.store import FOLDER, HeldError, ProgressStore, locked
from .naming import NOT_HASHED, Configuration
from .record import FILE, find, load, set_aside

PREVIOUS = "record.previous.json"


def check(configuration: Configuration, resume: str | bool, resumable: bool, place: Path | None = None) -> None:
    """Look at the keys `resume` and `resumable`; of a directory to go on in, compare the configuration.

    Args:
        configuration: the run's.
        resume, resumable: its keys.
        place: the directory that the run was given, where it is known.

    Raises:
        UserError: a value that is not allowed, no run there, one that is complete, or one of another configuration.
    """
    if resume in ("auto", False):
        return
    if not isinstance(resume, str):
        raise UserError(f"resume={resume} is not allowed: give auto, false, or the directory of a run")
    if not resumable:
        raise UserError(f"resume={resume} needs resumable=true")
    directory = Path(resume).expanduser()
    if place is not None and place.resolve() != directory.resolve():
        raise UserError(f"resume={directory} is not where this run goes ({place}): leave out -m and hydra.run.dir")
    if not (directory / FILE).is_file():
        raise UserError(f"resume={directory} holds no run ({FILE}): give the directory of an interrupted run")
    record = load(directory / FILE)
    if record["status"] == "complete":
        raise UserError(f"resume={directory} holds a complete run: there is nothing to go on with")
    if different := _differences(record, configuration):
        raise UserError(f"resume={directory} is a run of another configuration: {different}; leave out resume=")


def refuse_other(directory: Path, configuration: Configuration) -> None:
    """Raise UserError if a directory holds something of a run of another configuration: it would be lost."""
    record = find(directory)
    if record is not None and _holds(directory, record) and (different := _differences(record, configuration)):
        raise UserError(
            f"{directory} holds a run of another configuration ({record['status']}; {different}), which would be lost: "
            "give another directory with hydra.run.dir=DIR, or move that one elsewhere"
        )


def _holds(directory: Path, record: Mapping) -> bool:
    """Whether a run has left more than the word that it was begun: a result, a model, or finished blocks."""
    results = record["status"] == "complete" or record["layers"] or record["evaluations"]
    places = [directory / "model", directory / PREVIOUS, *(directory / FOLDER).glob("block-*.json")]
    return bool(results) or any(place.exists() for place in places)


def _differences(record: Mapping, configuration: Configuration) -> str:
    """In what a record's configuration differs from another, in words; "" where both are the same run."""
    try:
        if configuration.digest == record["config_hash"]:
            return ""
        recorded = Configuration.of(record["config"])
        if configuration.digest == recorded.digest:
            return ""
        earlier = recorded.content
    except (KeyError, TypeError, AttributeError, UserError):  # of another version, or edited
        earlier = record["config"]
    earlier, now = _flat(earlier), _flat(configuration.content)
    different = [key for key in sorted(earlier.keys() | now.keys()) if earlier.get(key) != now.get(key)]
    shown = ", ".join(f"{key} {earlier.get(key)} → {now.get(key)}" for key in different[:4])
    return shown + (f" and {len(different) - 4} more" if len(different) > 4 else "")


def _flat(content: Mapping, prefix: str = "") -> dict[str, str]:
    """Dotted key → value as JSON, without the keys that change no result."""
    flat = {}
    for key, value in content.items():
        if (not prefix and key in NOT_HASHED) or str(key).startswith("_"):
            continue
        if isinstance(value, Mapping) and value and f"{prefix}{key}" != "layers.sparsity":  # whose order counts
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str)
    return flat


def prepare(directory: Path, resume: str | bool) -> None:
    """Remove what a killed attempt left half-written; what it had finished too, where the run starts again.

    An earlier complete record is kept as record.previous.json, and the run is a fresh one then. A record that cannot be
    read is kept aside, and the run goes on as if there was none.
    """
    if (aside := set_aside(directory)) is not None:
        print(f"alps_exp: warning: {directory / FILE} is no record that can be read: kept as {aside}", file=sys.stderr)
    for left in (*leftovers(directory, "model"), *leftovers(directory, FILE), *directory.glob(".team-*")):
        remove(left)
    complete = (find(directory) or {}).get("status") == "complete"
    if complete or resume is False:
        shutil.rmtree(directory / FOLDER, ignore_errors=True)
    if complete:
        (directory / FILE).replace(directory / PREVIOUS)


def tidy(directory: Path) -> None:
    """Remove the finished blocks of a complete run that was killed right after its last word."""
    with suppress(FileNotFoundError, HeldError):
        if (directory / FOLDER).is_dir():
            with locked(directory):
                shutil.rmtree(directory / FOLDER, ignore_errors=True)


def open_store(directory: Path, same: Mapping[str, str], keep_threads: bool = False) -> ProgressStore:
    """The finished blocks of a run in its directory.

    Args:
        directory: the run's.
        same: what `provenance.identity` gives.
        keep_threads: go on with as many threads as the finished blocks had, on which last digits depend.

    Raises:
        UserError: an earlier attempt has finished blocks there, and something that decides the weights has changed.
    """
    store = ProgressStore(directory, same)
    if (different := store.differences()) and store.unfinished():
        raise UserError(
            f"{directory} holds {store.unfinished()} finished blocks of an interrupted run with other "
            f"{', '.join(different)}: go back to that, or start again with resume=false"
        )
    if different:
        store.clear()
    elif keep_threads and store.unfinished() and (count := store.earlier_threads()):
        torch.set_num_threads(count)
    store.open()
    return store
