"""W&B as a sink beside the record: it reads a finished record, and a failure of it never fails a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from .checks import one_of
from .redaction import redacted

_MODES = ("online", "offline", "disabled", "shared")


def check_logger(node: Mapping) -> None:
    """Raise UserError for a logger's setting that W&B would refuse only after the run."""
    if node["name"] == "wandb":
        one_of("logger.mode", node["mode"], (None, *_MODES))


def log_record(record: Mapping, node: Mapping, directory: Path) -> str | None:
    """Send a record to the logger that the configuration names.

    Args:
        record: a run record as plain values.
        node: the composed `logger` node.
        directory: the run's directory, under which offline files go.

    Returns:
        None, or one line saying why nothing was logged.
    """
    if node["name"] == "none":
        return None
    try:
        _log_wandb(record, node, directory)
    except Exception as error:  # whatever W&B raises, the record on disk is the result
        first = redacted(str(error).splitlines()[0]) if str(error) else ""
        line = f"W&B logging failed ({type(error).__name__}: {first})"
        print(f"alps_exp: {line}; the record is complete without it", file=sys.stderr)
        return line
    return None


def _log_wandb(record: Mapping, node: Mapping, directory: Path) -> None:
    import wandb

    name = f"{record['model']}-{record['method']}-{record['sparsity'].replace(':', 'of')}-s{record['seed']}"
    with wandb.init(
        project=node["project"],
        entity=node["entity"],
        mode=node["mode"] or os.environ.get("WANDB_MODE"),  # W&B reads it once per process only
        group=node["group"],
        tags=list(node["tags"]),
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
        run.summary.update({"status": record["status"], **record["summary"]})
        run.summary.update({f"phase/{name}": value for name, value in record["phases"].items()})
        for evaluation in record["evaluations"]:
            partial = " (partial)" if evaluation.get("partial") else ""
            run.summary[f"eval/{evaluation['dataset']}/{evaluation['metric']}{partial}"] = evaluation["value"]
        run.summary["environment"] = dict(record["environment"])
