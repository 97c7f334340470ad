"""ALPS: ADMM finds the support, conjugate gradients fit the weights on it (Meng, Behdin, Wang, Mazumder, NeurIPS 2024).

    min ‖XŴᵀ - XWᵀ‖² + λ₂‖Ŵ - W‖²   subject to   Ŵ in the pattern

Glossary (this code is out-major: rows of W are output units, so the paper's H⁻¹R is R H⁻¹ here):

    H    (in, in)    E(G + λ₂I)E with E = diag(G + λ₂I)^-½: unit diagonal; λ₂ = damping · mean(diag G)
    W    (out, in)   dense weight, scaled by E⁻¹
    B    (out, in)   ADMM's unconstrained copy of the weight
    D    (out, in)   ADMM's copy on the pattern
    V    (out, in)   dual variable of B = D
    ρ                penalty, growing; resolvent.py has (H + ρI)⁻¹ for every ρ

One iteration:  B ← (WH - V + ρD)(H + ρI)⁻¹,  D ← P(B + V/ρ),  V ← V + ρ(B - D).
The support is that of P(B) at the end; conjugate gradients (Algorithm 2 of the paper) then minimise the loss on it.

Differences from the released code, all deliberate:
- `schedule: geometric` (the default) multiplies ρ by `growth` every `update_every` iterations; `schedule: paper` is
  the released rule (`_paper_rho`).
- (H + ρI)⁻¹ is interpolated between Cholesky inverses, and products are in low precision where that changes no loss;
  there one eigendecomposition serves all in float32 (`exact: true` factorises for every ρ, in full precision).
- damping is 0.003; there 0.01.
- dead inputs are zeroed before the selection; there the ridge lets them survive and spend budget.
- the fit goes on until `pcg_tolerance`, at most `pcg_iterations`; there always 10 iterations, which end up to 2.6 %
  above the optimum on the support.
- one product with H per conjugate gradient step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.checks import one_of, require
from ..base.clock import Stopwatch
from ..base.errors import UserError, nearest
from ..layer.problem import LayerProblem, Statistics, power_of_two
from ..layer.scaled import ScaledGram
from ..layer.solver import Solution, Solver
from ..layer.trace import Trace
from ..numerics.fit import fit_on_support
from ..numerics.kernels import kernels_for
from ..numerics.precision import Multiplier, fast_products, low_precision
from ..numerics.resolvent import NODES, Resolvent, first_node
from ..patterns import Pattern
from ..patterns.tracker import Tracker

SCHEDULES = ("geometric", "paper")


@dataclass(frozen=True)
class Alps(Solver):
    """ALPS with its hyperparameters.

    Attributes:
        rho: initial penalty ρ.
        schedule: how ρ grows, "geometric" or "paper".
        growth: factor of the geometric schedule; 1 keeps ρ at `rho`, and ADMM ends by the support alone.
        update_every: iterations between updates of ρ and tests of the support.
        max_iterations: of ADMM.
        stop_rho: the geometric schedule goes on while ρ is below this, however stable the support: while ρ is small
            beside H's unit diagonal, the support rests although better ones are near.
        min_iterations: the paper's schedule goes on until then unless the support is unchanged.
        support_tolerance: ADMM stops once the support changed by less than this fraction of the kept weights between
            two tests.
        damping: λ₂ over the mean of the Gram matrix's diagonal.
        pcg_iterations: at most, of the fit on the support.
        exact: factorise for every ρ and multiply in the problem's own precision (always so in float64); otherwise the
            resolvent is interpolated and most products run in bfloat16 or TF32 where the device has them.
        trace: record the loss of D, the change of its support, and ρ, of every iteration.
        pcg_tolerance: the fit stops once an iteration lowers the objective by less than this fraction of it.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    selection: ClassVar[str] = "layer"
    kinds: ClassVar[frozenset[str] | None] = None  # whatever is a projection

    rho: float = 0.1
    schedule: str = "geometric"
    growth: float = 1.2
    update_every: int = 6
    max_iterations: int = 300
    stop_rho: float = 0.8
    min_iterations: int = 31
    support_tolerance: float = 1e-3
    damping: float = 0.003
    pcg_iterations: int = 100
    pcg_tolerance: float = 3e-5
    exact: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        inf = float("inf")
        require("method.rho", self.rho, float, 0, 1e6, open_low=True)
        require("method.growth", self.growth, float, 1, 10)
        require("method.update_every", self.update_every, int, 1, inf)
        require("method.max_iterations", self.max_iterations, int, 1, inf)
        require("method.stop_rho", self.stop_rho, float, 0, 1e6)
        require("method.min_iterations", self.min_iterations, int, 0, inf)
        require("method.support_tolerance", self.support_tolerance, float, 0, 1)
        require("method.damping", self.damping, float, 0, 10, open_low=True)
        require("method.pcg_iterations", self.pcg_iterations, int, 0, inf)
        require("method.pcg_tolerance", self.pcg_tolerance, float, 0, 1)
        one_of("method.exact", self.exact, (True, False))
        one_of("method.trace", self.trace, (True, False))
        if self.schedule not in SCHEDULES:
            raise UserError(f"method.schedule={self.schedule!r} is not allowed; {nearest(self.schedule, SCHEDULES)}")

    def flops(self, rows: int, width: int) -> float:
        # ADMM ends once ρ has grown about tenfold. Each of the resolvent's four nodes is a Cholesky factorisation
        # (n³/3), a triangular inverse and its Gram matrix (2/3 n³ each).
        tenfold = math.log(10) / math.log(self.growth) if self.growth > 1 else math.inf
        iterations = min(self.max_iterations, self.update_every * tenfold)
        return 4 * (5 / 3) * width**3 + (iterations + 10) * 2 * rows * width**2

    def parts(self) -> int:
        return 0 if self.exact else NODES

    def make_parts(self, problem: LayerProblem, indices: Sequence[int]) -> list[Tensor]:
        scaled = ScaledGram(problem, self.damping)
        with fast_products(problem.weight.device):
            return [first_node(scaled.gram, self.rho, index, problem.name) for index in indices]

    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        device = problems[0].weight.device
        watch = Stopwatch(device)
        exact = self.exact or problems[0].weight.dtype == torch.float64
        scaled = ScaledGram(problems[0], self.damping)
        resolvent = Resolvent(scaled.gram, self.rho, exact, problems[0].name, problems[0].elsewhere)
        with nullcontext() if exact else fast_products(device):
            layers = [
                _Layer(scaled, resolvent, problem, pattern, self.rho, exact)
                for problem, pattern in zip(problems, patterns, strict=True)
            ]
            traces = [Trace(problem) for problem in problems] if self.trace else []
            self._iterate(layers, scaled, traces)
        resolvent.free()
        shared = {"factorisation": resolvent.seconds, "admm": watch.lap("admm") - resolvent.seconds}
        multiply = Multiplier(scaled.gram, exact)

        solutions = []
        for index, layer in enumerate(layers):
            support = layer.pattern.keep(layer.b.abs())
            weight, steps = fit_on_support(
                multiply, layer.w, support, layer.b.masked_fill(~support, 0), self.pcg_iterations, self.pcg_tolerance
            )
            weight = scaled.unscale(weight * layer.unit) * layer.factor
            support = support & ~scaled.dead
            seconds = {phase: spent / len(layers) for phase, spent in shared.items()}
            seconds["pcg"] = watch.lap("pcg")
            solutions.append(
                Solution(
                    weight=weight,
                    support=support,
                    status="converged" if layer.stopped else "max_iterations",
                    iterations=layer.iterations,
                    seconds=seconds,
                    stats={"rho": layer.rho, "pcg_iterations": steps, "schedule": self.schedule}
                    | layer.stats()
                    | (traces[index].stats() if traces else {}),
                )
            )
        return solutions

    def _iterate(self, layers: Sequence[_Layer], scaled: ScaledGram, traces: Sequence[Trace]) -> None:
        """ADMM on all layers in lockstep, so that they share the resolvent at every ρ, until each has stopped."""
        traced = dict(zip(layers, traces, strict=True)) if traces else {}
        for iteration in range(1, self.max_iterations + 1):
            active = [layer for layer in layers if not layer.stopped]
            if not active:
                return
            for layer in active:
                layer.step()
                if layer in traced:
                    traced[layer].add(scaled.unscale(layer.d * layer.unit) * layer.factor, layer.support, layer.rho)
                if iteration % self.update_every == 0:
                    self._test_support(layer, iteration)

    def _test_support(self, layer: _Layer, iteration: int) -> None:
        changed, kept = layer.support_change()
        stable = changed <= self.support_tolerance * kept
        if self.schedule == "paper":
            layer.stopped = _paper_rho(layer, changed / max(kept, 1)) or (stable and iteration >= self.min_iterations)
        else:
            layer.stopped = stable and (layer.rho >= self.stop_rho or self.growth == 1)
            if not layer.stopped:
                layer.rho = min(layer.rho * self.growth, 1e6)


