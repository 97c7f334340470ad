"""Whether a run shares the statistics of its inputs with the other runs of a sweep, and with which of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from ..base.checks import require
from ..base.errors import UserError
from ..base.files import sha256
from ..calibration.sharing import AUTO_GB, FOLDER, NoSharing, StatisticsCache
from ..model import loading
from ..pruning.job import PruneJob


def check(cfg: Mapping) -> None:
    """Look at the key `statistics_cache`.

    Raises:
        UserError: neither auto nor a number from 0, or what does not go with it.
    """
    limit = cfg["statistics_cache"]
    if limit == "auto":
        return
    if isinstance(limit, str):
        raise UserError(f"statistics_cache={limit} is not allowed: give auto, or a number of GB (0: none)")
    require("statistics_cache", limit, float, 0, float("inf"))
    if limit and cfg["devices"] > 1:
        raise UserError(f"statistics_cache={limit} goes with one process: give devices=1, or statistics_cache=0")


def open_cache(
    cfg: Mapping, job: PruneJob, same: Mapping[str, str], directory: Path, in_sweep: bool
) -> StatisticsCache | NoSharing:
    """The statistics that a run may share with others.

    Args:
        cfg: the configuration.
        job: what the loop is asked to do.
        same: what `resume.identity` gives.
        directory: the run's.
        in_sweep: whether other runs follow in this process.
    """
    limit = cfg["statistics_cache"]
    if limit == "auto":
        limit = AUTO_GB if in_sweep and cfg["devices"] == 1 else 0
    if not limit or not job.statistics:
        return NoSharing()
    own = {
        "checkpoint changed": loading.changed(cfg["model"]),
        "windows": f"{len(job.tokens)} of {job.tokens.shape[1]}, {job.batch_size} at a time",
        "layers": sha256("\n".join(sorted(job.patterns)))[:16],
        "threads": str(torch.get_num_threads()),
    }
    identity = {name: value for name, value in same.items() if name != "configuration"} | own
    place, dense = directory.parent / FOLDER, job.propagate == "dense"
    try:
        return StatisticsCache(place, identity, dense, job.statistics, job.held_out is not None, 1e9 * limit)
    except OSError as error:
        _warn(f"statistics are not shared with other runs: {error}")
        return NoSharing()


@cache  # the runs of a sweep meet the same obstacle: it is told once
def _warn(message: str) -> None:
    print(f"alps_exp: warning: {message}", file=sys.stderr)
