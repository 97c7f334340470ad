"""OSSCAR: whole channels and heads leave, the few that cost least at a time (Meng et al., ICML 2024).

    H    (in, in)    G + λI, λ = damping · mean(diag G), of the writer (down_proj, o_proj), in float64 like all below
    W    (in, out)   its weight, in-major; it changes with every removal
    A    (in, in)    H⁻¹ on the kept inputs, zero elsewhere
    g                the inputs of a unit: one channel, or the queries that share a head of keys and values

The loss tr((W - Ŵ)ᵀ H (W - Ŵ)) grows by twice the score ½ tr(W_gᵀ (A_gg)⁻¹ W_g) when g leaves and the others make up
for it. Of the units that are to go, `channels_at_once` (or `heads_at_once`) with the lowest scores go in a step, S
together:

    W ← W - A_:S (A_SS)⁻¹ W_S,    A ← A - A_:S (A_SS)⁻¹ A_S:

At the end the kept inputs are fitted to the dense weights, H_KK Ŵ_K = (H W)_K. With `swaps`, a unit that left comes
back for one that stays as long as this lowers the loss: the units that left are tried in the order of what their return
gains, each against the kept unit that is then the cheapest. A layer ends when no such pair lowers the loss, or after so
many.

Differences from the released code:
- a head of keys and values goes with all queries that attend to it, so that it really leaves; rows and biases of the
  layers before (q, k and v; gate and up, or fc1) become zero, too.
- inputs that are always zero are not treated apart: the damping makes them the cheapest.
- of the two streams of `--fullseq` there is only the one through the pruned model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from alps_exp.base.checks import one_of, require
from alps_exp.base.clock import Stopwatch
from alps_exp.base.errors import UserError
from alps_exp.layer.problem import Inputs, LayerProblem, Statistics
from alps_exp.layer.solver import Solution
from alps_exp.model.parts import Units
from alps_exp.patterns import Pattern
from alps_exp.pruning.block import BlockProblem
from alps_exp.pruning.capture import capture, thriftily
from alps_exp.pruning.method import BlockMethod
from alps_exp.pruning.structured import asked_units, check_units, kept_of, settle_units


@dataclass(frozen=True)
class Osscar(BlockMethod):
    """OSSCAR with its hyperparameters.

    Attributes:
        channels_at_once, heads_at_once: units that leave in one step, at most.
        damping: λ over the mean of the Gram matrix's diagonal.
        swaps: of units, at most, in each layer.
        parallel: heads and channels see the inputs of the dense block; otherwise channels those behind pruned heads.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    selection: ClassVar[str] = "channels or heads"
    kinds: ClassVar[frozenset[str] | None] = frozenset({"unstructured"})
    shares: ClassVar[bool] = False
    structured: ClassVar[bool] = True

    channels_at_once: int = 10
    heads_at_once: int = 2
    damping: float = 0.01
    swaps: int = 0
    parallel: bool = False

    def __post_init__(self) -> None:
        require("method.channels_at_once", self.channels_at_once, int, 1, float("inf"))
        require("method.heads_at_once", self.heads_at_once, int, 1, float("inf"))
        require("method.damping", self.damping, float, 0, 10)
        require("method.swaps", self.swaps, int, 0, float("inf"))
        one_of("method.parallel", self.parallel, (True, False))

    def block_work(self, shapes: Mapping[str, tuple[int, int]], tokens: int) -> tuple[float, float]:
        rows, width = max(shapes.values(), key=lambda shape: shape[1])
        # An inverse, the removal of half the inputs, and the fit; matrices and weights in float64.
        return 2 * width**3 + width * (width**2 + rows * width) + width**3 / 3, 8 * (4 * width**2 + 3 * rows * width)

    def for_model(self, model: nn.Module, patterns: Mapping[str, Pattern]) -> Osscar:
        check_units(model, patterns)
        return self

    def run(self, block: BlockProblem) -> None:
        asked = asked_units(block.module, block.name, block.job.patterns)
        # Windows that go through the dense model are behind the block once its first weights change.
        together = self.parallel or block.job.propagate == "dense"
        for step in [asked] if together else [[one] for one in asked]:
            if not step:
                continue
            groups = capture(block, [f"{block.name}.{units.writer}" for units, _ in step])
            block.watch.lap("calibrate")
            inputs = {names[0]: found for names, found in groups}
            for units, pattern in step:
                self._prune(block, units, kept_of(units.count, pattern.sparsity), inputs)
            block.watch.lap("solve")

    def _prune(self, block: BlockProblem, units: Units, kept: int, inputs: Mapping[str, Inputs]) -> None:
        name = f"{block.name}.{units.writer}"
        few = self.channels_at_once if units.kind == "channels" else self.heads_at_once
        while True:
            try:
                found = inputs[name].to(block.model.device)
                problem = LayerProblem(block.layers[name].weight.float(), found, name)
                stay, solution = remove(problem, units.width, kept, few, self.damping, self.swaps)
                break
            except torch.OutOfMemoryError:
                found = problem = None
            block.tools.ladder.for_solving(block.name, block.streams.states, 1)
            inputs = {names[0]: found for names, found in thriftily(block, [([n], i) for n, i in inputs.items()])}
        settle_units(block, units, found, stay, solution)


