"""A sweep: which runs the command line asks for, which are still to be made, and what is printed at the end.

The state of a sweep is the directories of its runs: a run with a complete record is skipped, an interrupted one
continues, and several processes may work on one sweep at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ..base.errors import UserError
from ..base.redaction import redacted
from ..checkpoints.location import check_there
from ..runs import early
from . import overrides
from .cell import Outcome, SweepJob, changes, complete_record, is_done, mark

if TYPE_CHECKING:
    from ..runs.settings import Settings


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        directory: where it writes to.
        words: its overrides, without those of Hydra's own keys.
        cfg: its configuration, without Hydra's node.
        settings: what that was resolved to.
    """

    directory: Path
    words: list[str]
    cfg: DictConfig
    settings: Settings


def cells(jobs: Sequence[Sequence[str]], config_name: str = "config") -> list[Cell]:
    """The runs of a sweep, all of them checked; of several that prune nothing and evaluate the same, the first.

    Args:
        jobs: the overrides of each run, from `overrides.expand`.
        config_name: the root file.

    Raises:
        UserError: the first mistake found, naming its run.
    """
    found, contents, settings = [], [], []
    # All are composed before the first is validated: names are wrong more often than values, and cost no import.
    for number, line in enumerate(jobs):
        with _naming_the_run(jobs, number):
            found.append(overrides.compose_prepared(list(line), config_name, with_hydra=True))
            contents.append(early.check(found[-1]))
            check_there(found[-1]["model"])
            _refuse_other_places(found[-1])
    if mistake := early.first_mistake(contents):
        with _naming_the_run(jobs, mistake[0]):
            raise UserError(mistake[1])
    from ..runs.settings import resolve  # imports torch, for which only what is composed need wait

    for number, cfg in enumerate(found):
        with _naming_the_run(jobs, number):
            settings.append(resolve(cfg))
            overrides.check_places(cfg)
    kept: dict[str, Cell] = {}
    for cfg, line, asked in zip(found, jobs, settings, strict=True):
        name = asked.configuration.name
        if name in kept and asked.prunes:
            raise UserError(
                f"{_shown(kept[name].words)} and {_shown(line)} are the same configuration: name every run once"
            )
        place = Path(str(cfg.hydra.sweep.dir)).absolute()
        if kept and place != next(iter(kept.values())).directory.parent:
            raise UserError(f"hydra.sweep.dir differs between runs ({place}): give a sweep one folder")
        own = [word for word in line if not word.lstrip("+~").startswith(("hydra.", "hydra/"))]
        kept.setdefault(name, Cell(place / name, own, overrides.without_hydra(cfg), asked))
    return list(kept.values())


def _refuse_other_places(cfg: DictConfig) -> None:
    """A sweep finds its runs by their names."""
    if cfg.resume not in ("auto", False):
        raise UserError(f"resume={cfg.resume} goes with one run: leave out -m")
    if cfg.hydra.sweep._get_node("subdir")._value() != "${run_name:}":
        raise UserError(
            "hydra.sweep.subdir is not allowed, since a sweep finds its runs by their names: give hydra.sweep.dir"
        )


def run(
    app: Any,
    config_name: str,
    given: Sequence[str],
    words: list[str],
    runs: Sequence[Cell],
    start: float,
    table: bool = True,
) -> list[Outcome]:
    """Run what is not complete, by the launcher that the words choose.

    Args:
        app: Hydra, set up.
        config_name: the root file.
        given: the overrides as the user gave them.
        words: the same, prepared.
        runs: from `cells`.
        start: of the sweep, seconds since the epoch.
        table: print the table at the end, and how the runs ended.

    Returns:
        The outcome of every run.

    Raises:
        UserError: other code has made some of the records, or the sweep's table node is not allowed; nothing was
            started.
        KeyboardInterrupt: with a line that says how far it came.
    """
    from .launchers import launch

    name = _sweep_name(words)
    _check_table(name, runs)
    before = {cell.directory.name: mark(cell.directory) for cell in runs}
    pending = _pending(runs)
    runs[0].directory.parent.mkdir(parents=True, exist_ok=True)
    if name is not None:
        _write_manifest(name, given, runs)
    print(f"{len(runs)} runs: {len(runs) - len(pending)} complete, {len(pending)} to run", flush=True)
    minutes = runs[0].cfg.minutes
    deadline = None if minutes is None else start + 60 * minutes
    outcomes = {cell.directory: Outcome(cell.directory.name, "completed", new=False) for cell in runs}
    try:
        if pending:
            job = SweepJob(start, os.getpid(), before, _expected(pending))
            ended = launch(app, config_name, words, job, pending, deadline)
            outcomes |= {cell.directory: outcome for cell, outcome in zip(pending, ended, strict=True)}
    except KeyboardInterrupt:
        done = sum(_complete(cell) is not None for cell in runs)
        raise KeyboardInterrupt(
            f"interrupted: {done} of {len(runs)} runs are complete, and the same command goes on"
        ) from None
    if table:
        _conclude(name, runs, list(outcomes.values()), time.time() - start)
    return list(outcomes.values())


