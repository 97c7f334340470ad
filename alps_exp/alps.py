"""ALPS: ADMM finds the support, conjugate gradients fit the weights on it (Meng, Behdin, Wang, Mazumder, NeurIPS 2024).

    min ‖XŴᵀ - XWᵀ‖² + λ₂‖Ŵ - W‖²   subject to   Ŵ in the pattern

Glossary (this code is out-major: rows of W are output units, so the paper's H⁻¹R is R H⁻¹ here):

    H    (in, in)    E(G + λ₂I)E with E = diag(G + λ₂I)^-½: unit diagonal; λ₂ = damping · mean(diag G)
    W    (out, in)   dense weight, scaled by E⁻¹
    R    (out, in)   W H
    B    (out, in)   ADMM's unconstrained copy of the weight
    D    (out, in)   ADMM's copy on the pattern
    V    (out, in)   dual variable of B = D
    ρ                penalty, growing; Q Λ Qᵀ = H serves every (H + ρI)⁻¹

One iteration:  B ← (R - V + ρD)(H + ρI)⁻¹,  D ← P(B + V/ρ),  V ← V + ρ(B - D).
The support is that of P(B) at the end; conjugate gradients (Algorithm 2 of the paper) then minimise the loss on it.

Differences from the released code, all deliberate:
- `schedule: geometric` (the default) multiplies ρ by `growth` every `update_every` iterations; `schedule: paper` is
  the released rule (`_paper_rho`).
- dead inputs are zeroed before the selection; there the ridge lets them survive and spend budget.
- the fit goes on until `pcg_tolerance`, at most `pcg_iterations`; there always 10 iterations, which end up to 2.6 %
  above the optimum on the support.
- one product with H per conjugate gradient step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .checks import require
from .errors import UserError, nearest
from .patterns import Pattern
from .problem import LayerProblem, Statistics
from .solver import Solution, Solver, Stopwatch

SCHEDULES = ("geometric", "paper")


@dataclass(frozen=True)
class Alps(Solver):
    """ALPS with its hyperparameters.

    Attributes:
        rho: initial penalty ρ.
        schedule: how ρ grows, "geometric" or "paper".
        growth: factor of the geometric schedule.
        update_every: iterations between updates of ρ and tests of the support.
        max_iterations: of ADMM.
        stop_rho: the geometric schedule goes on while ρ is below this, however stable the support: while ρ is small
            beside H's unit diagonal, the support rests although better ones are near.
        min_iterations: the paper's schedule goes on until then unless the support is unchanged.
        support_tolerance: ADMM stops once the support changed by less than this fraction of the kept weights between
            two tests.
        damping: λ₂ over the mean of the Gram matrix's diagonal.
        pcg_iterations: at most, of the fit on the support.
        pcg_tolerance: the fit stops once every row's residual is below this fraction of its first one.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    selection: ClassVar[str] = "layer"

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
    pcg_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        inf = float("inf")
        require("method.rho", self.rho, float, 0, 1e6, open_low=True)
        require("method.growth", self.growth, float, 1, 10, open_low=True)
        require("method.update_every", self.update_every, int, 1, inf)
        require("method.max_iterations", self.max_iterations, int, 1, inf)
        require("method.stop_rho", self.stop_rho, float, 0, 1e6)
        require("method.min_iterations", self.min_iterations, int, 0, inf)
        require("method.support_tolerance", self.support_tolerance, float, 0, 1)
        require("method.damping", self.damping, float, 0, 10, open_low=True)
        require("method.pcg_iterations", self.pcg_iterations, int, 0, inf)
        require("method.pcg_tolerance", self.pcg_tolerance, float, 0, 1)
        if self.schedule not in SCHEDULES:
            raise UserError(f"method.schedule={self.schedule!r} is not allowed; {nearest(self.schedule, SCHEDULES)}")

    def flops(self, rows: int, width: int) -> float:
        # A growing penalty ends after some 130 iterations at the defaults, where ρ has grown tenfold; eigh is 9 n³.
        iterations = min(self.max_iterations, self.update_every * (math.log(10) / math.log(self.growth)))
        inverses = iterations / self.update_every * 2 * width**3
        return 9 * width**3 + inverses + (iterations + 10) * 2 * rows * width**2

    def solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        watch = Stopwatch(problems[0].weight.device)
        scaled = ScaledGram(problems[0], self.damping)
        layers = [
            _Layer(scaled, problem, pattern, self.rho) for problem, pattern in zip(problems, patterns, strict=True)
        ]
        shared = {"factorisation": watch.lap("factorisation")}
        for iteration in range(1, self.max_iterations + 1):
            active = [layer for layer in layers if not layer.stopped]
            if not active:
                break
            for layer in active:
                layer.step(scaled)
                if iteration % self.update_every == 0:
                    self._test_support(layer, iteration)
        shared["admm"] = watch.lap("admm")

        solutions = []
        for layer in layers:
            support = layer.pattern.keep(layer.b.abs())
            weight, steps = fit_on_support(
                scaled.gram, layer.w, support, layer.b * support, self.pcg_iterations, self.pcg_tolerance
            )
            weight = scaled.unscale(weight)
            support &= ~scaled.dead
            seconds = {phase: spent / len(layers) for phase, spent in shared.items()}
            seconds["pcg"] = watch.lap("pcg")
            solutions.append(
                Solution(
                    weight=weight,
                    support=support,
                    status="converged" if layer.stopped else "max_iterations",
                    iterations=layer.iterations,
                    seconds=seconds,
                    stats={"rho": layer.rho, "pcg_iterations": steps, "schedule": self.schedule},
                )
            )
        return solutions

    def _test_support(self, layer: _Layer, iteration: int) -> None:
        changed, kept = layer.support_change()
        stable = changed <= self.support_tolerance * kept
        if self.schedule == "paper":
            layer.stopped = _paper_rho(layer, changed / max(kept, 1)) or (stable and iteration >= self.min_iterations)
        else:
            layer.stopped = stable and layer.rho >= self.stop_rho
            if not layer.stopped:
                layer.rho = min(layer.rho * self.growth, 1e6)


