"""The best weights on a support that any method has found: min ‖X(W - Ŵ)ᵀ‖² over Ŵ zero outside the support.

With S the kept and N the pruned inputs of one output row w, the optimum is ŵ_S = w_S + G_SS⁻¹ G_SN w_N.

    none     the method's own weights
    pcg      conjugate gradients on all rows at once, from the method's weights on, as ALPS ends (its `pcg_…` defaults)
    exact    each row's normal equations by a Cholesky factorisation in float64 (the paper's backsolve)
    admm     ADMM-Grad's iteration from the dense weights on, at its defaults (Boža's weight update for a given mask)

The Gram matrix has a unit diagonal here (that of ALPS without its damping). `exact` adds λI to G with
λ = 10⁻⁶ · mean(diag G), which draws what the inputs leave open to the dense weights; where a row's matrix is not
positive definite even then, its diagonal grows by 10⁻⁵, 10⁻⁴, … until it is. A row whose loss the fit does not lower
keeps the method's weights, and so do weights of dead inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..base.checks import one_of
from ..base.choices import REFITS
from ..base.clock import Stopwatch
from ..base.errors import UserError
from ..layer.inputs import Inputs
from ..layer.method import Method
from ..layer.problem import LayerProblem, Statistics, power_of_two
from ..layer.scaled import ScaledGram
from ..layer.solver import Solution, Solver
from ..numerics.fit import fit_on_support
from ..numerics.precision import Multiplier
from ..patterns import Pattern
from .admm import DAMPING, ITERATIONS, PlainAdmm
from .alps import Alps, launches

_DAMPING = 1e-6
# Numbers in the matrices that are factorised at once, 0.5 GB; a factorisation takes about three times that.
_BATCH = 1 << 26
# Columns of a Gram matrix that are taken in float64 at once where losses are compared.
_COLUMNS = 2048


def refitted(solver: Method, refit: str) -> Method:
    """The solver with the weights on its supports fitted afterwards; itself for "none", and where it prunes nothing.

    Raises:
        UserError: unknown `refit`.
    """
    one_of("refit", refit, REFITS)
    if refit != "none" and not isinstance(solver, Solver):
        raise UserError(
            f"refit={refit} fits the weights of layers that a method has pruned one by one, and "
            f"{type(solver).__name__} prunes blocks or the model as a whole: leave it out"
        )
    return solver if refit == "none" or not solver.prunes else Refitted(solver, refit)


@dataclass(frozen=True)
class Refitted(Solver):
    """A method whose supports are kept and whose weights are fitted.

    Attributes:
        method: finds the supports.
        refit: "pcg", "exact" or "admm".
    """

    method: Solver
    refit: str

    @property
    def statistics(self) -> Statistics:
        return self.method.statistics | Statistics.GRAM

    @property
    def selection(self) -> str:
        return self.method.selection

    @property
    def unplanned(self) -> str:
        return self.method.unplanned

    def flops(self, rows: int, width: int) -> float:
        return self.method.flops(rows, width) + _FITS[self.refit].flops(rows, width)

    def parts(self, device: torch.device) -> int:
        return self.method.parts(device)

    def make_parts(self, inputs: Inputs, indices: Sequence[int]) -> list[Tensor]:
        return self.method.make_parts(inputs, indices)

    def check_pattern(self, pattern: Pattern) -> None:
        self.method.check_pattern(pattern)

    def for_layers(self, patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]]) -> Solver:
        return replace(self, method=self.method.for_layers(patterns, shapes))

    def for_model(self, model: nn.Module, patterns: Mapping[str, Pattern]) -> Solver:
        return replace(self, method=self.method.for_model(model, patterns))

    def digests(self) -> dict[str, str]:
        return self.method.digests()

    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        solutions = self.method.solve_group(problems, patterns)
        watch = Stopwatch(problems[0].weight.device)
        fit = _FITS[self.refit](problems[0])
        results = []
        for problem, solution in zip(problems, solutions, strict=True):
            weight, stats = fit(problem.weight, solution)
            seconds = {**solution.seconds, "refit": watch.lap("refit")}
            results.append(replace(solution, weight=weight, seconds=seconds, stats={**solution.stats, **stats}))
        return results

    def _solve_alike(
        self, groups: Sequence[Sequence[LayerProblem]], patterns: Sequence[Pattern]
    ) -> list[list[Solution]]:
        if self.refit != "pcg" or not launches(groups[0][0].weight.device):
            return super()._solve_alike(groups, patterns)
        found = self.method.solve_alike(groups, patterns)
        watch = Stopwatch(groups[0][0].weight.device)
        fit, columns = _Pcg([problems[0] for problems in groups]), []
        for problems, solutions in zip(zip(*groups, strict=True), zip(*found, strict=True), strict=True):
            weights, steps = fit.together([problem.weight for problem in problems], solutions)
            spent = watch.lap("refit") / len(solutions)
            parts = zip(solutions, weights, steps, strict=True)
            columns.append(
                [
                    replace(
                        solution,
                        weight=weight,
                        seconds={**solution.seconds, "refit": spent},
                        stats={**solution.stats, "refit_iterations": made},
                    )
                    for solution, weight, made in parts
                ]
            )
        return [list(solutions) for solutions in zip(*columns, strict=True)]


class _Pcg:
    """Conjugate gradients on layers that share a Gram matrix, or on several that have one each."""

    @staticmethod
    def flops(rows: int, width: int) -> float:
        return 30 * 2 * rows * width**2  # thirty steps, about

    def __init__(self, problem: LayerProblem | Sequence[LayerProblem]) -> None:
        single = isinstance(problem, LayerProblem)
        problems = [problem] if single else problem
        self._grams = [one.gram for one in problems]
        self._scaled = ScaledGram(problem.inputs if single else [one.inputs for one in problems], damping=0.0)
        self._multiply = Multiplier(self._scaled.gram, exact=problems[0].weight.dtype == torch.float64)

    def __call__(self, dense: Tensor, solution: Solution) -> tuple[Tensor, dict]:
        factor = power_of_two(float(dense.abs().max()))
        scaled = self._scaled.scale(dense / factor)
        unit = power_of_two(float(scaled.abs().max()))
        scaled /= unit
        start = self._scaled.scale(solution.weight / factor).div_(unit)
        fitted, steps = fit_on_support(
            self._multiply, scaled, solution.support, start, Alps.pcg_iterations, Alps.pcg_tolerance
        )
        weight = torch.where(self._scaled.dead, solution.weight, self._scaled.unscale(fitted * unit) * factor)
        return _better(self._grams[0], dense, solution.weight, weight), {"refit_iterations": steps}

    def together(self, dense: Sequence[Tensor], solutions: Sequence[Solution]) -> tuple[list[Tensor], list[int]]:
        """The same of one layer for each Gram matrix: fitted weights, and steps that each took."""
        given = [solution.weight for solution in solutions]
        weights, starts, support = (torch.stack(values) for values in (dense, given, [s.support for s in solutions]))
        factor = _powers(weights)
        scaled = self._scaled.scale(weights / factor)
        unit = _powers(scaled)
        scaled /= unit
        start = self._scaled.scale(starts / factor).div_(unit)
        fitted, steps = fit_on_support(self._multiply, scaled, support, start, Alps.pcg_iterations, Alps.pcg_tolerance)
        found = torch.where(self._scaled.dead, starts, self._scaled.unscale(fitted * unit) * factor)
        parts = zip(self._grams, dense, given, found, strict=True)
        return [_better(*part) for part in parts], steps


def _powers(weights: Tensor) -> Tensor:
    """(layers, 1, 1) the power of two below the largest entry of each of several weights."""
    found = [power_of_two(value) for value in weights.abs().amax((-2, -1)).tolist()]
    return weights.new_tensor(found)[:, None, None]


class _Exact:
    """The normal equations of layers that share a Gram matrix, row by row, in float64."""

    @staticmethod
    def flops(rows: int, width: int) -> float:
        return rows * (width / 2) ** 3 / 3  # a factorisation of half the inputs for every row

    def __init__(self, problem: LayerProblem) -> None:
        self._name, self._gram = problem.name, problem.gram
        double = Inputs(gram=problem.gram.double(), name=problem.name)
        self._scaled = ScaledGram(double, damping=0.0)
        self._ridge = _DAMPING * double.diagonal.mean() / double.diagonal.masked_fill(double.dead, 1.0)

    def __call__(self, dense: Tensor, solution: Solution) -> tuple[Tensor, dict]:
        support = solution.support & ~self._scaled.dead
        weight, counts = solution.weight.clone(), support.sum(1)
        order, begin = counts.argsort(descending=True), 0
        while begin < len(order) and (widest := int(counts[order[begin]])):
            rows = order[begin : begin + max(_BATCH // widest**2, 1)]
            weight[rows] = self._fitted(dense[rows], solution.weight[rows], support[rows], widest)
            begin += len(rows)
        return _better(self._gram, dense, solution.weight, weight), {}

    def _fitted(self, dense: Tensor, start: Tensor, support: Tensor, widest: int) -> Tensor:
        """The rows' weights; `widest` is the most that any of them keeps."""
        scaled = self._scaled.scale(dense.double())
        right = scaled.masked_fill(support, 0) @ self._scaled.gram
        # Kept inputs first; rows that keep fewer are filled up with pruned ones, which the mask takes out again.
        columns = support.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :widest]
        kept = support.gather(1, columns)
        correction = self._solve(columns, kept, right.gather(1, columns).mul_(kept))
        fitted = (scaled * support).scatter_add_(1, columns, correction)
        return torch.where(support, self._scaled.unscale(fitted).to(start), start)

    def _solve(self, columns: Tensor, kept: Tensor, right: Tensor) -> Tensor:
        """H_SS⁻¹ right for every row of `columns` (rows, widest), zero where `kept` is false."""
        matrix = self._scaled.gram[columns[:, :, None], columns[:, None, :]]
        matrix.mul_(kept[:, :, None]).mul_(kept[:, None, :])
        matrix.diagonal(dim1=1, dim2=2).copy_(torch.where(kept, 1 + self._ridge[columns], 1.0))
        factor, info = torch.linalg.cholesky_ex(matrix)
        more = 1e-5
        while bool((info != 0).any()):
            if more > 1:
                raise UserError(f"{self._name}: the Gram matrix has negative eigenvalues: it must be a sum of x xᵀ")
            bad = info != 0
            matrix[bad] += torch.diag_embed(torch.full_like(right[bad], more))
            factor[bad], info[bad] = torch.linalg.cholesky_ex(matrix[bad])
            more *= 10
        return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0].mul_(kept)


