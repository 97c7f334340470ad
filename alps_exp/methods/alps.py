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
- (H + ρI)⁻¹ is interpolated between Cholesky inverses, on a GPU made of one and its powers, and products are in low
  precision where that hardly changes a loss; there one eigendecomposition serves all in float32 (`exact: true`
  factorises for every ρ, in full precision).
- damping is 0.003; there 0.01.
- dead inputs are zeroed before the selection; there the ridge lets them survive and spend budget.
- the fit goes on until `pcg_tolerance`, at most `pcg_iterations`; there always 10 iterations, which end up to 2.6 %
  above the optimum on the support.
- one product with H per conjugate gradient step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..base.checks import one_of, require
from ..base.clock import Stopwatch
from ..base.errors import UserError, first_line, nearest
from ..base.fallbacks import fell_back
from ..layer.inputs import Inputs
from ..layer.problem import LayerProblem, Statistics, power_of_two
from ..layer.scaled import ScaledGram
from ..layer.solver import Solution, Solver
from ..layer.trace import Trace
from ..numerics.fit import fit_on_support
from ..numerics.kernels import kernel_for
from ..numerics.precision import EIGHT, Multiplier, eight_product, eights, fast_products, halves, low_precision
from ..numerics.resolvent import NODES, Resolvent, first_node, multiplies
from ..patterns import Pattern
from ..patterns.tracker import Tracker
from .recorded import forget, recording_for

SCHEDULES = ("geometric", "paper")

