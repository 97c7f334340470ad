"""Mixtures of experts: modules that hold the matrices of many experts in a few parameters.

E experts, h inputs, f inner units. An expert computes down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

    transformers' own    gate_up_proj (E, 2f, h), or up_proj (E, f, h) without a gate, and down_proj (E, h, f). How they
                         lie is read from what the decorator `use_experts_implementation` wrote on the module:
                         `is_transposed` (the last two axes the other way round), `is_concatenated` (gate first, then
                         up; otherwise their rows alternate), `has_bias`, `has_gate`
    Llama 4              gate_up_proj (E, h, 2f), down_proj (E, f, h); every expert is handed every token, multiplied by
                         its score, which is zero where the token is not the expert's
    DBRX                 mlp.w1 (gate), mlp.v1 (up) and mlp.w2 (down), each (E·f, h)

`forward` of the first and the last takes (hidden, top_k_index, top_k_weights).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..base.errors import UserError

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_TOKENS = 64  # of a batch on which a layout is tried out
# Largest difference between an expert's matrices as they are taken apart and the module itself, of its outputs' size.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, eq=False)
class Routed:
    """The tokens that one expert is handed.

    Attributes:
        expert: which one.
        tokens: (n,) their numbers among all tokens of the call, in ascending order.
        inputs: (n, h) of the expert.
        weights: (n,) what its output is multiplied by; None where it is added as it is.
    """

    expert: int
    tokens: Tensor
    inputs: Tensor
    weights: Tensor | None


class Experts(ABC):
    """A module that holds experts, and how it does.

    Attributes:
        module: it.
        count: how many experts there are.
        projections: names of the matrices of each.
        sums: whether the module gives the weighted sum over a token's experts, rather than the output of each.
    """

    projections: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")
    sums: ClassVar[bool] = True
    count: int

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @staticmethod
    def of(module: nn.Module) -> Experts | None:
        """The experts of a module; None where it holds none in a layout that is known."""
        return next((found for kind in _LAYOUTS if (found := kind.recognised(module)) is not None), None)

    @classmethod
    @abstractmethod
    def recognised(cls, module: nn.Module) -> Experts | None:
        """The experts of a module in this layout; None where they are not."""

    @abstractmethod
    def parameter(self, projection: str) -> str:
        """Name of the parameter inside the module that holds this matrix of every expert."""

    @abstractmethod
    def view(self, held: Tensor, projection: str, expert: int) -> Tensor:
        """(out, in) the part of one expert's matrix, a view.

        Args:
            held: shaped like the parameter that holds it.
            projection, expert: which matrix of which expert.
        """

    def weight(self, projection: str, expert: int) -> Tensor:
        """(out, in) of one expert, a view."""
        return self.view(self.module.get_parameter(self.parameter(projection)).detach(), projection, expert)

    @abstractmethod
    def read(self, expert: int, inputs: Tensor) -> Tensor:
        """(n, r) what those of an expert's matrices make of its inputs (n, h) that read them, side by side."""

    @abstractmethod
    def columns(self, projection: str) -> slice:
        """Where the outputs of one of them are in what `read` gives."""

    @abstractmethod
    def activated(self, read: Tensor) -> Tensor:
        """(n, f) what an expert's `down_proj` is fed, of what `read` gives."""

    def inner(self, expert: int, inputs: Tensor) -> Tensor:
        """(n, f) what an expert's `down_proj` is fed for its inputs (n, h)."""
        return self.activated(self.read(expert, inputs))

    def gradients(self, part: Routed, arguments: tuple[Tensor, ...], behind: Tensor) -> dict[str, Tensor]:
        """(n, out) the gradients of a loss at the outputs of an expert's matrices, before biases, by projection.

        Args:
            part: the expert's tokens.
            arguments: of the call.
            behind: the gradient at the module's output.
        """
        rows = behind.reshape(-1, behind.shape[-1])[self.rows(part, arguments)]
        down = rows if part.weights is None else rows * part.weights[:, None].to(rows.dtype)
        weight = self.weight("down_proj", part.expert)
        with torch.enable_grad():
            read = self.read(part.expert, part.inputs.detach()).detach().requires_grad_()
            inner = self.activated(read)
        found = torch.autograd.grad(inner, read, (down.to(weight.dtype) @ weight).to(inner.dtype))[0]
        readers = [kind for kind in self.projections if kind != "down_proj"]
        return {kind: found[:, self.columns(kind)] for kind in readers} | {"down_proj": down}

    def arguments(self, args: tuple, kwargs: Mapping) -> tuple[Tensor, ...]:
        """A call's own arguments: tokens (n, h), and where there are such the experts of each and their weights."""
        hidden, index, weights = (*args, *kwargs.values())[:3]
        return hidden.reshape(-1, hidden.shape[-1]), index, weights

    def count_tokens(self, arguments: tuple[Tensor, ...]) -> int:
        """How many tokens a call is about."""
        return arguments[0].shape[0]

    def first(self, arguments: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
        """The call for its first tokens only."""
        return tuple(value[:tokens] for value in arguments)

    def routed(self, arguments: tuple[Tensor, ...]) -> Iterator[Routed]:
        """The tokens of each expert that is handed any, expert by expert."""
        hidden, index, weights = arguments
        width = index.shape[-1]
        # Stable, so that the tokens of an expert stay in order; numbers beyond the last expert's stand for none.
        experts, places = index.reshape(-1).sort(stable=True)
        counts = torch.bincount(experts, minlength=self.count)[: self.count].tolist()
        flat = weights.reshape(-1)
        for expert, own in enumerate(places[: sum(counts)].split(counts)):
            if len(own):
                tokens = own // width
                yield Routed(expert, tokens, hidden[tokens], flat[own])

    @torch.no_grad()
    def check(self, arguments: tuple[Tensor, ...], name: str) -> None:
        """Compare what the matrices compute that are taken from the module with what the module computes.

        Args:
            arguments: of a call; its first tokens are used.
            name: of the module.

        Raises:
            UserError: they differ by more than rounding, so that the weights are stored in another way.
        """
        arguments = self.first(arguments, _TOKENS)
        own = self.module.forward(*arguments)
        own = (own if isinstance(own, Tensor) else own[0]).reshape(-1, self.weight("down_proj", 0).shape[0])
        made = torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))
        for part in self.routed(arguments):
            x = self.inner(part.expert, part.inputs)
            output = nn.functional.linear(x, self.weight("down_proj", part.expert)).to(made.dtype)
            if (bias := self._down_bias(part.expert)) is not None:
                output = output + bias.to(made.dtype)
            if part.weights is not None:
                output = output * part.weights[:, None].to(made.dtype)
            made.index_add_(0, self.rows(part, arguments), output)
        size = float(own.double().norm())
        difference = float((own.double() - made.double()).norm())
        if difference > _TOLERANCE[own.dtype] * size:
            raise UserError(
                f"{name} ({type(self.module).__name__}) does not compute what its matrices do, taken apart as they are "
                f"named (they differ by {difference / (size or 1.0):.2g}): leave its experts dense "
                f"(layers.exclude=['*{name.rpartition('.')[2]}.*'])"
            )

    def _down_bias(self, expert: int) -> Tensor | None:
        return None

    def rows(self, part: Routed, arguments: tuple[Tensor, ...]) -> Tensor:
        """Which rows of the module's output an expert's outputs are added to."""
        return part.tokens


