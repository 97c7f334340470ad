"""Whether a run shares the statistics of its inputs with the other runs of a sweep, and with which of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from ..base.files import sha256
from ..calibration.sharing import AUTO_GB, FOLDER, NoPasses, NoSharing, PassCache, StatisticsCache
from ..model import loading
from ..pruning.job import PruneJob
from .settings import Settings


def open_cache(
    settings: Settings, job: PruneJob, same: Mapping[str, str], directory: Path, in_sweep: bool
) -> StatisticsCache | NoSharing:
    """The statistics that a run may share with others.

    Args:
        settings: the run's.
        job: what the loop is asked to do.
        same: what `provenance.identity` gives.
        directory: the run's.
        in_sweep: whether other runs follow in this process.
    """
    limit = _limit(settings, in_sweep)
    if not limit or not job.statistics or job.in_order or not job.solver.shares:
        return NoSharing()
    own = _here(settings) | {
        "windows": f"{len(job.tokens)} of {job.tokens.shape[1]}, {job.batch_size} at a time",
        "layers": sha256("\n".join(sorted(job.patterns)))[:16],
    }
    own |= {"expert weighting": job.weighting} if job.weighting != "none" else {}
    identity = {name: value for name, value in same.items() if name not in ("configuration", "fresh text")} | own
    place, dense = directory.parent / FOLDER, job.propagate == "dense"
    try:
        return StatisticsCache(
            place, identity, dense, job.statistics, job.held_out is not None and job.losses, 1e9 * limit
        )
    except OSError as error:
        _warn(f"statistics are not shared with other runs: {error}")
        return NoSharing()


def open_passes(settings: Settings, same: Mapping[str, str], directory: Path, in_sweep: bool) -> PassCache | NoPasses:
    """What passes over the dense model tell, as far as a run may share it; the arguments are those of `open_cache`."""
    if not (limit := _limit(settings, in_sweep)):
        return NoPasses()
    deciding = ("code", "torch", "transformers", "device", "dtype")
    identity = {name: value for name, value in same.items() if name in deciding or name.startswith("checkpoint ")}
    return PassCache(directory.parent / FOLDER, identity | _here(settings), 1e9 * limit)


def _limit(settings: Settings, in_sweep: bool) -> float:
    """GB that shared statistics may take; 0 without sharing."""
    if settings.statistics_cache == "auto":
        return AUTO_GB if in_sweep and settings.devices == 1 else 0
    return settings.statistics_cache


def _here(settings: Settings) -> dict[str, str]:
    """What `provenance.identity` leaves out."""
    return {
        "checkpoint changed": loading.changed(settings.model.source),
        "threads": str(torch.get_num_threads()),
    }


@cache  # the runs of a sweep meet the same obstacle: it is told once
def _warn(message: str) -> None:
    print(f"alps_exp: warning: {message}", file=sys.stderr)
