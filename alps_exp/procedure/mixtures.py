"""What cannot be done with the experts of a mixture, found before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..allocation.allocations import Allocation
from ..base.errors import UserError
from ..calibration.sensitivity import SensitivityChoice
from ..layer.method import Method
from ..layer.solver import Solver
from ..methods.target import Target
from ..model.layers import ExpertLayer, find_layer
from ..training.finish import Finish


def check_experts(
    model: nn.Module,
    names: Iterable[str],
    method: Method,
    target: Target,
    sensitivity: SensitivityChoice,
    allocation: Allocation,
    finish: Finish,
    weighting: str,
) -> None:
    """Raise UserError for what needs every layer to be a module of its own, if an expert is to be pruned.

    Args:
        model: the model, or its skeleton.
        names: of the layers to prune.
        method, target, sensitivity, allocation, finish, weighting: the job's.
    """
    layers = (find_layer(model, name) for name in names)
    found = {layer.name: layer for layer in layers if isinstance(layer, ExpertLayer)}
    if not found:
        return
    expert, layer = next(iter(found.items()))
    asked = {
        "target=stream follows the sum over a token's experts into the residual stream, which is made outside of their "
        "module here": target.beside and not layer.experts.sums,
        f"expert_weighting={weighting} counts tokens by the weights of experts' outputs, and inputs are weighed here": (
            weighting != "none" and not layer.experts.sums
        ),
        "sensitivity=outputs takes gradients at the outputs of single layers": sensitivity.used,
        "this allocation reads the inputs and gradients of single layers": allocation.needs in ("inputs", "gradients"),
        f"{type(method).__name__} prunes blocks or the model as a whole": not isinstance(method, Solver),
    }
    for words, given in asked.items():
        if given:
            raise UserError(
                f"{words}, and {expert} is stored with the other experts of its layer: leave that out, or leave the "
                "experts dense (layers.exclude=['*experts*'])"
            )
    if finish.name != "none":
        _check_whole(found, finish)


def _check_whole(layers: Mapping[str, ExpertLayer], finish: Finish) -> None:
    """Raise UserError if a parameter that holds experts is pruned in part: training it would change the rest, too."""
    parts: dict[str, int] = {}
    for layer in layers.values():
        parts[layer.stored] = parts.get(layer.stored, 0) + 1
    for layer in layers.values():
        experts = layer.experts
        own = [kind for kind in experts.projections if experts.parameter(kind) == experts.parameter(layer.projection)]
        if parts[layer.stored] != experts.count * len(own):
            raise UserError(
                f"finish={finish.name} trains {layer.stored} as a whole, of which some experts or matrices stay dense: "
                "prune all of them, or leave finish out"
            )
