"""The block loop, shared by every layer method: capture → solve → write → propagate, one block at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .blocks import BlockModel, HiddenStates, block_linears, find_blocks
from .errors import UserError
from .patterns import Pattern
from .problem import LayerProblem, Statistics
from .progress import Progress
from .record import LayerRow, PruneResult
from .selection import Selection
from .solver import Solution, Solver, Stopwatch, full_precision
from .statistics import Collector

PROPAGATE = ("pruned", "dense")


@dataclass(frozen=True)
class PruneJob:
    """What the loop is asked to do.

    Attributes:
        solver: the method.
        patterns: layer name → pattern, for every layer to prune.
        selection: where the patterns came from; it tells which weights were excluded on purpose.
        tokens: (windows, seqlen) calibration windows.
        batch_size: windows per forward.
        propagate: "pruned" feeds each block what the pruned blocks before it produce, "dense" what the dense ones did.
        losses: measure every layer's relative loss, which takes the Gram matrix whatever the method needs.
        quiet: no progress.
    """

    solver: Solver
    patterns: Mapping[str, Pattern]
    selection: Selection
    tokens: Tensor
    batch_size: int = 1
    propagate: str = "pruned"
    losses: bool = True
    quiet: bool = False

    @property
    def statistics(self) -> Statistics:
        """What the loop collects."""
        return self.solver.statistics | (Statistics.GRAM if self.losses else Statistics.NONE)


def linear_shapes(model: nn.Module, selection: Selection) -> dict[str, tuple[int, int]]:
    """All linear layers of the decoder blocks, name → (out, in); works on the meta device.

    Raises:
        UserError: no decoder blocks, or a weight that cannot be pruned and is not excluded.
    """
    prefix, blocks = find_blocks(model)
    shapes = {}
    for index, block in enumerate(blocks):
        for name, module in block_linears(block, f"{prefix}.{index}", selection.excluded).items():
            shapes[name] = tuple(out_major(module).shape)
    return shapes


def other_names(model: nn.Module) -> list[str]:
    """What else a user may name as excluded although it is never pruned: leaf modules and fused weights."""
    leaves = [name for name, module in model.named_modules() if not any(module.children())]
    return leaves + [name for name, parameter in model.named_parameters() if parameter.ndim >= 3]


def out_major(module: nn.Module) -> Tensor:
    """The layer's weight as (out, in), a view; GPT-2's Conv1D stores the transpose."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def prune_blocks(model: BlockModel, job: PruneJob) -> PruneResult:
    """Prune the model in place, block by block.

    Raises:
        UserError: NaN or infinite weights or activations (the layer or block is named), or a layer that the method
            cannot solve.
    """
    result = PruneResult()
    if not job.patterns:
        return result
    watch = Stopwatch(model.device)
    hidden = None
    if job.statistics:
        hidden = HiddenStates(model, job.tokens, job.batch_size)
        watch.lap("calibrate")
    booked = sum(watch.seconds.values())
    progress = Progress(range(len(model)), "pruning blocks", quiet=job.quiet)
    for index in progress:
        with model.block(index) as block:
            linears = {
                name: module
                for name, module in block_linears(block, model.name(index), job.selection.excluded).items()
                if name in job.patterns
            }
            last = index == len(model) - 1
            groups = _capture(model, index, block, linears, hidden, job)
            if hidden is not None and job.propagate == "dense" and not last:
                hidden.advance(model, index, block)
            watch.lap("calibrate")
            rows = []
            for names, fields in groups:
                rows += _solve_group(index, {name: linears[name] for name in names}, fields, job)
            watch.lap("solve")
            result.layers += sorted(rows, key=lambda row: list(linears).index(row.name))
            if hidden is not None and job.propagate == "pruned" and not last:
                hidden.advance(model, index, block)
                watch.lap("propagate")
        if losses := [row.relative_loss for row in rows if row.relative_loss is not None]:
            progress.note(f"mean relative loss {math.fsum(losses) / len(losses):.4g}")
        result.block_seconds.append(sum(watch.seconds.values()) - booked)
        booked = sum(watch.seconds.values())
    result.seconds = watch.seconds
    return result


def _capture(
    model: BlockModel,
    index: int,
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    hidden: HiddenStates | None,
    job: PruneJob,
) -> list[tuple[list[str], dict]]:
    """Groups of layers that share an input, each with the fields of their problems' statistics."""
    if hidden is None or not linears:
        return [([name], {}) for name in linears]
    collector = Collector(dict(linears), job.statistics)
    for batch in hidden:
        collector.begin(batch)
        model.forward_block(index, block, batch)
    return [(names, accumulator.problem_fields()) for names, accumulator in collector.finish()]


def _solve_group(index: int, linears: Mapping[str, nn.Module], fields: dict, job: PruneJob) -> list[LayerRow]:
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
        rows = []
        for problem, pattern, solution, module in zip(problems, patterns, solutions, linears.values(), strict=True):
            out_major(module).copy_(solution.weight)
            rows.append(_row(index, problem, pattern, solution, out_major(module).float(), seconds, job))
    return rows


def _row(
    index: int,
    problem: LayerProblem,
    pattern: Pattern,
    solution: Solution,
    written: Tensor,
    seconds: float,
    job: PruneJob,
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
        status=solution.status,
        iterations=solution.iterations,
        seconds=seconds,
        seconds_by_phase=dict(solution.seconds),
        tokens=problem.tokens,
        dead_inputs=int(problem.dead.sum()),
        stats=dict(solution.stats),
    )