class _Flagged(Experts):
    """The layouts of transformers' own modules."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._readers = "gate_up_proj" if module.has_gate else "up_proj"
        self.count = getattr(module, self._readers).shape[0]
        if not module.has_gate:
            self.projections = ("up_proj", "down_proj")

    @classmethod
    def recognised(cls, module: nn.Module) -> Experts | None:
        if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
            return None
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        readers, down = (module._parameters.get(name) for name in names)
        if readers is None or down is None or not readers.ndim == down.ndim == 3:
            return None
        if not (readers.is_floating_point() and down.is_floating_point()):
            return None
        (out, width), (hidden, inner) = (
            reversed(weight.shape[1:]) if module.is_transposed else weight.shape[1:] for weight in (readers, down)
        )
        fits = width == hidden and out == inner * (1 + module.has_gate) and len(readers) == len(down)
        return cls(module) if fits else None

    def parameter(self, projection: str) -> str:
        return "down_proj" if projection == "down_proj" else self._readers

    def view(self, held: Tensor, projection: str, expert: int) -> Tensor:
        own = held[expert].T if self.module.is_transposed else held[expert]
        return own if projection == "down_proj" else own[self.columns(projection)]

    def columns(self, projection: str) -> slice:
        module, second = self.module, projection == "up_proj"
        if not module.has_gate:
            return slice(None)
        if not module.is_concatenated:
            return slice(int(second), None, 2)
        half = self.view(module.down_proj, "down_proj", 0).shape[1]
        return slice(half, None) if second else slice(half)

    def read(self, expert: int, inputs: Tensor) -> Tensor:
        module = self.module
        weight = getattr(module, self._readers)[expert]
        output = nn.functional.linear(inputs.to(weight.dtype), weight.T if module.is_transposed else weight)
        if module.has_bias:
            output = output + getattr(module, f"{self._readers}_bias")[expert]
        return output

    def activated(self, read: Tensor) -> Tensor:
        return self.module._apply_gate(read) if self.module.has_gate else self.module.act_fn(read)

    def _down_bias(self, expert: int) -> Tensor | None:
        return self.module.down_proj_bias[expert] if self.module.has_bias else None


class _Scored(Experts):
    """Llama 4's."""

    sums = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.count = module.gate_up_proj.shape[0]

    @classmethod
    def recognised(cls, module: nn.Module) -> Experts | None:
        weights = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
        fits = all(weight is not None and weight.ndim == 3 and weight.is_floating_point() for weight in weights)
        return cls(module) if fits and type(module).__name__ == "Llama4TextExperts" else None

    def parameter(self, projection: str) -> str:
        return "down_proj" if projection == "down_proj" else "gate_up_proj"

    def view(self, held: Tensor, projection: str, expert: int) -> Tensor:
        return held[expert].T if projection == "down_proj" else held[expert].T[self.columns(projection)]

    def columns(self, projection: str) -> slice:
        half = self.module.down_proj.shape[1]
        return slice(half, None) if projection == "up_proj" else slice(half)

    def read(self, expert: int, inputs: Tensor) -> Tensor:
        return inputs @ self.module.gate_up_proj[expert]

    def activated(self, read: Tensor) -> Tensor:
        gate, up = read.chunk(2, dim=-1)
        return up * self.module.act_fn(gate)

    def arguments(self, args: tuple, kwargs: Mapping) -> tuple[Tensor, ...]:
        hidden = (*args, *kwargs.values())[0]
        return (hidden.reshape(-1, hidden.shape[-1]),)

    def count_tokens(self, arguments: tuple[Tensor, ...]) -> int:
        return arguments[0].shape[0] // self.count

    def first(self, arguments: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
        by_expert = arguments[0].view(self.count, -1, arguments[0].shape[-1])
        return (by_expert[:, :tokens].reshape(-1, by_expert.shape[-1]),)

    def routed(self, arguments: tuple[Tensor, ...]) -> Iterator[Routed]:
        by_expert = arguments[0].view(self.count, -1, arguments[0].shape[-1])
        there = (by_expert != 0).any(-1)
        for expert in range(self.count):
            tokens = there[expert].nonzero()[:, 0]
            if len(tokens):
                yield Routed(expert, tokens, by_expert[expert, tokens], None)

    def rows(self, part: Routed, arguments: tuple[Tensor, ...]) -> Tensor:
        return part.tokens + part.expert * self.count_tokens(arguments)


class _Flat(Experts):
    """DBRX's."""

    _NAMES: ClassVar[Mapping[str, str]] = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.count = module.num_experts

    @classmethod
    def recognised(cls, module: nn.Module) -> Experts | None:
        inside = getattr(module, "mlp", None)
        if type(module).__name__ != "DbrxExperts" or not isinstance(inside, nn.Module):
            return None
        weights = [inside._parameters.get(name) for name in cls._NAMES.values()]
        return cls(module) if all(w is not None and w.ndim == 2 and w.is_floating_point() for w in weights) else None

    def parameter(self, projection: str) -> str:
        return f"mlp.{self._NAMES[projection]}"

    def view(self, held: Tensor, projection: str, expert: int) -> Tensor:
        own = held.view(self.count, -1, held.shape[-1])[expert]
        return own.T if projection == "down_proj" else own

    def columns(self, projection: str) -> slice:
        half = self.module.mlp.w1.shape[0] // self.count
        return slice(half, None) if projection == "up_proj" else slice(half)

    def read(self, expert: int, inputs: Tensor) -> Tensor:
        own = [self.weight(name, expert) for name in ("gate_proj", "up_proj")]
        return torch.cat([nn.functional.linear(inputs, weight) for weight in own], dim=-1)

    def activated(self, read: Tensor) -> Tensor:
        gate, up = read.chunk(2, dim=-1)
        return self.module.mlp.activation_fn(gate) * up


_LAYOUTS: tuple[type[Experts], ...] = (_Flagged, _Scored, _Flat)


def is_router(name: str, shape: tuple[int, ...], holders: Mapping[str, int]) -> bool:
    """Whether a weight decides which expert is handed a token, or how much a shared one counts: by its role.

    Args:
        name: of the weight's module.
        shape: of the weight.
        holders: name of a module that experts are in → how many there are.
    """
    for holder, count in holders.items():
        if holder and not name.startswith(f"{holder}."):
            continue
        parts = name.removeprefix(holder).lower().strip(".").split(".")
        if any("router" in part for part in parts):
            return True
        if (parts[-1] == "gate" or parts[-1].endswith("_gate")) and shape[0] in (1, count):
            return True
    return False
