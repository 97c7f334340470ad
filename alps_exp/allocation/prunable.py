"""What of a model can be pruned, and whether its weights are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..base.errors import UserError
from ..model.layers import Layer
from ..model.structure import block_linears, find_blocks
from .selection import Selection


def linear_shapes(model: nn.Module, selection: Selection) -> dict[str, tuple[int, int]]:
    """All linear layers of the decoder blocks, name → (out, in); works on the meta device.

    Raises:
        UserError: no decoder blocks, or a weight that cannot be pruned and is not excluded: one that is no linear
            layer's, or that several modules share.
    """
    prefix, blocks = find_blocks(model)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shapes = {}
    for index, block in enumerate(blocks):
        for name, module in block_linears(block, f"{prefix}.{index}", selection.excluded).items():
            shapes[name] = Layer(name, module).shape
            shared = [owner for owner in owners.get(id(module.weight), []) if owner != f"{name}.weight"]
            if shared and not selection.excluded(name):
                raise UserError(
                    f"{name} shares its weight with {shared[0].removesuffix('.weight')}, and cannot be pruned by "
                    "itself: leave both dense (layers.exclude=[...])"
                )
    return shapes


def other_names(model: nn.Module) -> list[str]:
    """What else a user may name as excluded although it is never pruned: leaf modules and weights."""
    leaves = [name for name, module in model.named_modules() if next(module.children(), None) is None]
    return leaves + [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def check_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UserError for the first of these layers that has NaN or infinite weights."""
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        if not all(torch.isfinite(bound) for bound in weight.aminmax()):  # one pass, without a copy
            bad = int((~torch.isfinite(weight)).sum())
            raise UserError(f"{name}: the weight has {bad} NaN or infinite entries: check the checkpoint")
