"""SparseGPT: prune column by column, each error compensated by the columns to its right (Frantar, Alistarh, ICML 2023).

    H   (in, in)    G + λI, λ = damping · mean(diag G); an input that was always zero has H_jj = 1 and loses its weights
    U   (in, in)    upper triangular, UᵀU = H⁻¹
    W   (in, out)   the weight as it is being pruned; in-major here, so that a column of the layer is contiguous
    E   (in, out)   errors: E_j = (W_j - Q_j) / U_jj, with Q_j = W_j on the support and 0 elsewhere

Weights are compared by W² / U_jj² when their block begins (unstructured: all rows × `block_size` columns) or when their
N:M group begins (each row by itself), in both cases after the compensation of everything to the left.

The arithmetic is that of the original, in another order: a column is compensated when its step comes, not when the
error arises, W_j -= Σ_{k<j} U_kj E_k. Errors of former blocks and of former steps within the block then come as
matrix products, and only the few columns of a step are walked one by one, in one kernel where Triton runs.

Differences from the released code, all deliberate:
- exact counts: floor(s · n) of a block's n weights go; there one more and all ties.
- U comes from one Cholesky factorisation of H with its order reversed, H = MMᵀ with M upper triangular, U = M⁻¹;
  there from that of the inverse of H, which costs three times as much and loses digits.
- N:M is read as N kept, there as N removed; block_size is rounded up to a multiple of M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alps_exp.base.checks import require
from alps_exp.base.clock import Stopwatch
from alps_exp.base.errors import UserError
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.layer.solver import Solution, Solver
from alps_exp.numerics.kernels import kernel_for
from alps_exp.numerics.precision import nearly_product, subtract_product
from alps_exp.numerics.triangular import inverse_cholesky, triangular_inverse
from alps_exp.patterns import Pattern

# Columns walked one by one between two matrix products, about; a multiple of M under an N:M pattern.
_STEP = 16
# Columns that the kernel walks over, at most.
_WIDEST = 64


@dataclass(frozen=True)
class SparseGPT(Solver):
    """SparseGPT with its hyperparameters.

    Attributes:
        damping: λ over the mean of the Gram matrix's diagonal.
        block_size: columns whose weights compete with each other, under an unstructured pattern.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    kinds: ClassVar[frozenset[str] | None] = frozenset({"unstructured", "nm", "transposable", "hierarchical", "vnm"})

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        require("method.damping", self.damping, float, 0, 10)
        require("method.block_size", self.block_size, int, 1, float("inf"))

    @property
    def selection(self) -> str:
        return f"block of {self.block_size} columns"

    def flops(self, rows: int, width: int) -> float:
        # Cholesky and triangular inverse, n³/3 each; then every pair of columns meets once in every row.
        return 2 / 3 * width**3 + rows * width**2

    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        watch = Stopwatch(problems[0].weight.device)
        factor = inverse_factor(problems[0], self.damping)
        seconds = {"factorisation": watch.lap("factorisation") / len(problems)}
        solutions = [None] * len(problems)
        # Rows do not interact but in the selection: layers of one pattern are walked together.
        for pattern in dict.fromkeys(patterns):
            members = [index for index, other in enumerate(patterns) if other == pattern]
            pruned = self._prune([problems[index].weight for index in members], problems[0].dead, factor, pattern)
            spent = watch.lap("sweep") / len(members)
            for index, (weight, support) in zip(members, pruned, strict=True):
                solutions[index] = Solution(weight=weight, support=support, seconds={**seconds, "sweep": spent})
        return solutions

    def _solve_alike(
        self, groups: Sequence[Sequence[LayerProblem]], patterns: Sequence[Pattern]
    ) -> list[list[Solution]]:
        weights = [[problem.weight for problem in problems] for problems in groups]
        if len(set(patterns)) > 1 or _kernel(weights[0][0], patterns[0]) is None:
            return super()._solve_alike(groups, patterns)
        watch = Stopwatch(weights[0][0].device)
        leaders = [problems[0] for problems in groups]
        factors = _inverse_factors(leaders, self.damping)
        seconds = {"factorisation": watch.lap("factorisation") / len(groups) / len(patterns)}
        weights = [torch.stack(layers) for layers in zip(*weights, strict=True)]
        pruned = self._prune(weights, torch.stack([one.dead for one in leaders]), factors, patterns[0])
        seconds["sweep"] = watch.lap("sweep") / len(groups) / len(patterns)
        return [
            [
                Solution(weight=weight[number], support=support[number], seconds=dict(seconds))
                for weight, support in pruned
            ]
            for number in range(len(groups))
        ]

    def _prune(
        self, weights: list[Tensor], dead: Tensor, factor: Tensor, pattern: Pattern
    ) -> list[tuple[Tensor, Tensor]]:
        """Weight and support, (…, out, in) each, of layers that share U.

        Args:
            weights: of the layers, (…, out, in) each.
            dead: (…, in) bool.
            factor: (…, in, in) U.
        """
        rows = [weight.shape[-2] for weight in weights]
        work = torch.cat(weights, dim=-2).mT.contiguous()
        work.masked_fill_(dead[..., None], 0)
        keep = torch.empty_like(work, dtype=torch.bool)
        group = pattern.group or 1
        step = -(-_STEP // group) * group if _kernel(work, pattern) is None else _WIDEST // group * group
        width = -(-self.block_size // group) * group
        for begin in range(0, work.shape[-2], width):
            end = min(begin + width, work.shape[-2])
            here, later = slice(begin, end), slice(end, None)
            own = (work[..., here, :], keep[..., here, :], factor[..., here, here])
            errors = _sweep_block(*own, rows, pattern, step)
            subtract_product(work[..., later, :], factor[..., here, later].mT, errors)
        work.masked_fill_(~keep, 0)
        layers = zip(work.split(rows, dim=-1), keep.split(rows, dim=-1), strict=True)
        return [(weight.mT.contiguous(), support.mT.contiguous()) for weight, support in layers]


def _kernel(work: Tensor, pattern: Pattern) -> Callable | None:
    """What walks over the columns of a step at once; None where it does not know the pattern, too."""
    known = pattern.group is None or (pattern.group <= _WIDEST and pattern.tracker().group is not None)
    return kernel_for(work.device, "sweep_step") if known and work.dtype == torch.float32 else None


def _sweep_block(work: Tensor, keep: Tensor, factor: Tensor, rows: list[int], pattern: Pattern, step: int) -> Tensor:
    """Prune one block of columns, compensated for all columns to its left already.

    Args:
        work: (…, width, out) W, compensated in place.
        keep: (…, width, out) bool, filled in.
        factor: (…, width, width) the block's part of U.
        rows: how the out rows divide into layers, which select apart.
        step: columns walked one by one between two products.

    Returns:
        (…, width, out) E.
    """
    inverse = factor.diagonal(dim1=-2, dim2=-1).reciprocal()[..., None]
    errors = torch.empty_like(work, memory_format=torch.contiguous_format)
    if pattern.group is None:
        keep.copy_(_select(work * inverse, rows, pattern))
    for begin in range(0, work.shape[-2], step):
        end = min(begin + step, work.shape[-2])
        former, here = slice(0, begin), slice(begin, end)
        if begin:
            own = work[..., here, :]
            (own.addmm_ if own.ndim == 2 else own.baddbmm_)(
                factor[..., former, here].mT, errors[..., former, :], alpha=-1
            )
        parts = (part[..., here, :] for part in (work, keep, factor[..., here], errors, inverse))
        _sweep_step(*parts, rows, pattern)
    return errors


def _sweep_step(
    work: Tensor, keep: Tensor, factor: Tensor, errors: Tensor, inverse: Tensor, rows: list[int], pattern: Pattern
) -> None:
    """Walk a few columns, compensated for all to their left already; arguments are parts of `_sweep_block`'s.

    Args:
        inverse: (…, columns, 1) 1 / U_jj.
    """
    columns, group = work.shape[-2], pattern.group
    if (kernel := _kernel(work, pattern)) is not None:
        kernel(work, keep, factor, errors, pattern.tracker().group)
        return
    span = group or columns
    for begin in range(0, columns, span):
        here = slice(begin, begin + span)
        if group is not None:
            keep[here] = _select(work[here] * inverse[here], rows, pattern)
        lost = inverse[here] * ~keep[here]  # 1 / U_jj where pruned
        for column in range(begin, begin + span):
            error = torch.mul(work[column], lost[column - begin], out=errors[column])
            work[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)


def _select(score: Tensor, rows: list[int], pattern: Pattern) -> Tensor:
    """(…, width, out) mask of the weights to keep.

    Args:
        score: (…, width, out) W / U_jj.
    """
    score = score.abs_().mT  # in the order of its square, which float32 may not hold
    keep = pattern.keep if score.ndim == 2 else pattern.keep_each
    return torch.cat([keep(layer, "block") for layer in score.split(rows, dim=-2)], dim=-2).mT


def inverse_factor(problem: LayerProblem, damping: float) -> Tensor:
    """U (in, in), upper triangular with UᵀU = H⁻¹.

    Raises:
        UserError: no Gram matrix, or H is not positive definite.
    """
    return triangular_inverse(reversed_cholesky(problem, damping), nearly_product).flip(0, 1)


def _inverse_factors(problems: Sequence[LayerProblem], damping: float) -> Tensor:
    """The same for several problems of one width at once, (problems, in, in)."""
    hessians, tiny = zip(*(_reversed_hessian(problem, problem.gram, damping) for problem in problems), strict=True)
    lower, failed = inverse_cholesky(torch.stack(hessians))
    failed = (failed != 0) | ~torch.isfinite(lower).flatten(1).all(1)
    factors = (lower * lower.new_tensor(tiny)[:, None, None]).flip(1, 2)
    for index in failed.nonzero().flatten().tolist():
        factors[index] = inverse_factor(problems[index], damping)
    return factors


def reversed_cholesky(problem: LayerProblem, damping: float) -> Tensor:
    """L (in, in), lower triangular, LLᵀ = H with the order of its inputs reversed; so U_jj = 1 / L_kk, k = in - 1 - j.

    Raises:
        UserError: no Gram matrix, or H is not positive definite.
    """
    hessian, tiny = _reversed_hessian(problem, problem.gram, damping)
    factor, failed_at = torch.linalg.cholesky_ex(hessian)
    if int(failed_at) or not bool(torch.isfinite(factor).all()):
        factor = _cholesky_in_float64(problem, damping)
    return factor / tiny if tiny > 1 else factor


def _cholesky_in_float64(problem: LayerProblem, damping: float) -> Tensor:
    """H's factor where float32 finds none: when one direction has nearly all of the inputs' energy, what float32 rounds
    away on the way is more than the damping."""
    hessian, tiny = _reversed_hessian(problem, problem.gram.double(), damping)
    factor, failed_at = torch.linalg.cholesky_ex(hessian)
    pivots = factor.diagonal()[~problem.dead.flip(0)].square()
    # A pivot is not below the damping, but by what the sums in G have lost to rounding.
    least = max(damping, torch.finfo(torch.float32).eps) * problem.diagonal.double().mean() * tiny**2 / 2
    if int(failed_at) or not bool((pivots > least).all()):
        raise UserError(
            f"{problem.name}: the Gram matrix with damping {damping:g} is not positive definite; raise method.damping "
            "or calibrate on more windows"
        )
    return factor.to(problem.gram)


def _reversed_hessian(problem: LayerProblem, gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """H times a number squared, with the order of its inputs reversed, and the number."""
    hessian, mean = (gram + gram.T) / 2, problem.diagonal.to(gram).mean()
    # Squares of inputs of 1e-20 are below what float32 holds with all its digits.
    tiny = 2.0**40 if 0 < float(mean) < 2.0**-100 else 1.0
    if tiny > 1:
        hessian, mean = hessian * tiny**2, mean * tiny**2
    diagonal = hessian.diagonal()
    diagonal += damping * mean
    diagonal[problem.dead] = tiny**2  # as if it were 1
    return hessian.flip(0, 1), tiny