class _Admm:
    """ADMM on layers that share a Gram matrix."""

    @staticmethod
    def flops(rows: int, width: int) -> float:
        return 5 / 3 * width**3 + ITERATIONS * 2 * rows * width**2  # an inverse, and the iterations

    def __init__(self, problem: LayerProblem) -> None:
        self._gram, self._dead = problem.gram, problem.dead
        self._admm = PlainAdmm(problem, DAMPING)

    def __call__(self, dense: Tensor, solution: Solution) -> tuple[Tensor, dict]:
        weight, _ = self._admm(dense, lambda iteration, score: solution.support, ITERATIONS)
        weight = torch.where(self._dead, solution.weight, weight)
        return _better(self._gram, dense, solution.weight, weight), {"refit_iterations": ITERATIONS}


_FITS = {"pcg": _Pcg, "exact": _Exact, "admm": _Admm}


def _better(gram: Tensor, dense: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Of the rows of `before` and `after`, the ones with the smaller ‖X(w - ŵ)‖²; `before` where they are equal.

    In float64, and the difference as one product, as losses of nearly nothing are rounding in float32.
    """
    step, sum_ = after.double() - before, 2 * dense.double() - before - after
    # A part of the matrix at a time: in float64 all of it takes more than the iteration.
    parts = zip(gram.split(_COLUMNS, dim=1), sum_.split(_COLUMNS, dim=1), strict=True)
    gain = sum((step @ columns.double()).mul_(part).sum(1) for columns, part in parts)
    return torch.where((gain > 0)[:, None], after, before)
