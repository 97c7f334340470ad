"""STRUPRUNE, a reconstruction: whole channels and heads leave, more where they matter less in the whole model.

The full text of the method is not public to us. Known are its parts: the splitting of SparseLLM with structured masks,
Wanda's importance, a closed form for each layer's mask, a softmax ("energy") allocation over layers, and working memory
of the order of √N for N weights. This is one consistent method of these parts; its results say nothing certain about
the authors'.

    l    a layer whose inputs are units: down_proj with channels, o_proj with heads
    e_g = Σ_{ij∈g} W_ij² ‖X_:j‖²    the score of a unit g, on the dense model's inputs
    E_l    mean of e_g over the n_l units of l
    p_l    the share of them that stays

Over all layers with one kind of units, of which K stay, the shares minimise

    Σ n_l (1 - p_l) E_l - T Σ n_l H(p_l)   subject to   Σ n_l p_l = K,   H(p) = -p ln p - (1 - p) ln(1 - p)

so that p_l = σ((E_l - μ) / T) with μ by bisection. T is `temperature` times the mean of E_l over the layers: towards 0
the layers of least E go whole (but for one unit), and towards infinity all keep the same share. Counts are n_l p_l,
rounded to the sum K where that costs least, at least 1. A layer's units of largest e_g stay: those above some τ_l.

A first pass through the dense model finds e_g. Then the blocks are pruned one after the other, on the inputs that the
pruned ones before leave: o_proj is fitted to its dense weight on the heads that stay, and the feed-forward part goes
through the alternation of `alps_exp/methods/alternating.py` with the units' mask in place of SparseGPT, and least
squares on what stays of the down layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from alps_exp.base.checks import require
from alps_exp.base.clock import Stopwatch
from alps_exp.base.errors import UserError
from alps_exp.baselines.sparsellm import Alternating, SparseLLM, check_formula, dense_weights, part_inputs
from alps_exp.calibration.capture import Collector
from alps_exp.calibration.ladder import CALIBRATION
from alps_exp.calibration.streams import Streams
from alps_exp.layer.problem import Inputs, Statistics
from alps_exp.layer.solver import Solution
from alps_exp.methods.alternating import GramSolve, Weights, alternate
from alps_exp.model.blocks import BlockModel
from alps_exp.model.layers import Layer
from alps_exp.model.parts import Units, feed_forward
from alps_exp.model.structure import blocks_of, find_blocks
from alps_exp.numerics.precision import full_precision
from alps_exp.patterns import Pattern
from alps_exp.patterns.keeping import keep_largest
from alps_exp.pruning.block import BlockProblem
from alps_exp.pruning.capture import capture
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.loop import BlockLoop
from alps_exp.pruning.method import ModelMethod
from alps_exp.pruning.rows import PruneResult
from alps_exp.pruning.stages import Stage
from alps_exp.pruning.structured import asked_units, check_units, kept_of, settle_units
from alps_exp.pruning.tools import Tools

_NAME = "struprune"
NOTE = (
    "method=struprune is a reconstruction: the method's full text is not public, and its authors' results may differ "
    "(docs/methods.md)"
)


@dataclass(frozen=True)
class StruPrune(Alternating, ModelMethod):
    """The reconstruction with its hyperparameters, beside those of the alternation; one round fits what stays once.

    Attributes:
        temperature: T over the mean of E_l.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    selection: ClassVar[str] = "channels or heads of the model"
    kinds: ClassVar[frozenset[str] | None] = frozenset({"unstructured"})
    shares: ClassVar[bool] = False
    structured: ClassVar[bool] = True
    even: ClassVar[bool] = False
    reconstruction: ClassVar[bool] = True

    temperature: float = 1.0

    def __post_init__(self) -> None:
        require("method.temperature", self.temperature, float, 0, 1e6, open_low=True)
        super().__post_init__()

    def block_work(self, shapes: Mapping[str, tuple[int, int]], tokens: int) -> tuple[float, float]:
        shared = {own.name: getattr(self, own.name) for own in dataclasses.fields(Alternating)}
        flops, size = SparseLLM(**shared).block_work(shapes, tokens)
        return flops + 2 * tokens * sum(rows * width for rows, width in shapes.values()), size  # and the first pass

    def for_model(self, model: nn.Module, patterns: Mapping[str, Pattern]) -> StruPrune:
        blocks = find_blocks(model)[1]
        for place, (name, asked) in enumerate(check_units(model, patterns).items()):
            if self.rounds > 1 and any(units.kind == "channels" for units, _ in asked):
                try:
                    self.penalties(feed_forward(blocks[place]), name)
                except UserError as error:
                    raise UserError(f"{error}, or give method.rounds=1, which leaves the alternation out") from None
        return self

    def run(self, model: BlockModel, job: PruneJob, tools: Tools) -> PruneResult:
        watch = Stopwatch(model.device)
        kept = tools.store.recall(_NAME)
        scores = kept[0] if kept is not None else self._scores(model, job, tools)
        if kept is None:
            tools.store.remember(_NAME, scores, "scores of units")
        watch.lap("weigh")
        stays = self.chosen(model, job.patterns, scores)
        result = BlockLoop((_Prune(self, stays),)).run(model, job, tools)
        result.add_seconds(watch.seconds)
        result.notes.append(NOTE)
        return result

    def _scores(self, model: BlockModel, job: PruneJob, tools: Tools) -> dict[str, Tensor]:
        """e_g (units,) in float64 by the writer's name, from one pass through the dense model."""
        last = blocks_of(job.patterns, model.prefix)[-1]
        streams = Streams.open(model, {CALIBRATION: job.tokens}, job.batch_size, last + 2, tools.ladder, "dense", False)
        found = {}
        for index in range(last + 1):
            with model.block(index, dense=True, changing=False, ahead=index < last) as module:
                asked = asked_units(module, model.name(index), job.patterns)
                paths = {f"{model.name(index)}.{u.writer}": u.writer for u, _ in asked}
                writers = {name: Layer(name, module.get_submodule(path)) for name, path in paths.items()}
                collector = Collector(writers, Statistics.DIAGONAL)
                try:
                    streams.advance(index, module, dense=True)
                    sums = (
                        {names[0]: found_.inputs(names[0]) for names, found_ in collector.finish()} if writers else {}
                    )
                finally:
                    collector.remove()
                for units, _ in asked:
                    name = f"{model.name(index)}.{units.writer}"
                    energy = writers[name].weight.double().square().sum(0) * sums[name].diagonal.double()
                    found[name] = energy.view(units.count, -1).sum(1).cpu()
        return found

    def chosen(
        self, model: BlockModel, patterns: Mapping[str, Pattern], scores: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Which units stay, (units,) bool by the writer's name."""
        kinds: dict[str, list[tuple[str, int]]] = {}
        for name, asked in check_units(model.model, patterns).items():
            for units, pattern in asked:
                kinds.setdefault(units.kind, []).append(
                    (f"{name}.{units.writer}", kept_of(units.count, pattern.sparsity))
                )
        stays = {}
        for layers in kinds.values():
            energies = [float(scores[name].mean()) for name, _ in layers]
            sizes = [len(scores[name]) for name, _ in layers]
            counts = shares(energies, sizes, sum(kept for _, kept in layers), self.temperature)
            for (name, _), count in zip(layers, counts, strict=True):
                stays[name] = keep_largest(scores[name][None], count)[0]
        return stays


def shares(energies: Sequence[float], sizes: Sequence[int], kept: int, temperature: float) -> list[int]:
    """How many units of each layer stay, `kept` in all.

    Args:
        energies: E_l.
        sizes: n_l.
        kept: K, at least one for each layer.
        temperature: T over the mean of E_l.
    """
    e, n = (torch.tensor(values, dtype=torch.float64) for values in (energies, sizes))
    unit = temperature * float(e.mean()) or 1.0
    low, high = float(e.min()) - 60 * unit, float(e.max()) + 60 * unit
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((n * torch.sigmoid((e - mu) / unit)).sum()) > kept else (low, mu)
    wanted = n * torch.sigmoid((e - (low + high) / 2) / unit)
    counts = wanted.floor().long().clamp(min=1)
    counts = torch.minimum(counts, n.long())
    while (lacking := kept - int(counts.sum())) != 0:
        step = 1 if lacking > 0 else -1
        room = (counts < n) if step > 0 else (counts > 1)
        gap = torch.where(room, step * (wanted - counts), -torch.inf)
        counts[int(gap.argmax())] += step
    return counts.tolist()


@dataclass(frozen=True)
class _Prune(Stage):
    """Prunes a block's units and fits what stays."""

    method: StruPrune
    stays: Mapping[str, Tensor] = field(repr=False)

    def run(self, block: BlockProblem) -> None:
        asked = asked_units(block.module, block.name, block.job.patterns)
        if not asked:
            return
        readers = [feed_forward(block.module).up] if any(units.kind == "channels" for units, _ in asked) else []
        names = [f"{block.name}.{path}" for path in [units.writer for units, _ in asked] + readers]
        inputs = {name: found for group, found in capture(block, names) for name in group}
        block.watch.lap("calibrate")
        made = []
        with full_precision():
            for units, _ in asked:
                name = f"{block.name}.{units.writer}"
                stay = self.stays[name].to(block.model.device)
                if units.kind == "heads":
                    made.append((units, stay, self._heads(block, units, stay, inputs[name]), {}))
                else:
                    made.append((units, stay, *self._channels(block, stay, inputs)))
        for units, stay, solution, readers in made:
            name = f"{block.name}.{units.writer}"
            settle_units(block, units, inputs[name].to(block.model.device), stay, solution, readers)
        block.watch.lap("solve")

    def _heads(self, block: BlockProblem, units: Units, stay: Tensor, inputs: Inputs) -> Solution:
        watch = Stopwatch(block.model.device)
        weight = block.layers[f"{block.name}.{units.writer}"].weight.float()
        columns = stay.repeat_interleave(units.width)
        raised: list[float] = []
        weight = fitted(weight, inputs.gram.to(weight.device), columns, self.method.ridge, raised)
        watch.lap("refit")
        return self._solution(weight, columns, 1, watch, raised)

    def _channels(self, block: BlockProblem, stay: Tensor, inputs: Mapping[str, Inputs]) -> tuple[Solution, dict]:
        watch, device = Stopwatch(block.model.device), block.model.device
        part, method = feed_forward(block.module), self.method
        raised: list[float] = []

        def prune(weights: Weights, channels: Tensor) -> Weights:
            down = fitted(weights.down, channels, stay, method.ridge, raised)
            up, gate = (None if w is None else w * stay[:, None] for w in (weights.up, weights.gate))
            biases = (None if b is None else b * stay for b in (weights.up_bias, weights.gate_bias))
            return Weights(up, down, gate, *biases)

        penalties = None
        if method.rounds > 1:
            check_formula(block, part)
            penalties = method.penalties(part, block.name)
        gram, channels = (inputs[f"{block.name}.{path}"].gram.to(device) for path in (part.up, part.down))
        dense = dense_weights(block, part)
        found = alternate(dense, lambda: part_inputs(block, part), gram, channels, prune, penalties, method.rounds)
        watch.lap("alternation")
        readers = {part.up: found.up} | ({part.gate: found.gate} if part.gate else {})
        raised += penalties.raised if penalties is not None else []
        return self._solution(found.down, stay, method.rounds, watch, raised), readers

    def _solution(
        self, weight: Tensor, columns: Tensor, rounds: int, watch: Stopwatch, raised: Sequence[float]
    ) -> Solution:
        support, stats = columns[None, :].expand(weight.shape), {"reconstruction": True}
        stats |= {"ridge": max(raised)} if raised else {}
        return Solution(weight, support, "fixed", rounds, dict(watch.seconds), stats)


def fitted(weight: Tensor, gram: Tensor, stay: Tensor, ridge: float, raised: list[float]) -> Tensor:
    """The weight (out, in) on the inputs that stay, (in,) bool, fitted to the whole: W_K + W_R G_RK (G_KK)⁻¹; `raised`
    as in `GramSolve`."""
    k, r = stay.nonzero().squeeze(1), (~stay).nonzero().squeeze(1)
    found = torch.zeros_like(weight)
    found[:, k] = weight[:, k] + GramSolve(gram[k][:, k], ridge, raised)(weight[:, r] @ gram[r][:, k])
    return found
