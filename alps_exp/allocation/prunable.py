"""What of a model can be pruned, and whether its weights are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..base.errors import UserError
from ..model.layers import ExpertLayer, find_layer
from ..model.structure import block_layers, find_blocks
from .selection import Selection


def linear_shapes(model: nn.Module, selection: Selection) -> dict[str, tuple[int, int]]:
    """All linear layers of the decoder blocks, name → (out, in); works on the meta device.

    Experts whose parameter, which holds all of them, is excluded by its name are none.

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
        for name, layer in block_layers(block, f"{prefix}.{index}", selection.excluded).items():
            if isinstance(layer, ExpertLayer) and selection.names(layer.stored):
                continue
            shapes[name] = layer.shape
            shared = [owner for owner in owners.get(id(layer.held), []) if owner != layer.stored]
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
        weight = find_layer(model, name).weight
        if not all(torch.isfinite(bound) for bound in weight.aminmax()):  # one pass, without a copy
            bad = int((~torch.isfinite(weight)).sum())
            raise UserError(f"{name}: the weight has {bad} NaN or infinite entries: check the checkpoint")
