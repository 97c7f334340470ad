"""What the weights of a layer are fitted to. A target changes the problem, never the solver: every solver serves all.

layer    the dense weight on the layer's own inputs, min ‖X(W - Ŵ)ᵀ‖²: the problem of all published layer methods
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..layer.problem import LayerProblem


@dataclass(frozen=True)
class Target(ABC):
    """Base of the targets.

    Class attributes:
        beside: whether it compares with the dense model, whose hidden states then go through the blocks beside those
            of the pruned one.
    """

    beside: ClassVar[bool] = False

    @abstractmethod
    def posed(self, problem: LayerProblem) -> LayerProblem:
        """The problem for the solver: the dense layer's, or one with another weight in its place."""


@dataclass(frozen=True)
class LayerTarget(Target):
    """The dense weight on the layer's own inputs."""

    def posed(self, problem: LayerProblem) -> LayerProblem:
        return problem
