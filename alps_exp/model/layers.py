"""Handles on the weights to prune, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import Experts


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer of a block. The only place that knows how its weight is stored.

    Attributes:
        name: full name in the model.
        module: the module that is called with the layer's input.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """(out, in), a view; GPT-2's Conv1D stores the transpose."""
        return self.view(self.held.detach())

    @property
    def held(self) -> Tensor:
        """The parameter that holds the weight, alone or beside others."""
        return self.module.weight

    @property
    def stored(self) -> str:
        """Full name of that parameter."""
        return f"{self.name}.weight"

    def view(self, held: Tensor) -> Tensor:
        """(out, in) the layer's part of a tensor that is shaped like that parameter, a view."""
        return held.T if isinstance(self.module, Conv1D) else held

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return tuple(self.weight.shape)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Replace the weight by another (out, in), rounded to its dtype."""
        self.weight.copy_(weight)


@dataclass(frozen=True, eq=False)
class ExpertLayer(Layer):
    """One matrix of one expert, whose module holds those of all experts.

    Attributes:
        experts: how the module stores them.
        expert: which one.
        projection: which of its matrices, "gate_proj", "up_proj" or "down_proj".
    """

    experts: Experts
    expert: int
    projection: str

    @property
    def held(self) -> Tensor:
        return self.module.get_parameter(self.experts.parameter(self.projection))

    @property
    def stored(self) -> str:
        owner = self.name.removesuffix(f".{self.expert}.{self.projection}")
        return f"{owner}.{self.experts.parameter(self.projection)}"

    def view(self, held: Tensor) -> Tensor:
        return self.experts.view(held, self.projection, self.expert)

    @property
    def reads_hidden(self) -> bool:
        """Whether its input is that of its expert; otherwise it is what the expert makes of it."""
        return self.projection != "down_proj"


def expert_layers(name: str, module: nn.Module) -> dict[str, ExpertLayer]:
    """The layers of a module that holds experts, `NAME.3.gate_proj` and so on; empty where it holds none.

    Args:
        name: of the module.
        module: any.
    """
    experts = Experts.of(module)
    if experts is None:
        return {}
    own = [(f"{name}.{e}.{kind}", e, kind) for e in range(experts.count) for kind in experts.projections]
    return {full: ExpertLayer(full, module, experts, e, kind) for full, e, kind in own}


def find_layer(model: nn.Module, name: str) -> Layer:
    """The layer of this full name; a model has it."""
    owner, _, rest = name.rpartition(".")
    if (place := owner.rpartition("."))[2].isdigit():
        with_experts = model.get_submodule(place[0])
        if (experts := Experts.of(with_experts)) is not None:
            return ExpertLayer(name, with_experts, experts, int(place[2]), rest)
    return Layer(name, model.get_submodule(name))