class _Layer:
    """ADMM's state for one layer.

    D and V/ρ vanish where the other does not, so T = B + V/ρ of the last iteration and its support hold both: D is T
    on the support, V/ρ is T elsewhere.

    B is computed as W + (ρ(D - W) - V)(H + ρI)⁻¹, the same in exact arithmetic: what is multiplied is then the small
    difference from W, and R is not needed. Within one ρ, B changes by ρ(2D - B - D_former)(H + ρI)⁻¹, which is smaller
    still: low precision serves that product as well as float32 would. At every new ρ, B is computed afresh.
    """

    def __init__(
        self, scaled: ScaledGram, resolvent: Resolvent, problem: LayerProblem, pattern: Pattern, rho: float, exact: bool
    ) -> None:
        self.pattern = pattern
        self.rho = rho
        # Exact factors that bring the weights near 1: squares of 1e-20 and 1e20 do not fit float32.
        self.factor = power_of_two(float(problem.weight.abs().max()))
        self.w = scaled.scale(problem.weight / self.factor)
        self.unit = power_of_two(float(self.w.abs().max()))
        self.w /= self.unit
        self.iterations = 0
        self.stopped = False
        self.shrinking = True  # the paper's rule: no large change of the support was seen yet
        quick = pattern.tracker()
        self._fast = quick.fast
        self._tracker = Tracker(pattern) if exact else quick
        self._resolvent = resolvent
        self._low = None if exact else low_precision(self.w.device)
        self._kernels = kernels_for(self.w.device) if self._low is not None else None
        self.restart()
        self.remembered = self.support.clone()

    @property
    def d(self) -> Tensor:
        """(out, in) D, scaled."""
        return self._target * self.support

    def restart(self) -> None:
        """B, D, V at the dense point."""
        self.support = self.pattern.keep(self.w.abs())
        self.b = self.w
        self._target = self.w * self.support
        self._target_rho = self.rho
        self._change: Tensor | None = None

    def step(self) -> None:
        if self._change is not None and self._target_rho == self.rho:
            self.b = _add_product(self.b, self._change, self._resolvent.low_at(self.rho, self._low))
        else:
            self.b = self._restarted_b()
        self._select()
        self.iterations += 1

    def _restarted_b(self) -> Tensor:
        # With V = ρ_former(T - D), ρ(D - W) - V is (ρ + ρ_former)D - ρ_former T - ρW.
        difference = (self._target * self.support).mul_(self.rho + self._target_rho)
        difference.sub_(self._target, alpha=self._target_rho).sub_(self.w, alpha=self.rho)
        return (difference @ self._resolvent.at(self.rho)).add_(self.w)

    def _select(self) -> None:
        """D and V for the new B. The support of an iterate need not have exactly its count; that of the result has."""
        scale = self._target_rho / self.rho
        if self._kernels is None or not self._select_fused(scale):
            former = self._target * self.support
            target = torch.add(self.b, torch.sub(self._target, former), alpha=scale)
            self.support = self._tracker(target.abs())
            if self._low is not None:
                change = (target * self.support).mul_(2).sub_(self.b).sub_(former)
                self._change = change.mul_(self.rho).to(self._low)
            self._target = target
        self._target_rho = self.rho

    def _select_fused(self, scale: float) -> bool:
        """`_select` in one pass over memory, where the pattern's rule allows; overwrites T and the support."""
        if self._change is None:
            self._change = torch.empty_like(self.b, dtype=self._low)
        state = (self.b, self._target, self.support, scale, self.rho, self._change)
        group, stride = self._tracker.group, self._tracker.stride(self.b)
        size = self.b.numel()
        if stride is not None and size <= stride * self._kernels.SELECTED:
            sparsity, (drift, kept) = self._tracker.sparsity, self._tracker.memory(self.b.device, size)
            threshold = self._kernels.sampled_threshold(
                *state[:4], stride, sparsity, drift, kept, self._tracker.count(size)
            )
            self._kernels.threshold_step(*state, threshold, kept)
            return True
        if stride is not None:
            b, target, support = (part.view(-1)[::stride] for part in state[:3])
            sample = torch.where(support, 0, target).mul_(scale).add_(b).abs_()
            kept = self._kernels.threshold_step(*state, self._tracker.threshold(sample))
            self._tracker.observe(kept, size, stride)
            return True
        if group is not None and group[1] in (2, 4, 8, 16):
            self._kernels.group_step(*state, group)
            return True
        return False

    def stats(self) -> dict:
        """What the record says of how supports were selected: nothing of the patterns that have a fast way."""
        return {} if self._fast else {"projection": "plain"}

    def support_change(self) -> tuple[int, int]:
        """How many positions of the support differ from the last call's, and how many it has."""
        changed = int((self.support ^ self.remembered).sum())
        self.remembered = self.support.clone()
        return changed, int(self.support.sum())


def _add_product(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base + a @ b of low-precision factors in float32, without rounding the product where the device can."""
    if a.is_cuda:
        return torch.addmm(base, a, b, out_dtype=torch.float32)
    return (a @ b).float().add_(base)


def _paper_rho(layer: _Layer, change: float) -> bool:
    """One update of ρ by the released code's rule; True when ADMM is done.

    Before any change above 0.5 % was seen, ρ is taken to be too large: it shrinks by 5 and B, D, V restart (the code
    does this, the paper does not mention it).
    """
    if change > 0.005:
        layer.shrinking = False
    if layer.shrinking:
        layer.rho /= 5
        if change > 0:
            layer.restart()
        return False
    if change == 0:
        return True
    layer.rho = min(layer.rho * (1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1), 1e6)
    return False
