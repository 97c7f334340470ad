"""Gives the runs of a sweep to Hydra's launcher and finds out how each ended, even if a worker process died."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from ..base.files import write_json
from ..pruning.store import HeldError, is_held, locked
from ..runs.record import FILE, find
from .cell import Outcome, SweepJob, describe_error, mark

_PATIENCE = 2.0  # seconds between two looks at runs that other processes hold


class Cell(Protocol):
    """A run to launch: its directory, which has the run's name, and its overrides without Hydra's own."""

    directory: Path
    words: list[str]


def launch(
    app: Any, config_name: str, words: list[str], job: SweepJob, cells: Sequence[Cell], deadline: float | None
) -> list[Outcome]:
    """Run cells with the launcher that `words` choose, and wait for those that other processes are running.

    Args:
        app: Hydra, set up.
        config_name: the root file.
        words: the sweep's overrides, prepared.
        job: what runs one cell.
        cells: the runs.
        deadline: when waiting ends, in seconds since the epoch.

    Raises:
        Exception: the launcher fails before any run has begun.
    """
    cfg = app.compose_config(config_name, words, run_mode=RunMode.MULTIRUN, with_log_configuration=True)
    callbacks = Callbacks(cfg)
    callbacks.on_multirun_start(config=cfg, config_name=config_name)
    try:
        context = HydraContext(config_loader=app.config_loader, callbacks=callbacks)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=job, config=cfg)
        begun = 0

        def start(some: Sequence[Cell]) -> list[Outcome]:
            nonlocal begun
            begun += len(some)
            returned = launcher.launch([cell.words for cell in some], initial_job_idx=begun - len(some))
            return [end.return_value for end in returned]

        here = str(cfg.hydra.launcher._target_).endswith(".BasicLauncher")
        size = cfg.hydra.sweeper.get("max_batch_size") or len(cells)
        outcomes: dict[str, Outcome] = {}
        for first in range(0, len(cells), size):
            batch = cells[first : first + size]
            found = start(batch) if here else _outlive(start, batch)
            outcomes |= {outcome.name: outcome for outcome in found}
        while held := [cell for cell in cells if outcomes[cell.directory.name].status == "held"]:
            free = _wait(held, deadline)
            if not free:
                outcomes |= {cell.directory.name: Outcome(cell.directory.name, "left") for cell in held}
                break
            found = start(free) if here else _outlive(start, free)
            outcomes |= {outcome.name: outcome for outcome in found}
    finally:
        callbacks.on_multirun_end(config=cfg, config_name=config_name)
    return [outcomes[cell.directory.name] for cell in cells]


def _wait(held: Sequence[Cell], deadline: float | None) -> list[Cell]:
    """Wait until other processes have released some of the cells, and return these; none when the time is up."""
    told = False
    while not (free := [cell for cell in held if not is_held(cell.directory)]):
        if deadline is not None and time.time() > deadline:
            break
        if not told:
            print(f"waiting for another process: {held[0].directory.name}, {len(held)} in all", flush=True)
            told = True
        time.sleep(_PATIENCE)
    return free


def _outlive(start: Callable[[Sequence[Cell]], list[Outcome]], cells: Sequence[Cell]) -> list[Outcome]:
    """Run cells in workers that may die. Most launchers then abandon the remaining cells; here they are started again.

    Runs that were cut off are repeated one at a time, so that a run that kills its worker costs no other run.
    """
    outcomes, alone, rest = [], [], list(cells)
    while rest:
        before = [mark(cell.directory) for cell in rest]
        try:
            outcomes += start(rest)
            break
        except Exception:
            states = [(cell, _state(cell, old)) for cell, old in zip(rest, before, strict=True)]
            if not any(state for _, state in states):
                if len(rest) == len(cells):
                    raise  # it is the launcher that fails
                alone += rest
                break
            outcomes += [state for _, state in states if isinstance(state, Outcome)]
            alone += [cell for cell, state in states if state == "cut"]
            rest = [cell for cell, state in states if state is None]
    for cell in alone:
        old = mark(cell.directory)
        try:
            outcomes += start([cell])
        except Exception as error:
            state = _state(cell, old)
            outcomes.append(state if isinstance(state, Outcome) else _dead(cell, error))
    return outcomes


def _state(cell: Cell, before: tuple | None) -> Outcome | str | None:
    """How a cell ended whose launcher failed: None if it was not begun, "cut" if its process is gone.

    Args:
        cell: the run.
        before: `mark` of its record when it was given to the launcher.
    """
    name = cell.directory.name
    if is_held(cell.directory):
        return Outcome(name, "held")
    record = find(cell.directory)
    if record is None or mark(cell.directory) == before:
        return None
    if record["status"] == "complete":
        return Outcome(name, "completed")
    if record["status"] == "running":
        return "cut"
    error = record.get("error") or {}
    refused = error.get("type") == "UserError"
    reason = error.get("message", "") if refused else f"{error.get('type')}: {error.get('message')}"
    return Outcome(name, "refused" if refused else "failed", reason)


def _dead(cell: Cell, error: Exception) -> Outcome:
    """The outcome of a run whose process ended without reporting; its record is marked as failed."""
    reason = describe_error(error)
    with suppress(OSError, HeldError), locked(cell.directory):
        record = find(cell.directory)
        if record is not None and record["status"] == "running":
            kind, _, message = reason.partition(": ")
            write_json(
                cell.directory / FILE, {**record, "status": "failed", "error": {"type": kind, "message": message}}
            )
    return Outcome(cell.directory.name, "failed", f"its process ended ({reason})")
