"""What is known of the inputs of a layer: sums over the calibration tokens, shared by all layers with the same input.

X    (tokens, in)   calibration input, row by row x
G    (in, in)       Gram matrix XᵀX, a plain sum over tokens, undamped
"""

from __future__ import annotations

import dataclasses
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
class Inputs:
    """Statistics of one input, checked once.

    Attributes:
        gram: (in, in) sum over tokens of x xᵀ, undamped; None when not collected.
        diagonal: (in,) sum over tokens of x²; taken from `gram` when not given.
        mean: (in,) mean over tokens of x.
        var: (in,) variance of x over the tokens within each sequence, averaged over sequences.
        tokens: number of tokens that the statistics are sums over.
        sequences: number of sequences that these tokens form.
        correction: (out, in) of the one layer that this input feeds: sum over tokens of r xᵀ, where r is what a target
            wants its output to be beyond that of the dense weight.
        held_out: the Gram matrix of other tokens, to measure losses on.
        prior: what is known of the inputs of all experts of a layer together, where this is one of them.
        name: of the layer, for messages.
        elsewhere: index of a part of the solver's work on the Gram matrix that another process does → function that
            waits for it, or gives None where it was taken before.

    Raises:
        UserError: shapes that do not fit each other, values that are not real floating-point numbers or not finite, or
            squares that are negative. That the Gram matrix is one is for `check_gram` to see.
    """

    gram: Tensor | None = None
    diagonal: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    tokens: int | None = None
    sequences: int | None = None
    correction: Tensor | None = None
    held_out: Tensor | None = None
    prior: Inputs | None = None
    name: str = "the layer"
    elsewhere: Mapping[int, Callable[[], Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label, value in self.tensors().items():
            require_dense(f"{self.name}: {label}", value)
        if self.diagonal is None and self.gram is not None and self.gram.ndim == 2:
            object.__setattr__(self, "diagonal", self.gram.diagonal().clone())
        for label, value in self.tensors().items():
            self._check_shape(label, value, self.width)
            self._check_finite(label, value)
        if self.diagonal is not None and bool((self.diagonal < 0).any()):
            raise UserError(f"{self.name}: the Gram matrix has negative diagonal entries; it must be a sum of x xᵀ")
        if self.var is not None and bool((self.var < 0).any()):
            raise UserError(f"{self.name}: var has negative entries; it must be a variance of the inputs")

    def tensors(self) -> dict[str, Tensor]:
        """The statistics that are here, by name."""
        names = ("gram", "diagonal", "mean", "var", "correction", "held_out")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @cached_property
    def width(self) -> int | None:
        """Number of inputs; None where nothing is known of them."""
        return next((value.shape[-1] for value in self.tensors().values() if value.ndim), None)

    @cached_property
    def dead(self) -> Tensor:
        """(in,) bool: inputs that were zero on every calibration token. Needs the diagonal."""
        return self.diagonal == 0

    def fit(self, width: int) -> None:
        """Raise UserError unless these are statistics of an input of this width."""
        for label, value in self.tensors().items():
            self._check_shape(label, value, width)

    def _check_shape(self, label: str, value: Tensor, width: int) -> None:
        wanted = {"gram": (width, width), "held_out": (width, width), "correction": (*value.shape[:1], width)}
        if tuple(value.shape) != (shape := wanted.get(label, (width,))):
            raise UserError(f"{self.name}: {label} must have shape {shape}, got {tuple(value.shape)}")

    def _check_finite(self, label: str, value: Tensor) -> None:
        if value.numel() == 0:
            raise UserError(f"{self.name}: {label} must not be empty, got {tuple(value.shape)}")
        if all(torch.isfinite(bound) for bound in value.aminmax()):  # one pass, without a copy
            return
        bad = ~torch.isfinite(value if value.ndim == 1 else value.diagonal())  # one bad input spoils its row
        if not bool(bad.any()):
            bad = (~torch.isfinite(value)).any(0)
        raise UserError(
            f"{self.name}: {label} of the inputs has NaN or infinite entries at {int(bad.sum())} of "
            f"{value.shape[-1]} inputs (the first is {int(bad.nonzero()[0])}): NaN or overflow in the activations; "
            "check the checkpoint, or use another dtype"
        )

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
        scaled = self.gram / size / size[:, None]  # cosines between inputs; divided twice, lest a product overflows
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

    def to(self, like: Tensor | torch.device) -> Inputs:
        """The same on another device, in another dtype; itself where nothing changes.

        Args:
            like: a device, or a tensor on it, whose dtype is taken over too.
        """
        moved = {name: value.to(like) for name, value in self.tensors().items()}
        prior = self.prior.to(like) if self.prior is not None else None
        if prior is self.prior and all(moved[name] is value for name, value in self.tensors().items()):
            return self
        return _unchecked(self, **moved, prior=prior)

    def beside(self, prior: Inputs | None) -> Inputs:
        """The same as one of several that `prior` is the sum of."""
        return _unchecked(self, prior=prior)

    def borrowed(self, strength: float) -> int:
        """How many tokens `shrunk` adds."""
        return 0 if self.prior is None else max(round(strength * self.width), int(not self.tokens))

    def shrunk(self, strength: float) -> Inputs:
        """The statistics that a solver is given of an expert: with some tokens more, like those of all experts of the
        layer on average. Without `prior` they are what they were.

        Args:
            strength: so many tokens more for each input; an expert without tokens gets one at least.
        """
        prior, more = self.prior, self.borrowed(strength)
        if not more:
            return self
        fields: dict = {"tokens": self.tokens + more, "sequences": max(self.sequences, 1), "prior": None}
        share = more / prior.tokens
        if self.gram is not None:
            fields |= {"gram": torch.add(self.gram, prior.gram, alpha=share), "diagonal": None}
        elif self.diagonal is not None:
            fields["diagonal"] = torch.add(self.diagonal, prior.diagonal, alpha=share)
        if self.mean is not None:
            weight = more / fields["tokens"]
            fields |= {"mean": self.mean.lerp(prior.mean, weight), "var": self.var.lerp(prior.var, weight)}
        return self.replaced(**fields)

    def replaced(self, **fields) -> Inputs:
        """The same with other values in some of its attributes, which are checked."""
        return dataclasses.replace(self, **fields)

    @property
    def available(self) -> Statistics:
        """The statistics that are here."""
        found = Statistics.NONE
        if self.diagonal is not None:
            found |= Statistics.DIAGONAL
            found |= Statistics.GRAM if self.gram is not None else Statistics.NONE
            found |= Statistics.NONE if self.mean is None or self.var is None else Statistics.MOMENTS
        return found

    def require(self, statistics: Statistics, name: str) -> None:
        """Raise UserError, naming what to give, unless these statistics are here.

        MOMENTS also needs the counts of tokens and sequences, which turn means into sums.

        Args:
            statistics: what is needed.
            name: of the layer, for the message.
        """
        needed = ["diagonal"] if Statistics.DIAGONAL in statistics else []
        needed += ["gram"] if Statistics.GRAM in statistics else []
        moments = Statistics.MOMENTS in statistics
        needed += ["mean", "var", "tokens", "sequences"] if moments else []
        missing = dict.fromkeys("gram" if n == "diagonal" else n for n in needed if getattr(self, n) is None)
        if missing:
            raise UserError(
                f"{name}: this method needs statistics of the layer's inputs that are missing; give inputs=X"
                f"{', sequences=N' if moments else ''}, or {', '.join(f'{n}=' for n in missing)}"
            )


def _unchecked(inputs: Inputs, **fields) -> Inputs:
    """`inputs` with other attributes, of which nothing needs to be checked again."""
    made = object.__new__(Inputs)
    for name in inputs.__dataclass_fields__:
        object.__setattr__(made, name, fields.get(name, getattr(inputs, name)))
    return made


def require_dense(what: str, value: Tensor) -> None:
    """Raise UserError unless the tensor holds real floating-point numbers at every place."""
    if not value.is_floating_point():
        raise UserError(f"{what} must hold real floating-point numbers, got {value.dtype}")
    if value.is_meta or value.layout != torch.strided:
        kind = "meta" if value.is_meta else value.layout
        raise UserError(f"{what} must be a dense tensor with values, got a {kind} one")
