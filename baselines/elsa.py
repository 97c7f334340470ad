"""ELSA: the model is trained against its own loss, and ADMM draws the weights to a sparse point meanwhile.

    x    the weights of the layers that are pruned; all other weights are trained beside them
    z    the sparse point, u the scaled dual, λ the penalty
    v    AdamW's second moment of x
    P    keeps, of each layer, the entries of largest score, in the exact number or pattern

    minimise CE(x)   subject to   x = z, z sparse

    every step:          g = ∇CE(x), clipped;  g += λ (x - z + u);  AdamW
    every `interval`:    z = P(x + u);  u += x - z;  λ by its schedule, u times the old over the new λ (step 0, too)
    at the end:          x = P(x)

It starts with z = P(x) by magnitude, since there is no v yet, and u = 0. The score is v (x + u)², the paper's, or
|x + u|, the released code's default. ELSA-L keeps z in 8 bits (float8 e4m3 with one scale per parameter), u in
bfloat16, and AdamW's moments in 8 bits.

Source: Lee et al., "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM", 2025.
Deviations: counts are exact, the first entry wins among equals. A schedule begins at `penalty_start` times λ, which
must be above 0, because u is divided by λ. The text is that of the run's data set.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from alps_exp.base.checks import one_of, require
from alps_exp.model.blocks import BlockModel
from alps_exp.model.layers import find_layer
from alps_exp.patterns import Pattern
from alps_exp.procedure.trained import TrainingMethod, accounted, judged
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.rows import PruneResult
from alps_exp.pruning.tools import Tools
from alps_exp.training.optimisers import second_moment
from alps_exp.training.trainer import Companion, Trainer
from alps_exp.training.whole import on_device

PROJECTIONS = ("momentum", "magnitude")
SCHEDULES = ("constant", "linear", "cosine", "exponential")
_POINTS = {"float32": None, "float8": torch.float8_e4m3fn}
_DUALS = {"float32": None, "bfloat16": torch.bfloat16}
_FAR = 0.02  # of the squared weights: what is worth a warning when the last projection takes it
_ENOUGH = 5  # times the weights' size: how far they should be able to go
_BY_HEART = 1.5  # times the loss of what was trained on: what is worth a warning on held-out windows


@dataclass(frozen=True)
class Elsa(TrainingMethod):
    """ELSA with its hyperparameters, beside those of every training.

    Attributes:
        penalty: λ at the end of its schedule.
        penalty_schedule: from `penalty_start` · λ to λ over the steps; "constant" is λ all the time.
        penalty_start: see there.
        interval: steps from a projection to the next.
        projection: "momentum" ranks by v (x + u)², "magnitude" by |x + u|.
        point: of z, "float32" or "float8".
        dual: of u, "float32" or "bfloat16".
    """

    selection: ClassVar[str] = "layer"
    label: ClassVar[str] = "ELSA"

    penalty: float = 0.01
    penalty_schedule: str = "constant"
    penalty_start: float = 0.1
    interval: int = 32
    projection: str = "momentum"
    point: str = "float32"
    dual: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("method.penalty", self.penalty, float, 0, 1e6, open_low=True)
        require("method.penalty_start", self.penalty_start, float, 0, 1, open_low=True)
        require("method.interval", self.interval, int, 1, float("inf"))
        one_of("method.penalty_schedule", self.penalty_schedule, SCHEDULES)
        one_of("method.projection", self.projection, PROJECTIONS)
        one_of("method.point", self.point, _POINTS)
        one_of("method.dual", self.dual, _DUALS)

    def penalty_at(self, step: int) -> float:
        """λ from the projection after a step (from 0) on."""
        gone, start = step / self.steps, self.penalty_start
        shares = {
            "constant": 1.0,
            "linear": start + (1 - start) * gone,
            "cosine": start + (1 - start) * 0.5 * (1 - math.cos(math.pi * gone)),
            "exponential": start ** (1 - gone),
        }
        return self.penalty * shares[self.penalty_schedule]

    def state_bytes(self, network: nn.Module, patterns: Mapping[str, Pattern], itemsize: int) -> float:
        pruned = sum(find_layer(network, name).weight.numel() for name in patterns)
        trained = sum(parameter.numel() for parameter in network.parameters()) if self.others else pruned
        own = (1 if self.point == "float8" else 4) + (2 if self.dual == "bfloat16" else 4)
        return trained * ((4 if itemsize < 4 else 0) + 4 + self.moment_bytes()) + pruned * own

    def run(self, model: BlockModel, job: PruneJob, tools: Tools) -> PruneResult:
        self.check(model, job, tools)
        layers = {name: find_layer(model.model, name) for name in job.patterns}
        pruned: dict[str, list[Part]] = {}
        for name, layer in layers.items():
            pruned.setdefault(layer.stored, []).append(Part(name, layer.view, job.patterns[name]))
        names = [name for name, _ in model.model.named_parameters()] if self.others else pruned
        with on_device(model, f"method={self.label}"):
            before = judged(model, job.held_out)
            size = statistics.median(float(layer.weight.float().square().mean().sqrt()) for layer in layers.values())
            splitting = Splitting(self, pruned)
            done = self.fit(model, job, tools, dict.fromkeys(names), [splitting])
            done |= {"before": before, "after": judged(model, job.held_out)}
            stats = splitting.stats(tools.team.gather)
            result = accounted(model, job, self, done, stats)
            result.notes += self._far(stats, size) or self._by_heart(done)
        counts = {row.name: round((1 - row.sparsity) * math.prod(row.shape)) for row in result.layers}
        short = [row.name for row in result.layers if row.stats["kept"] != counts[row.name]]
        if short:
            result.notes.append(f"{len(short)} layers keep weights that are zero in the model's dtype ({short[0]})")
        return result

    def _far(self, stats: Mapping[str, dict], size: float) -> list[str]:
        """A warning where the last projection took away much."""
        taken = statistics.median(found["distance"] for found in stats.values())
        if taken <= _FAR:
            return []
        recipe = self.recipe()
        way = math.fsum(recipe.rate_at(step, 0.0) for step in range(self.steps))
        advice = ["a higher method.penalty", "more method.steps"]
        if way < _ENOUGH * size:
            advice.insert(0, "a higher method.rate")
        elif self.projection == "momentum":  # v is that of some twenty steps
            advice.append("method.projection=magnitude")
        return [
            f"ELSA has not converged: its last projection took {taken:.2g} of the squared weights of the median layer. "
            f"AdamW moves a weight by about its rate in a step, here by {way:.2g} in all, and weights are of size "
            f"{size:.2g}: give {', '.join(advice[:-1])}, or {advice[-1]}"
        ]

    def _by_heart(self, done: Mapping) -> list[str]:
        """A warning where held-out windows fare far worse than those trained on."""
        seen, after = done["curve"][-1]["loss"], done["after"]
        if after is None or after <= _BY_HEART * seen:
            return []
        less = ", or method.others=false" if self.others else ""
        return [
            f"ELSA has learned its text by heart: in the end its loss is {seen:.3g} there and {after:.3g} on held-out "
            f"windows: give more text (method.tokens), fewer method.steps, a lower method.rate{less}"
        ]


class Part(NamedTuple):
    """A layer in the weight that holds it, alone or with other experts of a mixture."""

    name: str
    view: Callable[[Tensor], Tensor]  # (out, in) of a tensor that is shaped like the weight
    pattern: Pattern


class Splitting(Companion):
    """z and u of ADMM, of the weights whose masters are in this process.

    Args:
        method: with its hyperparameters.
        parts: weight → the layers that it holds, all of them.
    """

    def __init__(self, method: Elsa, parts: Mapping[str, Sequence[Part]]) -> None:
        self._method, self._parts = method, parts
        self._points: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._duals: dict[str, Tensor] = {}
        self._reached: dict[str, tuple[int, float]] = {}
        self._penalty = method.penalty_at(0)

    def before_update(self, trainer: Trainer, step: int) -> None:
        for name in self._own(trainer):
            value = trainer.masters.values[name]
            x = value.detach()
            if name not in self._points:
                self._keep(name, x.masked_fill(~self._largest(name, x.abs()), 0), torch.zeros_like(x))
            if value.grad is None:  # nothing of it was used, as of an expert without tokens
                value.grad = torch.zeros_like(x)
            value.grad.add_(x - self.point(name) + self._duals[name], alpha=self._penalty)

    def after_update(self, trainer: Trainer, step: int) -> None:
        if step % self._method.interval:
            return
        penalty = self._method.penalty_at(step)
        for name in self._own(trainer):
            x, u = trainer.masters.values[name].detach(), self._duals[name]
            reached = x + u
            self._keep(name, reached.masked_fill(~self._support(trainer, name, reached), 0), u)
            self._duals[name] = ((reached - self.point(name)) * (self._penalty / penalty)).to(u.dtype)
        self._penalty = penalty

    @torch.no_grad()
    def end(self, trainer: Trainer) -> None:
        for name in self._own(trainer):
            x = trainer.masters.values[name].detach()
            support = self._support(trainer, name, x)
            for part in self._parts[name]:
                own, kept = part.view(x).double(), part.view(support)
                whole = float(own.square().sum())
                gone = float(own.masked_fill(kept, 0).square().sum())
                self._reached[part.name] = int(kept.sum()), gone / whole if whole else 0.0
            x.masked_fill_(~support, 0)
        self._points, self._duals = {}, {}

    def stats(self, gather: Callable[[list], list]) -> dict[str, dict]:
        """Layer → how many entries are kept at the end, and how far x was from P(x).

        Args:
            gather: what processes that work together give → what all of them have given.
        """
        return {name: {"kept": kept, "distance": far} for name, (kept, far) in gather([*self._reached.items()])}

    def _own(self, trainer: Trainer) -> list[str]:
        return [name for name in self._parts if name in trainer.masters.values]

    def point(self, name: str) -> Tensor:
        """z of a weight, in the dtype that is computed in."""
        values, scale = self._points[name]
        return values if scale is None else values.to(scale.dtype) * scale

    def _support(self, trainer: Trainer, name: str, reached: Tensor) -> Tensor:
        score = reached.abs()
        if self._method.projection == "momentum":  # the root of v (x + u)², which does not underflow
            score *= second_moment(trainer.optimiser, trainer.masters.values[name]).to(score.dtype).sqrt()
        return self._largest(name, score)

    def _largest(self, name: str, score: Tensor) -> Tensor:
        support = torch.empty_like(score, dtype=torch.bool)
        for part in self._parts[name]:
            part.view(support).copy_(part.pattern.keep(part.view(score).contiguous()))
        return support

    def _keep(self, name: str, z: Tensor, u: Tensor) -> None:
        point, dual = _POINTS[self._method.point], _DUALS[self._method.dual]
        scale = None
        if point is not None:
            scale = (z.abs().max() / torch.finfo(point).max).clamp_min(torch.finfo(z.dtype).tiny)
            z = (z / scale).to(point)
        self._points[name], self._duals[name] = (z, scale), u if dual is None else u.to(dual)

    def state(self) -> dict[str, Tensor]:
        found = {"penalty": torch.tensor(self._penalty, dtype=torch.float64)}
        found |= {f"end {name}": torch.tensor(pair, dtype=torch.float64) for name, pair in self._reached.items()}
        for name, (values, scale) in self._points.items():
            found |= {f"z {name}": values, f"u {name}": self._duals[name]}
            found |= {} if scale is None else {f"scale {name}": scale}
        return found

    def load(self, trainer: Trainer, state: Mapping[str, Tensor]) -> None:
        self._penalty = float(state["penalty"])
        for part in (part for parts in self._parts.values() for part in parts):
            if (pair := state.get(f"end {part.name}")) is not None:
                self._reached[part.name] = int(pair[0]), float(pair[1])
        for name in self._own(trainer):
            if f"z {name}" in state:
                z, u, scale = (state.get(f"{what} {name}") for what in ("z", "u", "scale"))
                self._points[name] = z.to(trainer.device), None if scale is None else scale.to(trainer.device)
                self._duals[name] = u.to(trainer.device)
