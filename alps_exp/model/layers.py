"""Handles on the weights to prune, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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
        weight = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return tuple(self.weight.shape)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Replace the weight by another (out, in), rounded to its dtype."""
        self.weight.copy_(weight)