# In half precision, differences of weights are brought to this size, and ρ(H + ρI)⁻¹, which is below 1, to this one.
_UNIT, _LIFT = 64.0, 2.0**14
# In float8, differences of weights are multiplied by the first, so that what is above 28 of 128 waits for the next
# product, and ρ(H + ρI)⁻¹ off the diagonal is brought to the second. Below that many inputs nothing is gained: it takes
# two more passes over the weights.
_EIGHT_UNIT, _EIGHT_LIFT, _EIGHT_INPUTS = 16.0, 512.0, 4096


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
            resolvent is interpolated and most products run in float8, float16, bfloat16 or TF32 where the device
            has them.
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
        # (n³/3), a triangular inverse and its Gram matrix (2/3 n³ each). On a GPU it is one of them and three products
        # of which half is made, 5.0 n³ for 6.7.
        tenfold = math.log(10) / math.log(self.growth) if self.growth > 1 else math.inf
        iterations = min(self.max_iterations, self.update_every * tenfold)
        return 4 * (5 / 3) * width**3 + (iterations + 10) * 2 * rows * width**2

    def parts(self, device: torch.device) -> int:
        return 0 if self.exact or multiplies(device) else NODES

    def make_parts(self, inputs: Inputs, indices: Sequence[int]) -> list[Tensor]:
        scaled = ScaledGram(inputs, self.damping)
        with fast_products(inputs.gram.device):
            return [first_node(scaled.gram, self.rho, index, inputs.name) for index in indices]

    def _solve_group(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> list[Solution]:
        return self._solve_batch([problems], patterns)[0]

    def _solve_alike(
        self, groups: Sequence[Sequence[LayerProblem]], patterns: Sequence[Pattern]
    ) -> list[list[Solution]]:
        if not launches(groups[0][0].weight.device) or self.schedule == "paper" or self.trace:
            return super()._solve_alike(groups, patterns)
        return self._solve_batch(groups, patterns)

    def _solve_batch(
        self, groups: Sequence[Sequence[LayerProblem]], patterns: Sequence[Pattern]
    ) -> list[list[Solution]]:
        """Groups of layers of the same shapes and patterns, each with a Gram matrix, in one stack."""
        device = groups[0][0].weight.device
        watch = Stopwatch(device)
        exact = self.exact or groups[0][0].weight.dtype == torch.float64
        leaders = [problems[0] for problems in groups]
        inputs = [problem.inputs for problem in leaders]
        scaled = ScaledGram(inputs if len(groups) > 1 else inputs[0], self.damping)
        name = leaders[0].name if len(groups) == 1 else [problem.name for problem in leaders]
        resolvent = Resolvent(scaled.gram, self.rho, exact, name, inputs[0].elsewhere)
        with nullcontext() if exact else fast_products(device):
            columns = list(zip(zip(*groups, strict=True), patterns, strict=True))
            # One by one where nothing is gained by less launches, or where ρ follows each layer's own support.
            together = [columns] if launches(device) and self.schedule != "paper" else [[one] for one in columns]
            stacks = [_Stack(scaled, resolvent, own, self.rho, exact) for own in together]
            layers = [layer for stack in stacks for layer in stack.layers]
            traces = [Trace(layer.problem) for layer in layers] if self.trace else []
            self._iterate(stacks, scaled, traces)
        resolvent.free()
        shared = {"factorisation": resolvent.seconds, "admm": watch.lap("admm") - resolvent.seconds}
        shared = {phase: spent / len(layers) for phase, spent in shared.items()}
        multiply = Multiplier(scaled.gram, exact)

        solutions = []
        for stack in stacks:
            for column in stack.columns():
                support = torch.stack([layer.pattern.keep(layer.b.abs()) for layer in column])
                start = torch.stack([layer.b for layer in column]).masked_fill_(~support, 0)
                dense = stack.w[..., column[0].rows, :]
                if dense.ndim == 2:
                    support, start = support[0], start[0]
                weight, steps = fit_on_support(multiply, dense, support, start, self.pcg_iterations, self.pcg_tolerance)
                weight = scaled.unscale(weight * stack.by_layer(column, "unit")) * stack.by_layer(column, "factor")
                support = support & ~scaled.dead
                weight, support = (value.reshape(len(column), *value.shape[-2:]) for value in (weight, support))
                spent = watch.lap("pcg") / len(column)
                for index, layer in enumerate(column):
                    _, iterations, rho = layer.state
                    solutions.append(
                        Solution(
                            weight=weight[index],
                            support=support[index],
                            status="converged" if layer.stopped else "max_iterations",
                            iterations=iterations,
                            seconds=shared | {"pcg": spent},
                            stats={
                                "rho": rho,
                                "pcg_iterations": steps[index] if isinstance(steps, list) else steps,
                                "schedule": self.schedule,
                            }
                            | layer.stats()
                            | (traces[len(solutions)].stats() if traces else {}),
                        )
                    )
        # They came layer by layer, each of all groups.
        return [solutions[number :: len(groups)] for number in range(len(groups))]

    def _iterate(self, stacks: Sequence[_Stack], scaled: ScaledGram, traces: Sequence[Trace]) -> None:
        """ADMM on all stacks in lockstep, so that they share the resolvent at every ρ, until each layer has stopped."""
        layers = [layer for stack in stacks for layer in stack.layers]
        traced = dict(zip(layers, traces, strict=True)) if traces else {}
        first = 1 if traces or self.schedule == "paper" else self._replayed(stacks[0]) + 1
        for iteration in range(first, self.max_iterations + 1):
            active = [stack for stack in stacks if stack.active]
            if not active:
                return
            for stack in active:
                stack.step()
                for layer in stack.active if traced else ():
                    traced[layer].add(scaled.unscale(layer.d * layer.unit) * layer.factor, layer.support, stack.rho)
                if iteration % self.update_every == 0:
                    self._test_support(stack, iteration, stack.changes())

    def _replayed(self, stack: _Stack) -> int:
        """The first iterations of small layers on a GPU, if such were solved before; returns how many."""
        if not stack.w.is_cuda or stack.exact:
            return 0
        stack.resolvent.half_at(stack.rho, _LIFT)  # factorised here, where the time is told
        try:
            if (recording := recording_for(stack, self.growth, self.update_every)) is None:
                return 0
            for number in range(self.max_iterations // self.update_every):
                if not stack.active or not stack.resolvent.covers(stack.rho):
                    break
                self._test_support(stack, stack.iterations + self.update_every, recording.advance(stack, number))
        except RuntimeError as error:  # most likely for want of memory; the stack is where the last replay has left it
            forget()
            fell_back(f"small layers are solved without recorded iterations, which is slower ({first_line(error)})")
        return stack.iterations

    def _test_support(self, stack: _Stack, iteration: int, changes: Tensor) -> None:
        ending = []
        for layer, (changed, kept) in zip(stack.layers, changes.tolist(), strict=True):
            if layer.stopped:
                continue
            stable = changed <= self.support_tolerance * kept
            if self.schedule == "paper":
                ended = _paper_rho(stack, changed / max(kept, 1)) or (stable and iteration >= self.min_iterations)
            else:
                ended = stable and (stack.rho >= self.stop_rho or self.growth == 1)
            ending += [layer] if ended else []
        stack.end(ending)
        if self.schedule != "paper" and stack.active:
            stack.rho = min(stack.rho * self.growth, 1e6)


class _Layer:
    """One layer of a stack.

    Attributes:
        problem, pattern: what is to be solved.
        rows: its rows in the stack.
        factor: W was divided by this.
        unit: and scaled, by this.
        stopped: its support no longer changes.
    """

    def __init__(self, stack: _Stack, place: tuple[int, ...], rows: slice, problem: LayerProblem, pattern: Pattern):
        self._stack, self._place = stack, (*place, rows)
        self.problem, self.pattern, self.rows = problem, pattern, rows
        self.factor = self.unit = 1.0
        self.stopped = False
        self._ended: tuple[Tensor, int, float] | None = None
        quick = pattern.tracker()
        self._fast = quick.fast
        self.tracker = Tracker(pattern) if stack.exact else quick

    def part(self, state: Tensor) -> Tensor:
        """(out, in) of this layer, a contiguous view."""
        return state[self._place]

    @property
    def state(self) -> tuple[Tensor, int, float]:
        """(out, in) B, scaled; the iterations that were made, and ρ; as they were when the layer stopped."""
        stack = self._stack
        return self._ended if self._ended is not None else (self.part(stack.b), stack.iterations, stack.rho)

    @property
    def b(self) -> Tensor:
        """(out, in) B, scaled."""
        return self.state[0]

    @property
    def d(self) -> Tensor:
        """(out, in) D, scaled."""
        return self.part(self._stack.target) * self.support

    @property
    def support(self) -> Tensor:
        """(out, in) of D."""
        return self.part(self._stack.support)

    def end(self, keep: bool) -> None:
        """No more iterations.

        Args:
            keep: others of the stack go on, so that B must be copied.
        """
        b, *others = self.state
        self.stopped, self._ended = True, (b.clone() if keep else b, *others)

    def stats(self) -> dict:
        """What the record says of how supports were selected: nothing of the patterns that have a fast way."""
        return {"projection": "plain"} if not self._fast or self._stack.unfused else {}


class _Stack:
    """ADMM's state for layers under one ρ: (rows, in) of layers that share a Gram matrix, one below the other, or
    (groups, rows, in) of several such groups of the same shapes.

    D and V/ρ vanish where the other does not, so T = B + V/ρ of the last iteration and its support hold both: D is T
    on the support, V/ρ is T elsewhere.

    B is computed as W + (ρ(D - W) - V)(H + ρI)⁻¹, the same in exact arithmetic: what is multiplied is then the small
    difference from W, and R is not needed. Within one ρ, B changes by ρ(2D - B - D_former)(H + ρI)⁻¹, which is smaller
    still: low precision serves that product as well as float32 would. At every new ρ, B is computed afresh, on
    a GPU from factors in half precision, which has TF32's ten bits of mantissa at twice its rate. Powers of two keep
    both within its range: the weights carry their product.

    Layers that have stopped are carried along until all have; what they were is kept.

    Args:
        columns: layers that lie at the same place in each group, and their pattern.
    """

    def __init__(
        self,
        scaled: ScaledGram,
        resolvent: Resolvent,
        columns: Sequence[tuple[Sequence[LayerProblem], Pattern]],
        rho: float,
        exact: bool,
    ) -> None:
        self.rho, self.exact, self.iterations = rho, exact, 0
        self.shrinking = True  # the paper's rule: no large change of the support was seen yet
        self.resolvent = resolvent
        device, self._groups = scaled.gram.device, len(columns[0][0])
        self._low = None if exact else low_precision(device)
        self._halves = self._low is not None and halves(device)
        if self._halves:
            self._low = torch.float16
        self.layers: list[_Layer] = []
        end = 0
        for problems, pattern in columns:
            rows = slice(end, end := end + problems[0].weight.shape[0])
            for number, problem in enumerate(problems):
                place = (number,) if self._groups > 1 else ()
                self.layers.append(_Layer(self, place, rows, problem, pattern))
        # Exact factors that bring the weights near 1: squares of 1e-20 and 1e20 do not fit float32.
        self._measure("factor", [layer.problem.weight for layer in self.layers])
        weights = [layer.problem.weight / layer.factor for layer in self.layers]
        if len(weights) > 1:
            weights = [torch.cat(weights[number :: self._groups]) for number in range(self._groups)]
        self.w = scaled.scale(torch.stack(weights) if self._groups > 1 else weights[0])
        del weights
        self._measure("unit", [layer.part(self.w) for layer in self.layers])
        for layer in self.layers:
            layer.unit /= _UNIT * _LIFT if self._halves else 1
            layer.part(self.w).div_(layer.unit)
        self._prepare_eights()
        self._step = self._rule()
        self.restart()
        self.remembered = self.support.clone()

    def _measure(self, name: str, weights: Sequence[Tensor]) -> None:
        for layer, largest in zip(self.layers, torch.stack([w.abs().max() for w in weights]).tolist(), strict=True):
            setattr(layer, name, power_of_two(largest))

    @property
    def unfused(self) -> bool:
        """Whether there are kernels, but none for these layers together."""
        return self._low is not None and self.w.is_cuda and self._step is None

    @property
    def active(self) -> list[_Layer]:
        """The layers that have not stopped."""
        return [layer for layer in self.layers if not layer.stopped]

    def columns(self) -> list[list[_Layer]]:
        """The layers that lie at the same place in each group."""
        return [self.layers[begin : begin + self._groups] for begin in range(0, len(self.layers), self._groups)]

    def by_layer(self, column: Sequence[_Layer], name: str) -> Tensor | float:
        """A number of each layer, to multiply their weights by."""
        values = [getattr(layer, name) for layer in column]
        return self.w.new_tensor(values)[:, None, None] if len(values) > 1 else values[0]

    def restart(self) -> None:
        """B, D, V at the dense point."""
        self.support = self._chosen(lambda layer, score: layer.pattern.keep(score), self.w)
        self.b = self.w
        self.target = self.w * self.support
        self._target_rho = self.rho
        self._change: Tensor | None = None

    def _chosen(self, choose: Callable[[_Layer, Tensor], Tensor], state: Tensor) -> Tensor:
        if len(self.layers) == 1:
            return choose(self.layers[0], state.abs())
        support = torch.empty_like(state, dtype=torch.bool)
        for layer in self.layers:
            layer.part(support).copy_(choose(layer, layer.part(state).abs()))
        return support

    def step(self) -> None:
        """One iteration."""
        if self._change is not None and self._target_rho == self.rho:
            self.b = self._next_b()
        else:
            self.b = self._restarted_b()
            if self._eights:
                self._rest.zero_()
        self._select()
        self.iterations += 1

    def _restarted_b(self) -> Tensor:
        # With V = ρ_former(T - D), ρ(D - W) - V is (ρ + ρ_former)D - ρ_former T - ρW.
        own, former = self._factor, self._target_rho * (self._factor / self.rho)
        difference = (self.target * self.support).mul_(own + former)
        difference.sub_(self.target, alpha=former).sub_(self.w, alpha=own)
        if self._halves:
            return self._corrected(self.w, difference.half())
        return (difference @ self.resolvent.at(self.rho)).add_(self.w)

    def _prepare_eights(self) -> None:
        """Whether corrections are multiplied in float8, at twice the rate of halves.

        With three bits of mantissa the loss would be 0.2 % higher. It is not where the resolvent's diagonal is kept
        in float32, and what rounding leaves over of a change goes with the next one.
        """
        width = self.w.shape[-1]
        apart = self._halves and self.w.ndim == 2 and width >= _EIGHT_INPUTS and width % 16 == len(self.w) % 16 == 0
        self._eights = apart and eights(self.w.device)
        if self._eights:
            kernels = [kernel_for(self.w.device, name) for name in ("rounded", "add_correction")]
            self._eights = None not in kernels
        if self._eights:
            self._rounded, self._add_correction = kernels
            self._rest = torch.empty_like(self.w, dtype=self._low)
            self._eight = torch.empty_like(self.w, dtype=EIGHT)
            self._eight_scale = self.w.new_tensor(_LIFT / _EIGHT_LIFT / _EIGHT_UNIT)

    def _next_b(self) -> Tensor:
        if not self._eights:
            return self._corrected(self.b, self._change)
        right, diagonal = self.resolvent.eight_at(self.rho, _LIFT, _EIGHT_LIFT)
        self._rounded(self._change, self._rest, self._eight, _EIGHT_UNIT)
        product = eight_product(self._eight, right, self._eight_scale)
        self._add_correction(self.b, product, self._eight, diagonal * (_LIFT / _EIGHT_UNIT))
        return self.b

    @property
    def _factor(self) -> float:
        """What differences of weights are multiplied by before the resolvent: ρ, where that is not in the resolvent."""
        return 1 / _LIFT if self._halves else self.rho

    def _corrected(self, base: Tensor, difference: Tensor) -> Tensor:
        """base + difference · (H + ρI)⁻¹, of a difference in low precision that was multiplied by `_factor`."""
        if self._halves:
            return _add_product(base, difference, self.resolvent.half_at(self.rho, _LIFT))
        return _add_product(base, difference, self.resolvent.low_at(self.rho, self._low))

    def _select(self) -> None:
        """D and V for the new B. The support of an iterate need not have exactly its count; that of the result has."""
        scale = self._target_rho / self.rho
        if self._step is not None:
            if self._change is None:
                self._change = torch.empty_like(self.b, dtype=self._low)
            self._step(self.b, self.target, self.support, scale, self._factor, self._change)
        else:
            former = self.target * self.support
            target = torch.add(self.b, torch.sub(self.target, former), alpha=scale)
            self.support = self._chosen(lambda layer, score: layer.tracker(score), target)
            if self._low is not None:
                change = (target * self.support).mul_(2).sub_(self.b).sub_(former)
                self._change = change.mul_(self._factor).to(self._low)
            self.target = target
        self._target_rho = self.rho

    def _rule(self) -> Callable[..., None] | None:
        """How a kernel selects the supports of all layers in one pass over memory, if the patterns' rules allow."""
        if self._low is None:
            return None
        kernel = partial(kernel_for, self.w.device)
        layers = sorted(self.layers, key=lambda layer: layer.part(self.w).storage_offset())
        trackers = [layer.tracker for layer in layers]
        if (group := trackers[0].group) and all(tracker.group == group for tracker in trackers):
            step = kernel("group_step") if trackers[0].fast else None
            return None if step is None else partial(step, group=group)
        if (own := trackers[0].kernel) is not None:
            heights = [layer.problem.weight.shape[0] for layer in layers]
            step = trackers[0].step(self.w.device, heights) if kernel(own) is not None else None
            return step if all(layer.pattern == layers[0].pattern for layer in layers) else None
        sizes = [layer.part(self.w).numel() for layer in layers]
        strides = [tracker.stride(layer.part(self.w)) for tracker, layer in zip(trackers, layers, strict=True)]
        if None in strides or (apart := kernel("threshold_step")) is None:
            return None
        from ..numerics.triton_kernels import SELECTED, Segments

        large = any(size > stride * SELECTED for size, stride in zip(sizes, strides, strict=True))
        if large or (step := kernel("sampled_step")) is None:
            return partial(self._sampled_step, apart, list(zip(layers, trackers, strides, strict=True)))
        sparsities = [tracker.sparsity for tracker in trackers]
        return partial(step, segments=Segments(sizes, sparsities, strides, self.w.device))

    def _sampled_step(
        self, step: Callable, sampled: Sequence[tuple[_Layer, Tracker, int]], *state: Tensor | float
    ) -> None:
        """The same layer by layer, with thresholds from samples that are too large for a kernel."""
        for layer, tracker, stride in sampled:
            b, target, support, scale, rho, change = (
                layer.part(part) if isinstance(part, Tensor) else part for part in state
            )
            taken = (part.reshape(-1)[::stride] for part in (b, target, support))
            sample = _sampled(*taken, scale)
            kept = step(b, target, support, scale, rho, change, tracker.threshold(sample))
            tracker.observe(kept, b.numel(), stride)

    def changes(self) -> Tensor:
        """(layers, 2): at how many places each layer's support differs from what it was at the last call, and how many
        entries it has."""
        # Row by row first, so that the sums of many layers are few passes.
        rows = [part.sum(-1) for part in (self.support ^ self.remembered, self.support)]
        self.remembered.copy_(self.support)
        counts = [[row[..., column[0].rows].sum(-1).view(-1) for row in rows] for column in self.columns()]
        return torch.stack([torch.stack(column, -1) for column in counts]).view(-1, 2)

    def repeated(self, b: Tensor, iterations: int) -> None:
        """A recording has made some iterations on this stack's state.

        Args:
            b: B after them.
            iterations: how many.
        """
        self.b, self._change, self._target_rho = b, None, self.rho
        self.iterations += iterations

    def counters(self) -> list[Tensor] | None:
        """What kernels remember of former iterations beside the state; None where not all is done by kernels."""
        if not isinstance(self._step, partial) or self._step.func == self._sampled_step:
            return None
        segments = self._step.keywords.get("segments")
        return [] if segments is None else [segments.ranks, segments.kept]

    @property
    def description(self) -> tuple:
        """What iterations depend on beside the numbers in memory."""
        layers = tuple((layer.rows.start, layer.rows.stop, layer.pattern) for layer in self.layers)
        return self.w.device, tuple(self.w.shape), layers, self.rho

    def end(self, layers: Sequence[_Layer]) -> None:
        """Stop these layers."""
        others = len(self.active) > len(layers)
        for layer in layers:
            layer.end(others)


def _sampled(b: Tensor, target: Tensor, support: Tensor, scale: float) -> Tensor:
    """|B + V/ρ| of the next iteration, of a sample of entries."""
    return torch.where(support, 0, target).mul_(scale).add_(b).abs_()


def launches(device: torch.device) -> bool:
    """Whether launching work takes time there beside the work, so that layers are solved in one stack."""
    return device.type == "cuda"


def _add_product(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base + a @ b of low-precision factors in float32, without rounding the product where the device can."""
    if a.is_cuda:
        return (torch.addmm if a.ndim == 2 else torch.baddbmm)(base, a, b, out_dtype=torch.float32)
    return (a @ b).float().add_(base)


def _paper_rho(stack: _Stack, change: float) -> bool:
    """One update of ρ by the released code's rule; True when ADMM is done.

    Before any change above 0.5 % was seen, ρ is taken to be too large: it shrinks by 5 and B, D, V restart (the code
    does this, the paper does not mention it).
    """
    if change > 0.005:
        stack.shrinking = False
    if stack.shrinking:
        stack.rho /= 5
        if change > 0:
            stack.restart()
        return False
    if change == 0:
        return True
    stack.rho = min(stack.rho * (1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1), 1e6)
    return False
