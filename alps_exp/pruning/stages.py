"""Work on one block: what a stage is, and the one that solves the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..calibration.capture import Group
from .block import BlockProblem
from .capture import capture, order, thriftily
from .solve import solve_layers


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
        names, inputs = groups[0]
        try:
            block.settle(solve_layers([block.layers[name] for name in names], inputs.to(block.model.device), block.job))
        except torch.OutOfMemoryError:
            solved = False
        else:
            solved = True
        del inputs
        if solved:
            del groups[0]
            continue
        if block.replay.drop():
            continue
        block.tools.ladder.for_solving(block.name, block.streams.states, len(names))
        groups[:] = thriftily(block, groups)
