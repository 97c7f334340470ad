"""W&B as a sink beside the record: it reads a finished record, and a failure of it never fails a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.checks import one_of
from ..base.errors import UserError, first_line
from ..base.redaction import redacted

_MODES = ("online", "offline", "disabled", "shared")

# Why W&B could not be reached; it is not asked again by this process, since each time would cost minutes.
_unreachable: list[str] = []


@dataclass(frozen=True)
class LoggerSettings:
    """A `logger` node; that of `none` has a name alone."""

    name: str
    project: str | None = None
    entity: str | None = None
    mode: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


def resolve(node: Mapping) -> LoggerSettings:
    """What a `logger` node says.

    Raises:
        UserError: a setting that W&B would refuse only after the run.
    """
    if node["name"] != "wandb":
        return LoggerSettings(node["name"])
    one_of("logger.mode", node["mode"], (None, *_MODES))
    one_of("WANDB_MODE", os.environ.get("WANDB_MODE"), (None, "", *_MODES, "dryrun", "run"))
    for key in ("project", "entity", "group"):
        if not (isinstance(node[key], str) or (node[key] is None and key != "project")):
            raise UserError(f"logger.{key}={node[key]} is not allowed: give a name (digits in quotes)")
    if isinstance(node["tags"], str) or not isinstance(node["tags"], Sequence):
        raise UserError(f"logger.tags={node['tags']} is not allowed: give a list, as in 'logger.tags=[a,b]'")
    import wandb

    keys = ("project", "entity", "mode", "group")
    found = LoggerSettings(node["name"], **{key: node[key] for key in keys}, tags=tuple(node["tags"]))
    try:
        wandb.Settings(project=found.project, entity=found.entity, run_group=found.group, run_tags=found.tags)
    except (wandb.errors.UsageError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"logger: W&B refuses its settings: {' '.join(lines[1:3]) or lines[0]}") from None
    return found


def log_record(record: Mapping, settings: LoggerSettings, directory: Path) -> str | None:
    """Send a record to the logger that the configuration names.

    Args:
        record: a run record as plain values.
        settings: of the logger.
        directory: the run's directory, under which offline files go.

    Returns:
        None, or one line saying why nothing was logged.
    """
    if settings.name == "none":
        return None
    line = None
    if _unreachable and _online(settings):
        line = f"W&B was not asked again ({_unreachable[0]})"
    else:
        try:
            _log_wandb(record, settings, directory)
        except Exception as error:  # whatever W&B raises, the record on disk is the result
            line = f"W&B logging failed ({type(error).__name__}: {redacted(first_line(error))})"
            if _online(settings):
                _unreachable.append(line)
    if line is not None:
        print(f"alps_exp: {line}; the record is complete without it", file=sys.stderr)
    return line


def _online(settings: LoggerSettings) -> bool:
    return (settings.mode or os.environ.get("WANDB_MODE") or "online") in ("online", "run", "shared")


def _log_wandb(record: Mapping, settings: LoggerSettings, directory: Path) -> None:
    import wandb

    record = _with_numbers(record)
    name = f"{record['model']}-{record['method']}-{record['sparsity'].replace(':', 'of')}-s{record['seed']}"
    with wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=settings.mode or os.environ.get("WANDB_MODE"),  # W&B reads it once per process only
        group=settings.group,
        tags=list(settings.tags),
        name=name,
        id=record["config_hash"],  # the same configuration is the same W&B run
        resume="allow",
        dir=str(directory),
        config=dict(record["config"]),
        settings=wandb.Settings(silent=True, login_timeout=30),  # a sweep must not wait for a key all night
    ) as run:
        run.define_metric("layer/index")
        run.define_metric("layer/*", step_metric="layer/index")
        for index, row in enumerate(record["layers"]):
            run.log(
                {
                    "layer/index": index,
                    "layer/name": row["name"],
                    "layer/block": row["block"],
                    "layer/relative_loss": row["relative_loss"],
                    "layer/sparsity": row["sparsity"],
                    "layer/iterations": row["iterations"],
                    "layer/seconds": row["seconds"],
                }
            )
        _log_finish(run, record.get("finish") or {})
        _log_training(run, record.get("training") or {})
        run.summary.update({"status": record["status"], **record["summary"]})
        run.summary.update({f"phase/{name}": value for name, value in record["phases"].items()})
        for evaluation in record["evaluations"]:
            partial = " (partial)" if evaluation.get("partial") else ""
            run.summary[f"eval/{evaluation['dataset']}/{evaluation['metric']}{partial}"] = evaluation["value"]
        run.summary["environment"] = dict(record["environment"])


def _log_finish(run, finish: Mapping) -> None:
    """The curves of finishing: of the blocks one after the other, and of the distillation."""
    run.define_metric("finish/*", step_metric="finish/row")
    run.define_metric("distil/*", step_metric="distil/step")
    rows = [{"block": done["block"], **row} for done in finish.get("blocks", []) for row in done["curve"]]
    for number, row in enumerate(rows):
        run.log({"finish/row": number, **{f"finish/{key}": value for key, value in row.items()}})
    for row in finish.get("distil", {}).get("curve", []):
        run.log({f"distil/{key}": value for key, value in row.items()})


def _log_training(run, training: Mapping) -> None:
    """The curve of a method that trains the model."""
    run.define_metric("training/*", step_metric="training/step")
    for row in training.get("curve", []):
        run.log({f"training/{key}": value for key, value in row.items()})


def _with_numbers(value):
    """The record with what is not finite as numbers again, which it writes as text."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
