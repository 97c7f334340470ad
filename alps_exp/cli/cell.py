"""One run as Hydra's launchers start it: alone, or as a cell of a sweep, perhaps in another process.

Jobs hand back how they ended instead of raising, because an exception in one job would end Hydra's whole sweep.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ..base.clock import duration
from ..base.errors import UserError
from ..base.redaction import redacted
from ..base.terminal import settle
from ..runs import naming

if TYPE_CHECKING:
    from ..runs.settings import Settings

# What this process has run for a sweep, by the sweep's start: name → seconds.
_took: dict[float, dict[str, float]] = {}


@dataclass(frozen=True)
class Outcome:
    """How one job ended.

    Attributes:
        name: the run's directory name.
        status: "completed", "refused" (the user's mistake), "failed", "held" (another process is at it) or "left" (it
            would take too long).
        message: why, where it did not complete.
        new: whether it was run, rather than found complete.
    """

    name: str
    status: Literal["completed", "refused", "failed", "held", "left"]
    message: str = ""
    new: bool = True


def single(cfg: DictConfig, settings: Settings | None = None) -> Outcome:
    """One run, in the directory that Hydra made for it.

    Args:
        cfg: its configuration.
        settings: what that was resolved to, where this process has done so.
    """
    from ..runs import run

    asked = settings or cfg
    return _guarded(lambda directory: run.run(asked, directory, finished=lambda directory: _note(cfg, directory)))


def _note(cfg: DictConfig, directory: Path) -> None:
    """The files that Hydra writes (hydra.output_subdir), but not before the run's directory is known to be its own."""
    hydra = HydraConfig.instance().cfg
    nodes = {"config": cfg, "hydra": hydra, "overrides": hydra.hydra.overrides.task}
    (directory / ".hydra").mkdir(exist_ok=True)
    for name, node in nodes.items():
        (directory / ".hydra" / f"{name}.yaml").write_text(redacted(OmegaConf.to_yaml(node)), encoding="utf-8")


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep, with the model and texts that the process has loaded for earlier ones.

    Attributes:
        start: of the sweep, seconds since the epoch.
        process: id of the process that the sweep was started as.
        before: run's name → `mark` of its record when the sweep was started.
        expected: name of each run that is to be made → its work, in any unit: the time left goes by it.
    """

    start: float
    process: int
    before: Mapping[str, tuple | None]
    expected: Mapping[str, float]

    def __call__(self, cfg: DictConfig) -> Outcome:
        from ..base import gpus
        from ..runs import run
        from ..runs.workspace import shared

        settle()  # the process may be a worker's
        took = _took.setdefault(self.start, {})
        begin = time.time()
        if cfg.minutes is not None and begin + max(took.values(), default=0.0) > self.start + 60 * cfg.minutes:
            return Outcome(_directory().name, "left")
        if os.getpid() != self.process and cfg.devices == 1 and cfg.device in ("auto", "cuda"):
            gpus.claim()
        digest, found = naming.config_hash(cfg), []
        print(self._announcement(_directory().name, took), flush=True)

        def finished(directory: Path) -> dict | None:
            record = complete_record(directory, digest)
            new = mark(directory) != self.before.get(directory.name)
            found.append(record is not None and is_done(record, cfg, new))
            return record if found[-1] else _note(cfg, directory)

        def attempt(directory: Path) -> None:
            record = run.run(cfg, directory, shared(), finished)
            if not found[-1]:
                print(f"complete in {time.time() - begin:.1f} s: {directory.name}{_figures(record)}", flush=True)

        outcome = _guarded(attempt)
        gc.collect()  # the network of a run refers to itself
        if outcome.status == "completed" and found[-1]:
            return Outcome(outcome.name, "completed", new=False)
        if outcome.status in ("refused", "failed"):
            print(redacted(f"{outcome.status}: {outcome.name}: {outcome.message.splitlines()[0]}"), flush=True)
        if outcome.status == "completed" and outcome.name in self.expected:
            took[outcome.name] = time.time() - begin
        return outcome

    def _announcement(self, name: str, took: Mapping[str, float]) -> str:
        """Which run of how many begins, and the time left, where one process makes all of them."""
        place = list(self.expected).index(name) + 1 if name in self.expected else 1
        line = f"run {place} of {len(self.expected)}: {name}"
        if os.getpid() != self.process or not took or name not in self.expected:
            return line
        made = [(self.expected[other], seconds) for other, seconds in took.items()]
        works = list(self.expected.values())[place - 1 :]
        own, left = (_told(forecast(made, part)) for part in (works[:1], works))
        if left is not None:
            return f"{line}, {own}; {left.removeprefix('about ')} left of the sweep"
        return f"{line}, {own}; time left of the sweep unknown yet" if own else f"{line}; time left unknown yet"


def _told(found: tuple[list[float], bool] | None) -> str | None:
    return f"{'at most' if found[1] else 'about'} {duration(sum(found[0]))}" if found is not None else None


def forecast(made: Sequence[tuple[float, float]], works: Sequence[float]) -> tuple[list[float], bool] | None:
    """Seconds of runs, by the straight line through those of others: all read, load and evaluate, whatever they prune.

    Args:
        made: work, in any unit, and seconds of each run that was made, in this order.
        works: of the runs to come.

    Returns:
        Seconds of each, and whether they are bounds: runs of less work than any that was made take at most as long.
        None where one is of more than twice the work, of which nothing is known.
    """
    made = made[1:] if len(made) > 2 else made  # the first has loaded the model and the texts for all
    lowest, highest = min(made)[0], max(made)[0]
    if max(works) > 2 * highest:
        return None
    if highest <= 2 * lowest:
        mean = sum(seconds for _, seconds in made) / len(made)
        return [mean] * len(works), min(works) < lowest / 2
    at, mean = (sum(values) / len(made) for values in zip(*made, strict=True))
    slope = sum((work - at) * seconds for work, seconds in made) / sum((work - at) ** 2 for work, _ in made)
    slope = min(max(slope, 0.0), mean / at)
    return [mean + slope * (work - at) for work in works], False


def complete_record(directory: Path, digest: str) -> dict | None:
    """The complete record in a directory, of the configuration with this hash."""
    from ..runs.record import find

    record = find(directory) or {}
    return record if (record.get("status"), record.get("config_hash")) == ("complete", digest) else None


def mark(directory: Path) -> tuple | None:
    """What tells the record in a directory from one that replaces it, whatever the clocks say; None without one."""
    from ..runs.record import FILE

    try:
        found = (directory / FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def is_done(record: Mapping, cfg: DictConfig, new: bool, settings: Settings | None = None) -> bool:
    """Whether a complete record makes its run superfluous.

    Args:
        record: of the run's configuration.
        cfg: the configuration; its key `complete` decides.
        new: whether the record was made since the sweep was started.
        settings: what the configuration was resolved to, where this process has done so.
    """
    from ..runs.settings import resolve

    if cfg.complete == "again":
        return new
    return cfg.complete == "skip" or not changes(record, settings or resolve(cfg))


def changes(record: Mapping, settings: Settings) -> list[str]:
    """What has changed since a record was made, of all that its configuration does not say: code, checkpoint, texts."""
    from ..runs.provenance import code_version, inputs_of

    environment = record.get("environment") or {}
    now = inputs_of(settings)
    before = environment.get("inputs") or {}
    found = [] if environment.get("code") == code_version() else ["code"]
    names, commit = {*now, *before}, "checkpoint commit"
    if commit in now and now[commit] == before.get(commit):  # for files that are not in the hub's cache it stands
        names -= {name for name in names if name.startswith("checkpoint ") and (name in now) != (name in before)}
    return found + [name for name in sorted(names) if now.get(name) != before.get(name)]


def describe_error(error: BaseException) -> str:
    """Type and first line of an error."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def trace() -> str:
    """The trace of the error at hand on lines of their own, if HYDRA_FULL_ERROR asks for it."""
    return f"\n{traceback.format_exc()}" if full_error() else ""


