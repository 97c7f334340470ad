"""The losses of layers that one process of a team solves, measured by all: the others wait for it to be done.

A loss is a product with the Gram matrix, which takes as long as a tenth of the solving; rows of a weight add up in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..layer.inputs import Inputs
from ..layer.problem import LayerProblem, relative
from ..model.layers import Layer
from ..numerics.precision import full_precision
from .solve import Solved
from .team import Team


class JointLosses:
    """Losses of one group of layers. Every process makes the same calls.

    Args:
        team: the processes.
        names: of the layers.
        inputs: of theirs, with the sums of all processes.

    Attributes:
        names: those.
        solved: the layers, in the process that has solved them.
    """

    def __init__(self, team: Team, names: Sequence[str], inputs: Inputs) -> None:
        self.names = frozenset(names)
        self.solved: list[Solved] = []
        self._team, self._order, self._inputs = team, list(names), inputs
        self._dense: dict[str, tuple[LayerProblem, float]] = {}

    def prepare(self, layers: Mapping[str, Layer]) -> None:
        """What can be known before the pruned weights are there, which those that wait for them see to.

        Args:
            layers: by name, with dense weights where another process solves them.
        """
        own = {found.layer.name: found.problem for found in self.solved}
        others = [rank for rank in range(self._team.size) if rank != self._team.owner(self._order[0])]
        for name in self._order:
            energy = 0.0
            if (problem := own.get(name)) is None:
                problem = LayerProblem(layers[name].weight.to(torch.float32, copy=True), self._inputs, name)
                part = problem.weight.tensor_split(len(others))[others.index(self._team.rank)]
                energy = _squared(problem, part)
            self._dense[name] = problem, energy

    def losses(self, layers: Mapping[str, Layer]) -> dict[str, float]:
        """Relative losses by name, in every process.

        Args:
            layers: by name, with the pruned weights.
        """
        parts = []
        for name in self._order:
            problem, energy = self._dense[name]
            whole = (problem.weight, layers[name].weight)
            dense, pruned = (weight.tensor_split(self._team.size)[self._team.rank] for weight in whole)
            parts.append([_squared(problem, dense - pruned.to(dense)), energy])
        sums = torch.tensor(parts, dtype=torch.float64, device=self._team.device)
        self._team.add([sums])
        return {name: relative(*pair) for name, pair in zip(self._order, sums.tolist(), strict=True)}


def _squared(problem: LayerProblem, rows: Tensor) -> float:
    with full_precision():
        return problem.squared_output(rows)
