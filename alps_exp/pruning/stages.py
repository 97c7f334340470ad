"""Work on one block: what a stage is, and the one that solves the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from ..calibration.capture import Group
from ..model.layers import ExpertLayer
from .block import BlockProblem
from .capture import capture, order, thriftily
from .solve import solve_alike, solve_layers

# Numbers in the Gram matrices and in the weights that are worked on at once, 0.27 GB in float32 each; a solver takes
# some twenty times that in all.
_TOGETHER = 1 << 26


class Stage(ABC):
    """Work on one block. It leaves the block either done or as it was."""

    @abstractmethod
    def run(self, block: BlockProblem) -> None:
        """Do it."""


@dataclass(frozen=True)
class Solve(Stage):
    """Capture the layers' inputs, and prune each group of layers that share one by the job's solver."""

    def run(self, block: BlockProblem) -> None:
        for names in _steps(block):
            groups = capture(block, names)
            block.begin_changing()
            block.watch.lap("calibrate")
            _solve(block, groups)
            block.exchange(names)
            block.watch.lap("solve")


def _steps(block: BlockProblem) -> list[list[str]]:
    """The layers that are captured together: all at once, or one group after the other, each behind pruned ones."""
    if not block.layers:
        return []
    every = list(block.layers)
    groups = order(block) if block.job.in_order or block.job.target.beside else [every]
    return groups if block.job.in_order else [every]


def _solve(block: BlockProblem, groups: list[Group]) -> None:
    """Solve the groups and write the weights; a group's statistics are freed when it is done."""
    while groups:
        alike = _alike(block, groups)
        try:
            found = (groups[number] for number in alike)
            own = [([block.layers[name] for name in names], inputs.to(block.model.device)) for names, inputs in found]
            block.settle(solve_layers(*own[0], block.job) if len(own) == 1 else solve_alike(own, block.job))
        except torch.OutOfMemoryError:
            solved = False
        else:
            solved = True
        own = None
        if solved:
            for number in reversed(alike):
                del groups[number]
            continue
        if block.replay.drop():
            continue
        block.tools.ladder.for_solving(block.name, block.streams.states, len(groups[0].names), len(alike))
        groups[:] = thriftily(block, groups)


def _alike(block: BlockProblem, groups: Sequence[Group]) -> list[int]:
    """Which groups are solved together, from the first on: those of experts with the same shapes and patterns."""
    first = _kind(block, groups[0])
    if first is None or block.tools.ladder.apart:
        return [0]
    shapes = [shape for shape, _ in first]
    most = max(_TOGETHER // max(shapes[0][1] ** 2, sum(rows * width for rows, width in shapes)), 1)
    same = (number for number, group in enumerate(groups) if _kind(block, group) == first)
    return list(islice(same, most))


def _kind(block: BlockProblem, group: Group) -> list | None:
    """What groups that are solved together have in common; None where a group is solved alone."""
    layers = [block.layers[name] for name in group.names]
    if group.inputs.elsewhere or not all(isinstance(layer, ExpertLayer) for layer in layers):
        return None
    return [(layer.shape, block.job.patterns[layer.name]) for layer in layers]