class ScaledGram:
    """H = E(G + λ₂I)E with unit diagonal, and its eigendecomposition, which serves every ρ.

    Args:
        problem: any of the layers that share the Gram matrix.
        damping: λ₂ over mean(diag G).
    """

    def __init__(self, problem: LayerProblem, damping: float) -> None:
        problem.require(Statistics.GRAM)
        self.dead = problem.dead
        ridge = damping * float(problem.diagonal.mean())
        diagonal = problem.diagonal + (ridge if ridge > 0 else 1.0)
        self._e = diagonal.rsqrt()
        self.gram = problem.gram * self._e * self._e[:, None]
        self.gram.diagonal().fill_(1.0)
        self._rho, self._inverse = None, None
        self._eigen = None

    def scale(self, weight: Tensor) -> Tensor:
        """E⁻¹W, without the dead inputs."""
        return (weight / self._e).masked_fill(self.dead, 0)

    def unscale(self, weight: Tensor) -> Tensor:
        """The inverse of `scale`; dead inputs stay zero."""
        return (weight * self._e).masked_fill(self.dead, 0)

    def inverse(self, rho: float) -> Tensor:
        """(H + ρI)⁻¹, kept until another ρ is asked for: layers in lockstep share it."""
        if rho != self._rho:
            if self._eigen is None:
                self._eigen = torch.linalg.eigh(self.gram)
            values, vectors = self._eigen
            root = vectors * (values.clamp_min(0) + rho).rsqrt()
            self._rho, self._inverse = rho, root @ root.T
        return self._inverse


class _Layer:
    """ADMM's state for one layer."""

    def __init__(self, scaled: ScaledGram, problem: LayerProblem, pattern: Pattern, rho: float) -> None:
        pattern.check(tuple(problem.weight.shape), problem.name)
        self.pattern = pattern
        self.rho = rho
        self.w = scaled.scale(problem.weight)
        self.r = self.w @ scaled.gram
        self.iterations = 0
        self.stopped = False
        self.shrinking = True  # the paper's rule: no large change of the support was seen yet
        self.remembered = pattern.keep(self.w.abs())
        self.restart()

    def restart(self) -> None:
        """B, D, V at the dense point."""
        self.support = self.pattern.keep(self.w.abs())
        self.b = self.w
        self.d = self.w * self.support
        self.v = torch.zeros_like(self.w)

    def step(self, scaled: ScaledGram) -> None:
        self.b = torch.add(self.r - self.v, self.d, alpha=self.rho) @ scaled.inverse(self.rho)
        target = torch.add(self.b, self.v, alpha=1 / self.rho)
        self.support = self.pattern.keep(target.abs())
        self.d = target * self.support
        self.v = (target - self.d).mul_(self.rho)  # V + ρ(B - D)
        self.iterations += 1

    def support_change(self) -> tuple[int, int]:
        """How many positions of the support differ from the last call's, and how many it has."""
        changed = int((self.support ^ self.remembered).sum())
        self.remembered = self.support
        return changed, int(self.support.sum())


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


def fit_on_support(
    gram: Tensor, dense: Tensor, support: Tensor, start: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    """Conjugate gradients on a fixed support: min tr((W - Ŵ) H (W - Ŵ)ᵀ) over Ŵ zero outside `support`.

    All rows at once, each with its own step sizes. No preconditioner: H is meant to have a unit diagonal, for which
    Jacobi's is the identity.

    Args:
        gram: (in, in) H, symmetric positive definite.
        dense: (out, in) W.
        support: (out, in) bool.
        start: (out, in), zero outside the support.
        iterations: at most this many products with H after the first.
        tolerance: stop once every row's residual norm is below this fraction of the norm of its W H on the support.

    Returns:
        Ŵ and the number of iterations made.
    """
    weight = start
    residual = ((dense - weight) @ gram) * support
    scale = ((dense @ gram) * support).square().sum(1) * tolerance**2
    direction = residual
    energy = residual.square().sum(1)
    for step in range(iterations):
        if not bool((energy > scale).any()):
            return weight, step
        product = (direction @ gram) * support
        curvature = (direction * product).sum(1)
        alpha = torch.where(curvature > 0, energy / curvature, 0.0)
        weight = torch.addcmul(weight, alpha[:, None], direction)
        residual = torch.addcmul(residual, alpha[:, None], product, value=-1)
        fresh = residual.square().sum(1)
        beta = torch.where(energy > 0, fresh / energy, 0.0)
        direction = torch.addcmul(residual, beta[:, None], direction)
        energy = fresh
    return weight, iterations
