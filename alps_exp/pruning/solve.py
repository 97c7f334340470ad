"""Linear layers of a model as problems, and their solutions as weights and rows of the record."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base.clock import Stopwatch
from ..base.errors import UserError
from ..layer.problem import LayerProblem
from ..layer.solver import Solution
from ..numerics.precision import full_precision
from ..patterns import Pattern
from .job import PruneJob
from .rows import LayerRow


def out_major(module: nn.Module) -> Tensor:
    """The layer's weight as (out, in), a view; GPT-2's Conv1D stores the transpose."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def solve_layers(index: int, linears: Mapping[str, nn.Module], fields: dict, job: PruneJob) -> list[LayerRow]:
    """Solve layers that share an input; their weights are written once all of it has succeeded.

    Args:
        index: of their block.
        linears: the layers by name.
        fields: of their problems, the input's statistics; also `held_out`, a Gram matrix of other tokens to measure
            the loss on.
        job: what the loop was asked to do.
    """
    fields = dict(fields)
    held_out = fields.pop("held_out", None)
    with full_precision():
        problems = [
            LayerProblem(out_major(module).to(torch.float32, copy=True), name=name, **fields)
            for name, module in linears.items()
        ]
        patterns = [job.patterns[name] for name in linears]
        watch = Stopwatch(problems[0].weight.device)
        try:
            solutions = job.solver.solve_group(problems, patterns)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"{problems[0].name}: the Gram matrix could not be factorised ({error}): use more calibration windows "
                "(nsamples) or more damping (method.damping)"
            ) from None
        seconds = watch.lap("solve") / len(problems)
        rows, written = [], []
        for problem, pattern, solution, module in zip(problems, patterns, solutions, linears.values(), strict=True):
            written.append(solution.weight.to(module.weight.dtype))
            rows.append(_row(index, problem, pattern, solution, written[-1].float(), seconds, job, held_out))
    for module, weight in zip(linears.values(), written, strict=True):
        out_major(module).copy_(weight)
    return rows


def _row(
    index: int,
    problem: LayerProblem,
    pattern: Pattern,
    solution: Solution,
    written: Tensor,
    seconds: float,
    job: PruneJob,
    held_out: Tensor | None,
) -> LayerRow:
    if bad := int((~torch.isfinite(written)).sum()):
        raise UserError(
            f"{problem.name}: {type(job.solver).__name__} gave {bad} NaN or infinite weights; use dtype=float32"
        )
    loss = problem.relative_loss(written) if problem.gram is not None else None
    if loss is not None and not math.isfinite(loss):
        raise UserError(f"{problem.name}: its inputs overflow float32 sums: check the checkpoint's weights")
    return LayerRow(
        name=problem.name,
        block=index,
        shape=list(problem.weight.shape),
        pattern=str(pattern),
        selection=f"group of {pattern.group}" if pattern.group else job.solver.selection,
        sparsity_target=pattern.sparsity,
        sparsity=1 - int(written.count_nonzero()) / written.numel(),
        relative_loss=loss,
        held_out_loss=None if held_out is None else problem.replaced(gram=held_out).relative_loss(written),
        status=solution.status,
        iterations=solution.iterations,
        seconds=seconds,
        seconds_by_phase=dict(solution.seconds),
        tokens=problem.tokens,
        dead_inputs=int(problem.dead.sum()),
        stats=dict(solution.stats),
    )
