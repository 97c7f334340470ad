"""What the dense model tells before the first block is pruned: how rows weigh, and how sparse each layer becomes."""

from __future__ import annotations

import json
from dataclasses import replace

from ..allocation.allocations import Allocation
from ..base.errors import UserError
from ..calibration.sensitivity import Sensitivity, SensitivityChoice, measure_sensitivity
from ..model.blocks import BlockModel
from ..patterns import parse_sparsity
from .job import PruneJob
from .tools import Tools

_NAME = "weighing"


def check_weighing(allocation: Allocation, choice: SensitivityChoice, windows: int) -> None:
    """Raise UserError for an allocation without what it needs, or more windows than there are.

    Args:
        allocation: how the sparsity is divided among layers.
        choice: whether outputs are weighed.
        windows: number of calibration windows.
    """
    if allocation.needs == "gradients" and not choice.used:
        raise UserError(
            "allocation=sensitivity needs gradients of the dense model: give sensitivity=outputs (and "
            "sensitivity.rows=0 to leave rows alone)"
        )
    if choice.used and choice.windows > windows:
        raise UserError(
            f"sensitivity.windows={choice.windows} is more than the calibration windows (nsamples={windows}): give "
            "at most that many"
        )


def weighed(model: BlockModel, job: PruneJob, tools: Tools) -> PruneJob:
    """The job with the patterns and row factors that the dense model asks for.

    What an earlier attempt has found is taken from the store: gradients need not be the same to the bit again.
    """
    if not job.sensitivity.used and job.allocation.needs == "nothing":
        return replace(job, patterns=job.allocation.allocate(job.patterns, _sizes(model, job), Sensitivity()))
    team, kept = tools.team, tools.store.recall(_NAME)
    if (kept := team.tell(kept)) is None:
        kept = team.tell(_found(model, job) if team.leads else None)
        tools.store.remember(_NAME, *kept)
    rows, levels = kept
    patterns = {name: parse_sparsity(level) for name, level in json.loads(levels).items()}
    return replace(job, patterns=patterns, rows=rows)


def _found(model: BlockModel, job: PruneJob) -> tuple[dict, str]:
    choice = job.sensitivity
    windows = job.tokens[: choice.windows if choice.used else SensitivityChoice.windows]
    excluded = job.selection.excluded
    found = measure_sensitivity(model, windows, job.patterns, excluded, gradients=choice.used, quiet=job.quiet)
    patterns = job.allocation.allocate(job.patterns, _sizes(model, job), found)
    rows = {name: found.rows(name, choice.rows) for name in job.patterns} if choice.used and choice.rows else {}
    return rows, json.dumps({name: pattern.written for name, pattern in patterns.items()})


def _sizes(model: BlockModel, job: PruneJob) -> dict[str, int]:
    return {name: model.model.get_submodule(name).weight.numel() for name in job.patterns}