def remove(
    problem: LayerProblem, width: int, kept: int, few: int, damping: float, swaps: int = 0
) -> tuple[Tensor, Solution]:
    """Which units stay, (units,) bool, and the weight without the others.

    Args:
        problem: the writer's.
        width: inputs of a unit.
        kept: how many units stay.
        few: units that leave in one step, at most.
        damping: λ over the mean of the Gram matrix's diagonal.
        swaps: at most so many.
    """
    watch = Stopwatch(problem.weight.device)
    state = _State(problem, width, damping)
    going = state.count - kept
    for size in (len(part) for part in torch.arange(going).tensor_split(max(-(-going // few), 1))):
        if size:
            state.remove(state.scores().topk(size, largest=False).indices)
    watch.lap("removal")
    made, open_ = 0, True
    while open_ and made < swaps and 0 < kept < state.count:
        open_ = state.swap()
        made += open_
    if swaps:
        watch.lap("swaps")
    weight = state.fitted().to(problem.weight.dtype)
    watch.lap("refit")
    stay = state.stay.clone()
    support = stay.repeat_interleave(width)[None, :].expand(weight.shape)
    stats = {"swaps": made} if swaps else {}
    status = "max_iterations" if open_ and swaps else "exact"
    return stay, Solution(weight, support, status, going, dict(watch.seconds), stats)


class _State:
    """W and A as units leave.

    Attributes:
        count: units.
        stay: (units,) bool.
    """

    def __init__(self, problem: LayerProblem, width: int, damping: float) -> None:
        self._width, self.count = width, problem.weight.shape[1] // width
        self.stay = torch.ones(self.count, dtype=torch.bool, device=problem.weight.device)
        self._h = problem.gram.double()
        self._h = (self._h + self._h.T) / 2
        # Without any input all weights are as good as none, and no unit is better than another.
        self._h.diagonal().add_(damping * float(problem.diagonal.double().mean()) or float(not problem.gram.any()))
        self._dense = problem.weight.double().T.contiguous()
        self._w = self._dense.clone()
        factor, info = torch.linalg.cholesky_ex(self._h)
        if int(info):
            raise UserError(
                f"{problem.name}: the Gram matrix with damping {damping:g} is not positive definite; raise "
                "method.damping or calibrate on more windows"
            )
        self._a = torch.cholesky_inverse(factor)

    def _inputs(self, units: Tensor) -> Tensor:
        """Indices of the units' inputs."""
        offsets = torch.arange(self._width, device=units.device)
        return (units[:, None] * self._width + offsets).flatten()

    def _blocks(self, matrix: Tensor) -> Tensor:
        """(units, width, width): the units' own parts of (in, in)."""
        parts = matrix.view(self.count, self._width, self.count, self._width)
        return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def scores(self, blocks: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """(units,) ½ tr(W_gᵀ (A_gg)⁻¹ W_g), infinite for units that left.

        Args:
            blocks: (units, width, width) A_gg, in place of those here.
            weight: (in, out) W, likewise.
        """
        blocks = self._blocks(self._a) if blocks is None else blocks
        weight = self._w if weight is None else weight
        if self._width == 1:
            found = weight.square().sum(1) / (2 * blocks[:, 0, 0])
        else:
            blocks = torch.where(
                self.stay[:, None, None], blocks, torch.eye(self._width, device=blocks.device).double()
            )
            parts = weight.view(self.count, self._width, -1)
            found = torch.cholesky_solve(parts, torch.linalg.cholesky(blocks)).mul_(parts).sum((1, 2)) / 2
        return found.masked_fill(~self.stay, torch.inf)

    def remove(self, units: Tensor) -> None:
        """Take these units out."""
        s = self._inputs(units)
        columns = self._a[:, s]
        factor = torch.linalg.cholesky(columns[s])
        self._w.addmm_(columns, torch.cholesky_solve(self._w[s], factor), alpha=-1)
        self._a.addmm_(columns, torch.cholesky_solve(columns.T, factor), alpha=-1)
        self._w[s], self._a[s], self._a[:, s] = 0, 0, 0
        self.stay[units] = False

    def fitted(self) -> Tensor:
        """(out, in): the dense weight fitted on the units that stay."""
        k = self._inputs(self.stay.nonzero().squeeze(1))
        weight = torch.zeros_like(self._dense)
        if len(k):
            right = self._h[k] @ self._dense
            weight[k] = torch.cholesky_solve(right, torch.linalg.cholesky(self._h[k][:, k]))
        return weight.T.contiguous()

    def swap(self) -> bool:
        """One unit that left comes back, and one that stays leaves; False where no such pair lowers the loss."""
        missing = self._h @ (self._dense - self._w)  # what the units that left could still explain
        through = self._a @ self._h
        gone = (~self.stay).nonzero().squeeze(1)
        own = self._h - self._h @ through
        schur = self._blocks(own)[gone]
        parts = missing.view(self.count, self._width, -1)[gone]
        factors = torch.linalg.cholesky(schur)
        gains = torch.cholesky_solve(parts, factors).mul_(parts).sum((1, 2)) / 2
        blocks = self._blocks(self._a)
        for place in gains.argsort(descending=True).tolist():
            r = self._inputs(gone[place : place + 1])
            u = through[:, r]
            back = torch.cholesky_solve(missing[r], factors[place])
            more = u.view(self.count, self._width, -1)
            grown = blocks + more @ torch.cholesky_solve(more.mT, factors[place].expand(self.count, -1, -1))
            scores = self.scores(grown, self._w - u @ back)
            unit = int(scores.argmin())
            if float(scores[unit]) < float(gains[place]) * (1 - 1e-9):
                self._restore(gone[place], r, u, back, factors[place])
                self.remove(torch.tensor([unit], device=r.device))
                return True
        return False

    def _restore(self, unit: Tensor, r: Tensor, u: Tensor, back: Tensor, factor: Tensor) -> None:
        inverse = torch.cholesky_inverse(factor)
        self._w -= u @ back
        self._w[r] = back
        self._a += u @ inverse @ u.T
        self._a[:, r] = -u @ inverse
        self._a[r] = self._a[:, r].T
        self._a[r[:, None], r] = inverse
        self.stay[unit] = True