def full_error() -> bool:
    """Whether HYDRA_FULL_ERROR asks for traces."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _directory() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def _guarded(action: Callable[[Path], object]) -> Outcome:
    from ..pruning.store import HeldError

    directory, log = _directory(), logging.getLogger("alps_exp")
    try:
        action(directory)
    except HeldError as error:
        return Outcome(directory.name, "held", str(error))
    except UserError as error:
        log.exception("refused")
        return Outcome(directory.name, "refused", str(error) + trace())
    except Exception as error:
        log.exception("failed")
        where = directory / "alps_exp.log"
        return Outcome(directory.name, "failed", f"{describe_error(error)}; the trace is in {where}{trace()}")
    return Outcome(directory.name, "completed")


def _figures(record: Mapping) -> str:
    """The first figures of a run, for the terminal; the record writes what is not finite as text."""
    loss = record["summary"].get("mean_relative_loss")
    figures = [] if loss is None else [f"mean relative loss {float(loss):.4g}"]
    shown = [row for row in record["evaluations"] if row["shown"]]
    figures += [f"{row['dataset']} {row['metric']} {float(row['value']):.4g}{_unit(row)}" for row in shown[:3]]
    return "".join(f", {figure}" for figure in figures)


def _unit(row: Mapping) -> str:
    return f" {row['unit']}" if row.get("unit") else ""
