"""SparseLLM: attention by SparseGPT, the feed-forward part as a whole by alternating minimisation (Bai et al., 2024).

The problem, its updates and their glossary are in `alps_exp/methods/alternating.py`. Each round prunes the layers of
the feed-forward part by SparseGPT, up and gate with the Gram matrix of the part's input, down with that of p. All
statistics are those of the block before any of its layers is pruned.

Differences from the released code, all deliberate:
- SparseGPT is the one here: exact counts, N kept of M, and damping anew in every round; there it adds up over rounds.
- least squares go by Gram matrices in float64, from the dense weights on, with a `ridge`; there by pseudo-inverses of X
  and P in float32, kept in float16, whose cut of small singular values depends on the number of tokens. What the inputs
  leave open stays as in the dense layer; there it becomes 0. Without a ridge the nearly empty direction that a
  LayerNorm leaves in X takes up large weights, which pruning then ruins: on a tiny OPT the part's output error rose
  from 0.020 to 0.28 in four rounds; with the ridge it fell to 0.016.
- s makes `gate_sweeps` gradient steps on sums of squares, whatever the number of tokens at once; there likewise, in
  minibatches of 1000 tokens. A step is no longer than one over a bound of the second derivative: with the fixed rate,
  tokens that drive a channel to thousands diverge (relative losses of 1e16 on SmolLM2 at 70 %).
- gates may have GELU, too (Gemma's), with the same updates; there SiLU alone.
- all blocks go through all rounds; there blocks 1, 30 and 31 of LLaMA through one only.
- the last round ends with the pruning: updates of z, s and p behind it would change no weight.
- activations are not kept but made again from the part's input, some tokens at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from alps_exp.base.checks import require
from alps_exp.base.clock import Stopwatch
from alps_exp.base.errors import UserError
from alps_exp.baselines.sparsegpt import SparseGPT
from alps_exp.calibration.capture import Enough, Group
from alps_exp.layer.problem import Inputs, LayerProblem, Statistics
from alps_exp.layer.solver import Solution
from alps_exp.methods.alternating import ACTIVATIONS, SILU, Penalties, Weights, alternate
from alps_exp.model.parts import FeedForward, feed_forward
from alps_exp.model.structure import find_blocks
from alps_exp.numerics.precision import full_precision
from alps_exp.patterns import Pattern
from alps_exp.pruning.block import BlockProblem
from alps_exp.pruning.capture import capture, thriftily
from alps_exp.pruning.method import BlockMethod
from alps_exp.pruning.solve import Solved, solve_layers

# Tokens whose activations are in memory at once, and numbers that each of them takes per channel, about.
TOKENS, _ARRAYS = 2048, 12


@dataclass(frozen=True)
class Alternating:
    """The hyperparameters of the alternation.

    Attributes:
        rounds: of pruning; 1 leaves the alternation out.
        alpha, beta, gamma: penalties; "auto" is the authors' 0.1 for plain parts (ReLU) and 5 for gated ones.
        steps, rate: gradient steps by which a plain part's down layer is fitted, and their length.
        gate_sweeps, gate_rate: the same of a gate's outputs, in each round.
        ridge: of least squares, over the diagonal of the Gram matrix.
    """

    rounds: int = 4
    alpha: float | str = "auto"
    beta: float | str = "auto"
    gamma: float | str = "auto"
    steps: int = 10
    rate: float = 0.01
    gate_sweeps: int = 2
    gate_rate: float = 0.01
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        require("method.rounds", self.rounds, int, 1, 1000)
        for name in ("alpha", "beta", "gamma"):
            if getattr(self, name) != "auto":
                require(f"method.{name}", getattr(self, name), float, 0, 1e6, open_low=True)
        require("method.steps", self.steps, int, 0, float("inf"))
        require("method.rate", self.rate, float, 0, 1e3)
        require("method.gate_sweeps", self.gate_sweeps, int, 0, 1000)
        require("method.gate_rate", self.gate_rate, float, 0, 10)
        require("method.ridge", self.ridge, float, 0, 1)

    def penalties(self, part: FeedForward, name: str) -> Penalties:
        """What the alternation weighs in a block.

        Raises:
            UserError: an activation that it does not know.
        """
        plain = part.gate is None
        known = [None] if plain else [each for each in ACTIVATIONS if part.computes(each.function)]
        if not known or (plain and not part.computes(relu)):
            raise UserError(
                f"SparseLLM knows feed-forward parts with ReLU, and gated ones with SiLU or GELU; that of {name} is "
                f"{'plain' if plain else 'gated'} with {type(part.activation).__name__}: choose another method"
            )
        auto = 0.1 if plain else 5.0
        weights = (auto if value == "auto" else float(value) for value in (self.alpha, self.beta, self.gamma))
        steps = (self.steps, self.rate, self.gate_sweeps, self.gate_rate)
        return Penalties(*weights, *steps, self.ridge, activation=known[0] or SILU)


@dataclass(frozen=True)
class SparseLLM(Alternating, BlockMethod):
    """SparseLLM with its hyperparameters: those of the alternation, and SparseGPT's `damping` and `block_size`.

    With one round it is SparseGPT.

    Attributes:
        damping: of SparseGPT, λ over the mean of the Gram matrix's diagonal.
        block_size: of SparseGPT, columns that are pruned together.
    """

    statistics: ClassVar[Statistics] = Statistics.GRAM
    kinds: ClassVar[frozenset[str] | None] = SparseGPT.kinds
    shares: ClassVar[bool] = False

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sparsegpt()

    def _sparsegpt(self) -> SparseGPT:
        return SparseGPT(self.damping, self.block_size)

    @property
    def selection(self) -> str:
        return self._sparsegpt().selection

    def flops(self, rows: int, width: int) -> float:
        return self._sparsegpt().flops(rows, width)

    def block_work(self, shapes: Mapping[str, tuple[int, int]], tokens: int) -> tuple[float, float]:
        rows, width = max(shapes.values(), key=lambda shape: shape[1] / shape[0])  # of the down layer
        passes, weights = self.rounds - 1, rows * width
        updates = passes * (passes + 1) / 2
        flops = 2 * tokens * (4 * weights * updates + passes * (width**2 + 4 * weights))
        flops += passes * (self.flops(rows, width) + 2 * self.flops(width, rows) + width**3 / 3)
        sums = 4 * (width**2 + 3 * weights + (self.rounds + 2) * 3 * weights) + 8 * 2 * width**2
        return flops, sums + 4 * _ARRAYS * TOKENS * width

    def misfit_of_experts(self, names: Collection[str]) -> str | None:
        return (
            f"{type(self).__name__} alternates between the two sides of one activation, and a token's experts have one "
            "each, with one sum behind them all"
        )

    def for_model(self, model: nn.Module, patterns: Mapping[str, Pattern]) -> SparseLLM:
        prefix, blocks = find_blocks(model)
        for index, block in enumerate(blocks):
            name = f"{prefix}.{index}"
            own = {layer.removeprefix(f"{name}.") for layer in patterns if layer.startswith(f"{name}.")}
            part = feed_forward(block)
            if own and part is None:
                raise UserError(
                    f"{name} of {type(model).__name__} has no feed-forward part of two or three linear layers "
                    "(fc1 and fc2, or gate_proj, up_proj and down_proj), which SparseLLM prunes as a whole: choose "
                    "another method"
                )
            if own.intersection(part.layers if part else ()):
                self.penalties(part, name)
                if lacking := [layer for layer in part.layers if layer not in own]:
                    raise UserError(
                        f"SparseLLM prunes the feed-forward part of {name} as a whole, and {lacking[0]} is left out: "
                        "include or exclude all of its layers (layers.include, layers.exclude)"
                    )
        return self

    def run(self, block: BlockProblem) -> None:
        if not block.layers:
            return
        groups = capture(block, list(block.layers))
        block.watch.lap("calibrate")
        while (solved := self._tried(block, groups)) is None:
            block.tools.ladder.for_solving(block.name, block.streams.states, 1)
            groups = thriftily(block, groups)
        block.settle(solved)
        block.watch.lap("solve")

    def _tried(self, block: BlockProblem, groups: list[Group]) -> list[Solved] | None:
        """All layers solved, none of them written; None where the device's memory does not suffice."""
        part, solved = feed_forward(block.module), []
        inputs = {name: found for names, found in groups for name in names}
        job = dataclasses.replace(block.job, solver=self._sparsegpt())
        try:
            feeding = [f"{block.name}.{path}" for path in part.layers]
            if feeding[0] in block.layers:
                with full_precision():
                    solved += self._feed_forward(block, part, {name: inputs[name] for name in feeding})
            for names, found in groups:
                if not set(names) & set(feeding):
                    layers = [block.layers[name] for name in names]
                    solved += solve_layers(layers, found.to(block.model.device), job)
        except torch.OutOfMemoryError:
            return None
        return solved

    def _feed_forward(self, block: BlockProblem, part: FeedForward, inputs: Mapping[str, Inputs]) -> list[Solved]:
        watch, device = Stopwatch(block.model.device), block.model.device
        check_formula(block, part)
        names = {path: f"{block.name}.{path}" for path in part.layers}
        dense = dense_weights(block, part)
        sparsegpt, patterns = self._sparsegpt(), block.job.patterns
        found: dict[str, Solution] = {}
        gram = inputs[names[part.up]].gram.to(device)

        def prune(weights: Weights, channels: Tensor) -> Weights:
            readers = {part.up: weights.up} | ({part.gate: weights.gate} if part.gate else {})
            for layers, matrix in ((readers, gram), ({part.down: weights.down}, channels)):
                shared = Inputs(gram=matrix, name=names[next(iter(layers))])
                problems = [LayerProblem(weight, shared, names[path]) for path, weight in layers.items()]
                solutions = sparsegpt.solve_group(problems, [patterns[names[path]] for path in layers])
                found.update(zip(layers, solutions, strict=True))
            gate = found[part.gate].weight if part.gate else None
            return dataclasses.replace(weights, up=found[part.up].weight, down=found[part.down].weight, gate=gate)

        channels, penalties = inputs[names[part.down]].gram.to(device), self.penalties(part, block.name)
        alternate(dense, lambda: part_inputs(block, part), gram, channels, prune, penalties, self.rounds)
        seconds = watch.lap("alternation") / len(found)
        stats = {"rounds": self.rounds, "alpha": penalties.alpha, "beta": penalties.beta, "gamma": penalties.gamma}
        stats |= {"ridge": max(penalties.raised)} if penalties.raised else {}
        solved = []
        for path, solution in found.items():
            made = dataclasses.replace(
                solution, status="fixed", iterations=self.rounds, seconds={"alternation": seconds}, stats=stats
            )
            solved.append(block.solved(names[path], inputs[names[path]], made, seconds))
        return solved


