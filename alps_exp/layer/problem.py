"""One layer to prune, as numbers: no model, no device moves, no method.

Glossary:

    W    (out, in)      dense weight
    X    (tokens, in)   calibration input
    G    (in, in)       Gram matrix XᵀX, a plain sum over tokens, undamped
    loss(Ŵ)             ‖X(W - Ŵ)ᵀ‖² = tr((W - Ŵ) G (W - Ŵ)ᵀ); the relative loss divides by tr(W G Wᵀ)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Flag
from functools import cached_property

import torch
from torch import Tensor

from ..base.errors import UserError


class Statistics(Flag):
    """What a solver must know of a layer's inputs. Both MOMENTS and GRAM include the diagonal; ALL is both."""

    NONE = 0
    DIAGONAL = 1
    MOMENTS = DIAGONAL | 2
    GRAM = DIAGONAL | 4
    ALL = MOMENTS | GRAM


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """A layer's weight and the statistics of its calibration inputs.

    Attributes:
        weight: (out, in) float32 or float64.
        gram: (in, in) sum over tokens of x xᵀ, undamped; None when not collected.
        diagonal: (in,) sum over tokens of x²; taken from `gram` when not given.
        mean: (in,) mean over tokens of x.
        var: (in,) variance of x over the tokens within each sequence, averaged over sequences.
        tokens: number of tokens that the statistics are sums over.
        sequences: number of sequences that these tokens form.
        name: the layer's name, for messages.
        elsewhere: index of a part of the solver's work on the Gram matrix that another process does → function that
            waits for it, or gives None where it was taken before.

    Raises:
        UserError: shapes that do not fit each other, values that are not real floating-point numbers or not finite, or
            squares that are negative. That the Gram matrix is one is for `check_gram` to see.
    """

    weight: Tensor
    gram: Tensor | None = None
    diagonal: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    tokens: int | None = None
    sequences: int | None = None
    name: str = "the layer"
    elsewhere: Mapping[int, Callable[[], Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            raise UserError(f"{self.name}: weight must be a non-empty matrix (out, in), got {tuple(self.weight.shape)}")
        for label in ("weight", "gram", "diagonal", "mean", "var"):
            value = getattr(self, label)
            if value is not None and not value.is_floating_point():
                raise UserError(f"{self.name}: {label} must hold real floating-point numbers, got {value.dtype}")
            if value is not None and (value.is_meta or value.layout != torch.strided):
                kind = "meta" if value.is_meta else value.layout
                raise UserError(f"{self.name}: {label} must be a dense tensor with values, got a {kind} one")
        if self.weight.dtype not in (torch.float32, torch.float64):
            object.__setattr__(self, "weight", self.weight.float())
        if self.diagonal is None and self.gram is not None and self.gram.ndim == 2:
            object.__setattr__(self, "diagonal", self.gram.diagonal().clone())
        width = self.weight.shape[1]
        for label, shape in (("gram", (width, width)), ("diagonal", (width,)), ("mean", (width,)), ("var", (width,))):
            value = getattr(self, label)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise UserError(f"{self.name}: {label} must have shape {shape}, got {tuple(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                bad = ~torch.isfinite(value if value.ndim == 1 else value.diagonal())  # one bad input spoils its row
                if not bool(bad.any()):
                    bad = (~torch.isfinite(value)).any(0)
                raise UserError(
                    f"{self.name}: {label} of the inputs has NaN or infinite entries at {int(bad.sum())} of {width} "
                    f"inputs (the first is {int(bad.nonzero()[0])}): NaN or overflow in the activations; check the "
                    "checkpoint, or use another dtype"
                )
            object.__setattr__(self, label, value.to(self.weight))
        if not bool(torch.isfinite(self.weight).all()):
            bad = int((~torch.isfinite(self.weight)).sum())
            raise UserError(f"{self.name}: the weight has {bad} NaN or infinite entries")
        if self.diagonal is not None and bool((self.diagonal < 0).any()):
            raise UserError(f"{self.name}: the Gram matrix has negative diagonal entries; it must be a sum of x xᵀ")
        if self.var is not None and bool((self.var < 0).any()):
            raise UserError(f"{self.name}: var has negative entries; it must be a variance of the inputs")

    def check_gram(self, given: torch.dtype) -> None:
        """Refuse a Gram matrix that cannot be a sum of x xᵀ, to rounding: half of one, one of products with other
        vectors, or one that contradicts the mean.

        Args:
            given: the dtype that it was rounded to.

        Raises:
            UserError: it is not symmetric, has an entry beyond √(Gᵢᵢ Gⱼⱼ), or a diagonal below tokens · mean².
        """
        tolerance = 1e-3 if given in (torch.float32, torch.float64) else 3e-2
        size = self.diagonal.sqrt()
        size = torch.where(size > 0, size, 1.0)
        scaled = (
            self.gram / size / size[:, None]
        )  # cosines between the inputs; both divisions, lest a product overflows
        worst = float((scaled - scaled.T).abs().max())
        if worst > tolerance:
            raise UserError(
                f"{self.name}: the Gram matrix is not symmetric (entries differ from their mirror by up to {worst:.2g} "
                "of √(Gᵢᵢ Gⱼⱼ)): give the whole XᵀX, both triangles"
            )
        if bool((scaled.abs() > 1 + tolerance).any()):
            raise UserError(
                f"{self.name}: the Gram matrix has entries beyond √(Gᵢᵢ Gⱼⱼ), which no sum of x xᵀ has: give XᵀX"
            )
        if self.mean is not None and self.tokens is not None:
            least = self.tokens * self.mean.square()
            if bool((least > (1 + tolerance) * self.diagonal + 1e-30).any()):
                raise UserError(
                    f"{self.name}: the Gram matrix's diagonal is below tokens · mean²: give gram as a plain sum over "
                    "tokens, and mean as a mean over them"
                )

    @classmethod
    def from_inputs(
        cls, weight: Tensor, inputs: Tensor, sequences: int | None = None, name: str = "the layer"
    ) -> LayerProblem:
        """The problem whose statistics are those of `inputs`.

        Args:
            weight: (out, in).
            inputs: (tokens, in), or (sequences, length, in).
            sequences: into how many sequences of equal length, in order, a (tokens, in) input divides; 1 if not given.
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
        return cls(
            weight=weight,
            gram=x.T @ x,
            mean=x.mean(0),
            var=by_sequence.var(1, unbiased=False).mean(0),
            tokens=x.shape[0],
            sequences=sequences,
            name=name,
        )

    def replaced(self, gram: Tensor) -> LayerProblem:
        """The same weight with the Gram matrix (in, in) of other inputs, and nothing else of them."""
        return LayerProblem(self.weight, gram=gram, name=self.name)

    @property
    def available(self) -> Statistics:
        """The statistics that this problem carries."""
        found = Statistics.NONE
        if self.diagonal is not None:
            found |= Statistics.DIAGONAL
            found |= Statistics.GRAM if self.gram is not None else Statistics.NONE
            found |= Statistics.NONE if self.mean is None or self.var is None else Statistics.MOMENTS
        return found

    def require(self, statistics: Statistics) -> None:
        """Raise UserError, naming what to give, unless these statistics are here.

        MOMENTS also needs the counts of tokens and sequences, which turn means into sums.
        """
        needed = ["diagonal"] if Statistics.DIAGONAL in statistics else []
        needed += ["gram"] if Statistics.GRAM in statistics else []
        moments = Statistics.MOMENTS in statistics
        needed += ["mean", "var", "tokens", "sequences"] if moments else []
        missing = dict.fromkeys("gram" if n == "diagonal" else n for n in needed if getattr(self, n) is None)
        if missing:
            raise UserError(
                f"{self.name}: this method needs statistics of the layer's inputs that are missing; give inputs=X"
                f"{', sequences=N' if moments else ''}, or {', '.join(f'{n}=' for n in missing)}"
            )

    @cached_property
    def dead(self) -> Tensor:
        """(in,) bool: inputs that were zero on every calibration token."""
        if self.diagonal is None:
            return torch.zeros(self.weight.shape[1], dtype=torch.bool, device=self.weight.device)
        return self.diagonal == 0

    @cached_property
    def energy(self) -> float:
        """tr(W G Wᵀ), the squared norm of the dense layer's output."""
        return self._quadratic(self.weight)

    @cached_property
    def _root_scale(self) -> float:
        return power_of_two(float(self.diagonal.max()) ** 0.5)

    def relative_loss(self, weight: Tensor) -> float:
        """‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖², undamped; 0 when both vanish. Needs the Gram matrix.

        Args:
            weight: (out, in), the candidate Ŵ.
        """
        loss = self._quadratic(self.weight - weight.to(self.weight))
        if self.energy > 0:
            return loss / self.energy
        return 0.0 if loss == 0 else float("inf")

    def _quadratic(self, delta: Tensor) -> float:
        if self.gram is None:
            raise UserError(f"{self.name}: the loss needs the Gram matrix of the inputs; give inputs=X or gram=G")
        # Squares of 1e-20 and 1e20 do not fit float32: both factors are first brought near 1, exactly.
        scale = power_of_two(float(delta.abs().max()))
        delta = (delta / scale).div_(self._root_scale)
        value = float(((delta @ self.gram) * delta).sum(dtype=torch.float64))
        return max(value, 0.0) * (scale * self._root_scale) ** 2


def power_of_two(value: float) -> float:
    """The power of two next below a positive number, 1 for 0: dividing by it changes a float's exponent only."""
    return 2.0 ** (math.frexp(value)[1] - 1) if 0 < value < math.inf else 1.0
