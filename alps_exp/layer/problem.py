"""One layer to prune, as numbers: no model, no device moves, no method.

Glossary:

    W    (out, in)      dense weight
    X    (tokens, in)   calibration input
    G    (in, in)       Gram matrix XᵀX, a plain sum over tokens, undamped
    loss(Ŵ)             ‖X(W - Ŵ)ᵀ‖² = tr((W - Ŵ) G (W - Ŵ)ᵀ); the relative loss divides by tr(W G Wᵀ)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..base.errors import UserError
from ..numerics.precision import quadratic
from .inputs import Inputs, Statistics, require_dense


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """A layer's weight and the statistics of its calibration inputs.

    Attributes:
        weight: (out, in) float32 or float64.
        inputs: what is known of the inputs, in the weight's dtype and on its device.
        name: the layer's name, for messages.

    Raises:
        UserError: a weight that is no matrix of finite real numbers, or inputs of another width.
    """

    weight: Tensor
    inputs: Inputs = field(default_factory=Inputs)
    name: str = "the layer"

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            raise UserError(f"{self.name}: weight must be a non-empty matrix (out, in), got {tuple(self.weight.shape)}")
        require_dense(f"{self.name}: weight", self.weight)
        if self.weight.dtype not in (torch.float32, torch.float64):
            object.__setattr__(self, "weight", self.weight.float())
        self.inputs.fit(self.weight.shape[1])
        object.__setattr__(self, "inputs", self.inputs.to(self.weight))
        if not bool(torch.isfinite(self.weight).all()):
            bad = int((~torch.isfinite(self.weight)).sum())
            raise UserError(f"{self.name}: the weight has {bad} NaN or infinite entries")

    @classmethod
    def from_inputs(
        cls, weight: Tensor, inputs: Tensor, sequences: int | None = None, name: str = "the layer"
    ) -> LayerProblem:
        """The problem whose statistics are those of `inputs`.

        Args:
            weight: (out, in).
            inputs: (tokens, in), or (sequences, length, in).
            sequences: into how many sequences of equal length, in order, a (tokens, in) input divides; 1 if not given.
            name: the layer's name.
        """
        if inputs.is_complex() or inputs.is_meta or inputs.layout != torch.strided:
            kind = "meta" if inputs.is_meta else f"{inputs.layout} {inputs.dtype}"
            raise UserError(f"{name}: inputs must be a dense tensor of real numbers, got a {kind} one")
        if inputs.ndim == 3:
            if sequences not in (None, inputs.shape[0]):
                raise UserError(f"{name}: inputs hold {inputs.shape[0]} sequences, and sequences={sequences} was given")
            sequences = inputs.shape[0]
            inputs = inputs.reshape(-1, inputs.shape[-1])
        if inputs.ndim != 2 or inputs.shape[0] == 0 or weight.ndim != 2 or inputs.shape[1] != weight.shape[1]:
            raise UserError(
                f"{name}: inputs must be (tokens, in) or (sequences, length, in) with in = {weight.shape[-1]}, "
                f"got {tuple(inputs.shape)}"
            )
        sequences = sequences or 1
        if inputs.shape[0] % sequences:
            raise UserError(f"{name}: {inputs.shape[0]} tokens do not divide into {sequences} sequences")
        x = inputs.to(weight.device, weight.dtype if weight.dtype == torch.float64 else torch.float32)
        by_sequence = x.reshape(sequences, -1, x.shape[1])
        found = Inputs(
            gram=x.T @ x,
            mean=x.mean(0),
            var=by_sequence.var(1, unbiased=False).mean(0),
            tokens=x.shape[0],
            sequences=sequences,
            name=name,
        )
        return cls(weight, found, name)

    # The statistics that solvers read most, by their own names.

    @property
    def gram(self) -> Tensor | None:
        return self.inputs.gram

    @property
    def diagonal(self) -> Tensor | None:
        return self.inputs.diagonal

    @property
    def mean(self) -> Tensor | None:
        return self.inputs.mean

    @property
    def var(self) -> Tensor | None:
        return self.inputs.var

    @property
    def tokens(self) -> int | None:
        return self.inputs.tokens

    @property
    def sequences(self) -> int | None:
        return self.inputs.sequences

    def require(self, statistics: Statistics) -> None:
        """Raise UserError, naming what to give, unless these statistics are here."""
        self.inputs.require(statistics, self.name)

    @cached_property
    def dead(self) -> Tensor:
        """(in,) bool: inputs that were zero on every calibration token."""
        if self.diagonal is None:
            return torch.zeros(self.weight.shape[1], dtype=torch.bool, device=self.weight.device)
        return self.inputs.dead

    @cached_property
    def energy(self) -> float:
        """tr(W G Wᵀ), the squared norm of the dense layer's output."""
        return self.squared_output(self.weight)

    def relative_loss(self, weight: Tensor) -> float:
        """‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖², undamped; 0 when both vanish. Needs the Gram matrix.

        Args:
            weight: (out, in), the candidate Ŵ.
        """
        return relative(self.squared_output(self.weight - weight.to(self.weight)), self.energy)

    def held_out_loss(self, weight: Tensor) -> float | None:
        """The same on tokens that are not among the calibration tokens; None where there are none.

        Args:
            weight: (out, in), the candidate Ŵ.
        """
        if (gram := self.inputs.held_out) is None:
            return None
        return relative(_squared_output(self.weight - weight.to(self.weight), gram), _squared_output(self.weight, gram))

    def squared_output(self, delta: Tensor) -> float:
        """‖Xδᵀ‖² of rows (rows, in), undamped; rows add up. Needs the Gram matrix."""
        if self.gram is None:
            raise UserError(f"{self.name}: the loss needs the Gram matrix of the inputs; give inputs=X or gram=G")
        return _squared_output(delta, self.gram)


def _squared_output(delta: Tensor, gram: Tensor) -> float:
    if not len(delta):
        return 0.0
    # Squares of 1e-20 and 1e20 do not fit float32: both factors are first brought near 1, exactly.
    scale, root = power_of_two(float(delta.abs().max())), power_of_two(float(gram.diagonal().max()) ** 0.5)
    return max(quadratic((delta / scale).div_(root), gram), 0.0) * (scale * root) ** 2


def relative(loss: float, energy: float) -> float:
    """A squared error over the squared norm of the dense layer's output; 0 when both vanish."""
    if energy > 0:
        return loss / energy
    return 0.0 if loss == 0 else float("inf")


def power_of_two(value: float) -> float:
    """The power of two next below a positive number, 1 for 0: dividing by it changes a float's exponent only."""
    return 2.0 ** (math.frexp(value)[1] - 1) if 0 < value < math.inf else 1.0
