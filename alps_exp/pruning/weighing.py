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
        allocation: how sparse each layer becomes.
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


def weighed(
    model: BlockModel, job: PruneJob, allocation: Allocation, choice: SensitivityChoice, tools: Tools
) -> PruneJob:
    """The job with the patterns and row factors that the dense model asks for; itself where nothing is asked.

    What an earlier attempt has found is taken from the store: gradients need not be the same to the bit again.
    """
    if not job.patterns or (not choice.used and allocation.needs == "nothing"):
        sizes = {name: _size(model, name) for name in job.patterns}
        return replace(job, patterns=allocation.allocate(job.patterns, sizes, Sensitivity())) if sizes else job
    team, kept = tools.team, tools.store.recall(_NAME)
    if (kept := team.tell(kept)) is None:
        kept = team.tell(_found(model, job, allocation, choice) if team.leads else None)
        tools.store.remember(_NAME, *kept)
    rows, levels = kept
    patterns = {name: parse_sparsity(level) for name, level in json.loads(levels).items()}
    return replace(job, patterns=patterns, rows=rows)


def _found(model: BlockModel, job: PruneJob, allocation: Allocation, choice: SensitivityChoice) -> tuple[dict, str]:
    windows = choice.windows if choice.used else min(SensitivityChoice.windows, len(job.tokens))
    found = measure_sensitivity(
        model, job.tokens[:windows], job.patterns, job.selection.excluded, gradients=choice.used, quiet=job.quiet
    )
    sizes = {name: _size(model, name) for name in job.patterns}
    patterns = allocation.allocate(job.patterns, sizes, found)
    rows = {name: found.rows(name, choice.rows) for name in job.patterns} if choice.used and choice.rows else {}
    return rows, json.dumps({name: pattern.written for name, pattern in patterns.items()})


def _size(model: BlockModel, name: str) -> int:
    return model.model.get_submodule(name).weight.numel()
