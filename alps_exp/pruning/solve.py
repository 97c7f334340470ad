"""Layers that share an input as problems, and their solutions as weights and rows of the record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.clock import Stopwatch
from ..base.errors import UserError
from ..layer.inputs import Inputs
from ..layer.method import Method
from ..layer.problem import LayerProblem
from ..layer.solver import Solution
from ..model.layers import Layer
from ..numerics.precision import full_precision
from ..patterns import Pattern
from .job import PruneJob
from .rows import LayerRow


@dataclass(frozen=True, eq=False)
class Solved:
    """A pruned layer, until its row is measured.

    Attributes:
        layer: where its weight lies.
        problem: its dense weight and its inputs.
        posed: the problem that was solved, with the target's weight.
        pattern: what was asked.
        solution: what the solver found.
        seconds: that it took; layers solved together share their time equally.
    """

    layer: Layer
    problem: LayerProblem
    posed: LayerProblem
    pattern: Pattern
    solution: Solution
    seconds: float

    @property
    def weight(self) -> Tensor:
        """(out, in) in the layer's dtype."""
        return self.solution.weight.to(self.layer.weight.dtype)


def solve_layers(layers: Sequence[Layer], inputs: Inputs, job: PruneJob) -> list[Solved]:
    """Solve layers that share an input; nothing is written.

    Raises:
        UserError: a layer that cannot be solved.
    """
    return solve_alike([(layers, inputs)], job)


def solve_alike(groups: Sequence[tuple[Sequence[Layer], Inputs]], job: PruneJob) -> list[Solved]:
    """The same for several groups of layers at once, which have the same shapes and patterns.

    Raises:
        UserError: a layer that cannot be solved.
    """
    patterns = [job.patterns[layer.name] for layer in groups[0][0]]
    watch = Stopwatch(groups[0][0][0].weight.device)
    with full_precision():
        posed = [_Posed(layers, inputs, patterns, job) for layers, inputs in groups]
        try:
            if len(groups) > 1:
                solutions = job.solver.solve_alike([group.asked for group in posed], patterns)
            else:
                solutions = [job.solver.solve_group(posed[0].asked, patterns)]
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"{posed[0].problems[0].name}: the Gram matrix could not be factorised ({error}): use more calibration "
                "windows (nsamples) or more damping (method.damping)"
            ) from None
        found = [solved for group, own in zip(posed, solutions, strict=True) for solved in group.solved(own)]
    seconds = watch.lap("solve") / len(found)
    return [replace(solved, seconds=seconds) for solved in found]


class _Posed:
    """Layers that share an input, as problems.

    Attributes:
        problems: dense weights and their inputs.
        asked: what the solver is given: the target's weights, scaled by rows, and an expert's shrunk statistics.
    """

    def __init__(self, layers: Sequence[Layer], inputs: Inputs, patterns: Sequence[Pattern], job: PruneJob) -> None:
        self._layers, self._patterns = layers, patterns
        self.problems = [
            LayerProblem(layer.weight.to(torch.float32, copy=True), inputs, layer.name) for layer in layers
        ]
        pairs = zip(self.problems, patterns, strict=True)
        self._scales = [_scale(problem, pattern, job) for problem, pattern in pairs]
        known = self.problems[0].inputs.shrunk(job.shrinkage)
        if known is self.problems[0].inputs:
            asked = self._posed = [job.target.posed(problem) for problem in self.problems]
        else:
            asked = [job.target.posed(replace(problem, inputs=known)) for problem in self.problems]
            self._posed = [
                problem if other.weight is problem.weight else replace(problem, weight=other.weight)
                for problem, other in zip(self.problems, asked, strict=True)
            ]
        pairs = zip(asked, self._scales, strict=True)
        self.asked = [p if scale is None else replace(p, weight=p.weight * scale) for p, scale in pairs]

    def solved(self, solutions: Sequence[Solution]) -> Iterator[Solved]:
        """What the solver has found, in the layers' own units."""
        parts = zip(self._layers, self.problems, self._posed, self._patterns, solutions, self._scales, strict=True)
        for *own, solution, scale in parts:
            yield Solved(*own, solution if scale is None else _unscaled(solution, own[2].weight, scale), 0.0)


def _unscaled(solution: Solution, weight: Tensor, scale: Tensor) -> Solution:
    """A solution of the layer scaled by rows, in the units of `weight`, of which what the solver has kept stays as it
    is to the bit."""
    return replace(solution, weight=torch.where(solution.weight == weight * scale, weight, solution.weight / scale))


def competes(pattern: Pattern, solver: Method) -> bool:
    """Whether weights of different rows compete, so that it matters how rows weigh."""
    if solver.selection == "mask":  # another's, whatever the rows weigh
        return False
    return pattern.across or (pattern.group is None and solver.selection != "row")


def _scale(problem: LayerProblem, pattern: Pattern, job: PruneJob) -> Tensor | None:
    """(out, 1) factors of the rows; None where no scores compete over rows, or nothing is known of them."""
    if problem.name not in job.rows or not competes(pattern, job.solver):
        return None
    return job.rows[problem.name].to(problem.weight)[:, None]


def measured(index: int, solved: Solved, weight: Tensor, job: PruneJob, loss: float | None = None) -> LayerRow:
    """The row of a layer.

    Args:
        index: of its block.
        solved: the layer.
        weight: (out, in) as it is written.
        job: what was asked.
        loss: its relative loss, where that is known.

    Raises:
        UserError: weights that are not finite, or a loss that is not.
    """
    problem, pattern, solution = solved.problem, solved.pattern, solved.solution
    weight = weight.float()
    more, known = problem.inputs.borrowed(job.shrinkage), problem.tokens if problem.inputs.prior is not None else None
    if bad := int((~torch.isfinite(weight)).sum()):
        raise UserError(
            f"{problem.name}: {type(job.solver).__name__} gave {bad} NaN or infinite weights; use dtype=float32"
        )
    with full_precision():
        if loss is None and problem.gram is not None and problem.tokens != 0:
            loss = problem.relative_loss(weight)
        held_out = problem.held_out_loss(weight)
        other = solved.posed is not problem
        target_loss = solved.posed.relative_loss(weight) if other and problem.tokens != 0 else None
    if loss is not None and not math.isfinite(loss):
        raise UserError(f"{problem.name}: its inputs overflow float32 sums: check the checkpoint's weights")
    return LayerRow(
        name=problem.name,
        block=index,
        shape=list(problem.weight.shape),
        pattern=str(pattern),
        selection=pattern.selected(job.solver.selection),
        sparsity_target=pattern.sparsity,
        sparsity=1 - int(weight.count_nonzero()) / weight.numel(),
        relative_loss=loss,
        held_out_loss=held_out,
        status=solution.status,
        iterations=solution.iterations,
        seconds=solved.seconds,
        seconds_by_phase=dict(solution.seconds),
        tokens=problem.tokens,
        dead_inputs=int((problem.dead & _dead_elsewhere(problem.inputs, more)).sum()),
        stats={**solution.stats, **({} if known is None else {"borrowed": more / (more + known)})},
        target=job.target.name if other else "layer",
        target_loss=target_loss,
    )


def _dead_elsewhere(inputs: Inputs, borrowed: int) -> Tensor | bool:
    """(in,) bool: inputs that are zero for the tokens that an expert borrows; True without such."""
    return inputs.prior.diagonal == 0 if borrowed else True
