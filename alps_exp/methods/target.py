"""What the weights of a layer are fitted to. A target changes the problem, never the solver: every solver serves all.

    layer    the dense weight W on the layer's own inputs, min ‖X(W - Ŵ)ᵀ‖²: the problem of all published layer methods
    stream   for a writer (a layer whose output is added to the residual stream), T = W + α C (G + λI)⁻¹ in place of W

Glossary of the stream target, with d for the dense model and p for the pruned one, per token:

    x    (in,)        the writer's input
    h    (out,)       the stream that its output is added to
    r    (out,)       W(x_d - x_p) + (h_d - h_p): what is missing from W x_p, lest the stream differ from h_d + W x_d
    C    (out, in)    Σ r x_pᵀ; G = Σ x_p x_pᵀ
    α    strength     1 draws the stream all the way, as far as x_p can tell; 0 is the layer target
    λ    ridge times mean(diag G)

With α = 1, T is the ridge regression, from W on, of the dense stream on the pruned model's inputs. Layers that are no
writers keep W: a reader that is forced back to its dense output no longer reacts to what the stream has lost.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..base.checks import require
from ..base.errors import UserError
from ..base.resources import built
from ..layer.problem import LayerProblem


@dataclass(frozen=True)
class Target(ABC):
    """Base of the targets."""

    @property
    def name(self) -> str:
        """How the record of a layer that was fitted to it calls it."""
        return type(self).__name__.removesuffix("Target").lower()

    @property
    def beside(self) -> bool:
        """Whether the layers are compared with the dense model's, whose hidden states then go through the blocks beside
        those of the pruned one."""
        return False

    @abstractmethod
    def posed(self, problem: LayerProblem) -> LayerProblem:
        """The problem for the solver: the dense layer's, or one with another weight in its place."""


@dataclass(frozen=True)
class LayerTarget(Target):
    """The dense weight on the layer's own inputs."""

    def posed(self, problem: LayerProblem) -> LayerProblem:
        return problem


@dataclass(frozen=True)
class StreamTarget(Target):
    """The dense residual stream, for the layers that write to it.

    Attributes:
        strength: α, how far the stream is drawn to the dense model's; "auto" stands for a number that the run chooses
            before it begins.
        ridge: λ over the mean of the Gram matrix's diagonal.
    """

    strength: float | str = 0.5
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.strength, str) and self.strength != "auto":
            raise UserError(f"target.strength={self.strength!r} is not allowed: give a number from 0 up to 1, or auto")
        if self.strength != "auto":
            require("target.strength", self.strength, float, 0, 1)
        require("target.ridge", self.ridge, float, 0, 1e6, open_low=True)

    @property
    def beside(self) -> bool:
        return self.strength == "auto" or self.strength > 0

    def posed(self, problem: LayerProblem) -> LayerProblem:
        inputs = problem.inputs
        if inputs.correction is None or not self.beside or not bool((inputs.diagonal > 0).any()):
            return problem
        # Scaled to a unit diagonal, in which float32 factorises well; dead inputs have no correction.
        diagonal = inputs.diagonal + self.ridge * inputs.diagonal.mean()
        scale = diagonal.rsqrt()
        matrix = inputs.gram * scale * scale[:, None]
        matrix.diagonal().fill_(1.0)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise UserError(
                f"{problem.name}: the Gram matrix could not be factorised for target=stream: give a larger "
                f"target.ridge than {self.ridge:g}, or more windows (nsamples)"
            )
        step = torch.cholesky_solve((inputs.correction * scale).T, factor).T * scale
        weight = torch.add(problem.weight, step, alpha=self.strength)
        return dataclasses.replace(problem, weight=weight)


def build_target(node: Mapping) -> Target:
    """The target that a composed `target` node describes (`_target_`, `name`, one key per field).

    Raises:
        UserError: a class that is no target, an unknown field, or a value that is not allowed.
    """
    return built(node, Target, "target")
