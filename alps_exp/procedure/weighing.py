"""What the dense model tells before the first block is pruned: how rows weigh, and how sparse each layer becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..allocation.allocations import Allocation, Uniform
from ..base.errors import UserError
from ..base.files import sha256
from ..calibration.sensitivity import Sensitivity, SensitivityChoice, measure_sensitivity, measure_spectra
from ..layer.method import Method
from ..model.blocks import BlockModel
from ..model.layers import find_layer
from ..patterns import NM, Pattern, parse_sparsity
from ..pruning.job import PruneJob
from ..pruning.rows import LayerRow
from ..pruning.solve import competes
from ..pruning.tools import Tools

_NAME = "weighing"


def check_weighing(
    allocation: Allocation, choice: SensitivityChoice, windows: int, method: Method, patterns: Mapping[str, Pattern]
) -> None:
    """Raise UserError for an allocation without what it needs or that the method cannot follow, or more windows than
    there are.

    Args:
        allocation: how the sparsity is divided among layers.
        choice: whether outputs are weighed.
        windows: number of calibration windows.
        method: that prunes.
        patterns: layer name → pattern, of layers without a sparsity of their own.
    """
    allocation.check_choices(patterns)
    if method.structured and not isinstance(allocation, Uniform):
        raise UserError(
            f"allocation divides the sparsity among layers, and the layers of a block lose together what "
            f"{type(method).__name__} takes away: give allocation=uniform"
        )
    if method.selection == "mask" and not isinstance(allocation, Uniform):
        raise UserError(
            f"allocation divides the sparsity among layers, and {type(method).__name__} takes it from a mask: give "
            "allocation=uniform"
        )
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
    if not reads(job):
        return replace(job, patterns=_allocated(model, job, Sensitivity()))
    team, kept = tools.team, tools.store.recall(_NAME)
    if (kept := team.tell(kept)) is None:
        kept = team.tell(_found(model, job, tools) if team.leads else None)
        tools.store.remember(_NAME, *kept)
    rows, levels = kept
    patterns = {name: parse_sparsity(level) for name, level in json.loads(levels).items()}
    return replace(job, patterns=patterns, rows=rows)


def reads(job: PruneJob) -> bool:
    """Whether anything depends on what the dense model tells: an allocation that divides, or rows that compete."""
    if job.allocation.needs != "nothing" and job.allocation.target_of(job.shared) is not None:
        return True
    weighs = job.sensitivity.used and job.sensitivity.rows > 0
    return weighs and any(competes(pattern, job.solver) for pattern in job.patterns.values())


def _found(model: BlockModel, job: PruneJob, tools: Tools) -> tuple[dict, str]:
    choice, needs = job.sensitivity, job.allocation.needs
    rest = {"excluded": job.selection.excluded, "quiet": job.quiet}
    names = sha256("\n".join(sorted(job.patterns)))[:16]
    found = Sensitivity()
    if choice.used or needs in ("inputs", "gradients"):
        windows = job.tokens[: choice.windows if choice.used else SensitivityChoice.windows]
        how = {"gradients": choice.used, "by_outputs": choice.used and needs != "inputs"}
        found = tools.passes.found(
            "gradients" if choice.used else "inputs",
            {"windows": sha256(windows.numpy().tobytes())[:16], "shape": str(list(windows.shape)), "layers": names}
            | {key: str(value) for key, value in how.items()},
            lambda: measure_sensitivity(model, windows, job.patterns, **how, **rest),
        )
    if needs == "weights":
        tail = getattr(job.allocation, "tail", 0.5)
        spectra = tools.passes.found(
            "spectra",
            {"tail": str(tail), "layers": names},
            lambda: measure_spectra(model, job.patterns, tail=tail, **rest),
        )
        found = replace(found, exponents=spectra.exponents)
    patterns = _allocated(model, job, found)
    rows = {name: found.rows(name, choice.rows) for name in job.patterns} if choice.used and choice.rows else {}
    return rows, json.dumps({name: pattern.written for name, pattern in patterns.items()})


def _allocated(model: BlockModel, job: PruneJob, found: Sensitivity) -> dict[str, Pattern]:
    sizes = {name: math.prod(find_layer(model.model, name).shape) for name in job.patterns}
    return {**job.patterns, **job.allocation.allocate(job.shared, sizes, found)}


def notes_of_choices(asked: NM, rows: Sequence[LayerRow]) -> list[str]:
    """What a record says of a division of N:M that has another mean than the one asked for, or that divides nothing.

    Args:
        asked: the run's sparsity.
        rows: of the layers without a sparsity of their own.
    """
    if all(row.pattern == asked.written for row in rows):
        return [
            f"the allocation gives every layer {asked.written}: none is worth more to it than to the others; "
            "allocation.choices changed nothing"
        ]
    sizes = [math.prod(row.shape) for row in rows]
    kept = sum(size * (1 - row.sparsity_target) for size, row in zip(sizes, rows, strict=True)) / sum(sizes)
    if 1 - kept - asked.sparsity < 0.5 / sum(sizes):
        return []
    return [
        f"{kept:.6g} of the weights are kept, and {asked.written} keeps {1 - asked.sparsity:.6g}: no layer fits between"
    ]