def dense_weights(block: BlockProblem, part: FeedForward) -> Weights:
    """The part's weights in float32."""
    weights = {path: block.layers[f"{block.name}.{path}"].weight.float() for path in part.layers}
    biases = {path: block.module.get_submodule(path).bias for path in part.readers}
    biases = {path: None if bias is None else bias.detach().float() for path, bias in biases.items()}
    return Weights(weights[part.up], weights[part.down], weights.get(part.gate), biases[part.up], biases.get(part.gate))


def part_inputs(block: BlockProblem, part: FeedForward) -> Iterator[Tensor]:
    """x (tokens, in) of all calibration windows in order, at most `TOKENS` of them at a time."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["input"])
        if not block.watched:
            raise Enough

    states = block.streams.calibration
    for begin, end in states.spans():
        handle = block.module.get_submodule(part.readers[0]).register_forward_pre_hook(look, with_kwargs=True)
        try:
            with suppress(Enough):
                block.forward(states.at(begin, end))
        finally:
            handle.remove()
        x = seen.pop()
        yield from x.reshape(-1, x.shape[-1]).split(TOKENS)


def check_formula(block: BlockProblem, part: FeedForward) -> None:
    """Refuse a feed-forward part that computes something else than its layers' names say, seen on one window.

    Raises:
        UserError: what its down layer is fed is not the activation of what the others give.
    """
    found: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            found[path] = args[0] if path == part.down else output

        return hook

    handles = [block.module.get_submodule(path).register_forward_hook(keep(path)) for path in part.layers]
    try:
        block.forward(block.streams.calibration.at(0, 1))
    finally:
        for handle in handles:
            handle.remove()
    given = found.pop(part.down)
    expected = part.channels(found)
    if given.shape != expected.shape or not torch.allclose(given, expected, rtol=2e-2, atol=2e-2 * given.std().item()):
        raise UserError(
            f"{block.name}.{part.down} is not fed the activation of {' and '.join(part.readers)} alone: choose a "
            "method that prunes layer by layer"
        )
