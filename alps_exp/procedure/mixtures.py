"""What cannot be done with the experts of a mixture, found before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..base.errors import UserError
from ..layer.method import Method
from ..model.layers import ExpertLayer, find_layer
from ..training.finish import Finish
from .trained import TrainingMethod


def check_method(model: nn.Module, names: Iterable[str], method: Method) -> None:
    """Raise UserError if an expert is to be pruned by a method that cannot.

    Args:
        model: the model, or its skeleton.
        names: of the layers to prune.
        method: to prune them by.
    """
    found = _experts(model, names)
    if found and (misfit := method.misfit_of_experts(found)) is not None:
        raise UserError(
            f"{misfit}, and {next(iter(found))} is stored with the other experts of its layer: give another method, or "
            "leave the experts dense (layers.exclude=['*experts*'])"
        )


def check_experts(model: nn.Module, names: Iterable[str], method: Method, finish: Finish, weighting: str) -> None:
    """Raise UserError for what else cannot be done with an expert that is to be pruned.

    Args:
        model: the model, or its skeleton.
        names: of the layers to prune.
        method, finish, weighting: the job's.
    """
    found = _experts(model, names)
    weighed = next((name for name, layer in found.items() if not layer.experts.sums), None)
    if weighting != "none" and weighed is not None:
        raise UserError(
            f"expert_weighting={weighting} counts tokens by the weights of experts' outputs, and {weighed} is handed "
            "weighted inputs: leave that out, or leave the experts dense (layers.exclude=['*experts*'])"
        )
    whole = isinstance(method, TrainingMethod) and method.whole
    if whole or finish.name != "none":
        _check_whole(found, type(method).__name__ if whole else f"finish={finish.name}")


def _experts(model: nn.Module, names: Iterable[str]) -> dict[str, ExpertLayer]:
    layers = (find_layer(model, name) for name in names)
    return {layer.name: layer for layer in layers if isinstance(layer, ExpertLayer)}


def _check_whole(layers: Mapping[str, ExpertLayer], what: str) -> None:
    """Raise UserError if a parameter that holds experts is pruned in part: training it would change the rest, too."""
    parts: dict[str, int] = {}
    for layer in layers.values():
        parts[layer.stored] = parts.get(layer.stored, 0) + 1
    for layer in layers.values():
        experts = layer.experts
        own = [kind for kind in experts.projections if experts.parameter(kind) == experts.parameter(layer.projection)]
        if parts[layer.stored] != experts.count * len(own):
            raise UserError(
                f"{what} trains {layer.stored} as a whole, of which some experts or matrices stay dense: prune all of "
                f"them, or none (layers.exclude=['*experts*'])"
            )