def _expected(pending: Sequence[Cell]) -> dict[str, float]:
    """The work of each run by name, in the order of the runs."""
    from .plan import estimated_work

    return {cell.directory.name: estimated_work(cell.settings) for cell in pending}


def planned(runs: Sequence[Cell]) -> str:
    """What plan=true tells of a sweep."""
    from .plan import plan_of_all

    complete = [
        (record := _complete(cell)) is not None and is_done(record, cell.cfg, new=False, settings=cell.settings)
        for cell in runs
    ]
    names = [cell.directory.name for cell in runs]
    return plan_of_all(names, [cell.settings for cell in runs], complete, runs[0].directory.parent)


def _check_table(name: str | None, runs: Sequence[Cell]) -> None:
    """Raise UserError for a table node that could not be made after all the runs."""
    from ..tables.layout import spec_of

    spec_of(name or "", _table_node(runs))


def _pending(runs: Sequence[Cell]) -> list[Cell]:
    from ..runs.resume import tidy

    pending, others = [], []
    for cell in runs:
        record = _complete(cell)
        if record is None or not is_done(record, cell.cfg, new=False, settings=cell.settings):
            pending.append(cell)
            if record is not None and cell.cfg.complete == "auto":
                others.append((cell, changes(record, cell.settings)))
        else:
            tidy(cell.directory)
    if others:
        cell, changed = others[0]
        raise UserError(
            f"{len(others)} of {len(runs)} runs are complete, but what they were made of has changed, as for "
            f"{cell.directory.name} ({', '.join(changed)}): complete=skip takes them as they are, complete=renew runs "
            "them again, and complete=again all; none was started"
        )
    # The process of an earlier attempt may have died of the run that it was at: the others come first.
    return sorted(pending, key=lambda cell: _status(cell.directory) == "running")


def _complete(cell: Cell) -> dict | None:
    return complete_record(cell.directory, cell.settings.configuration.digest)


def _conclude(name: str | None, runs: Sequence[Cell], outcomes: Sequence[Outcome], seconds: float) -> None:
    """Print the table and how many runs ended how."""
    from ..tables import make

    found = {cell.directory.name: _record(cell.directory) for cell in runs}
    if records := [record for record in found.values() if record is not None]:
        missing = [run for run, record in found.items() if record is None]
        print(f"\n{redacted(make.report(records, name or '', missing, node=_table_node(runs)))}\n")
    count = {status: 0 for status in ("completed", "refused", "failed", "left")}
    for outcome in outcomes:
        count[outcome.status] += 1
    before = sum(outcome.status == "completed" and not outcome.new for outcome in outcomes)
    parts = [f"{before} complete before", f"{count['completed'] - before} run now"]
    if failed := count["refused"] + count["failed"]:
        parts.append(f"{failed} failed")
    if count["left"]:
        parts.append(f"{count['left']} left, where the same command goes on")
    print(f"{len(runs)} runs in {seconds:.0f} s: {', '.join(parts)}", flush=True)


def _record(directory: Path) -> dict | None:
    """The record of a run that has ended, with the run's name."""
    from ..runs.record import find

    record = find(directory) or {}
    return record | {"run": directory.name} if record.get("status") in ("complete", "failed") else None


def _status(directory: Path) -> str | None:
    from ..runs.record import find

    return (find(directory) or {}).get("status")


def _sweep_name(words: Sequence[str]) -> str | None:
    """The name of the sweep's file among the overrides; None without one."""
    for override in OverridesParser.create().parse_overrides(list(words)):
        if override.key_or_group == "sweeps":
            names = override.value() if isinstance(override.value(), list) else [override.value()]
            return str(names[0]) if len(names) == 1 else None
    return None


def _table_node(runs: Sequence[Cell]) -> dict | None:
    """The `table:` node of a user's sweep file; None for the package's own sweeps, whose files are read later."""
    node = runs[0].cfg.get("table")
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _write_manifest(name: str, given: Sequence[str], runs: Sequence[Cell]) -> None:
    """Write NAME.sweep.json beside the runs: which runs belong to the sweep."""
    from ..base.files import write_json

    content = {"sweep": name, "words": list(given), "runs": [cell.directory.name for cell in runs]}
    if (node := _table_node(runs)) is not None:
        content["table"] = node
    write_json(runs[0].directory.parent / f"{name}.sweep.json", content)


@contextmanager
def _naming_the_run(jobs: Sequence[Sequence[str]], number: int) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        place = f"run {number + 1} of {len(jobs)}: {_shown(jobs[number])}; none was started"
        raise UserError(f"{error} ({place})") from error


def _shown(line: Sequence[str]) -> str:
    return " ".join(word.replace("'", "") for word in line if not word.startswith("hydra")) or "no overrides"
