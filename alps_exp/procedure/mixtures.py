"""What cannot be done with the experts of a mixture, found before anything runs."""

from __future__ import annotations

from collections.abc import Iterable

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
) -> None:
    """Raise UserError for what needs every layer to be a module of its own, if an expert is to be pruned.

    Args:
        model: the model, or its skeleton.
        names: of the layers to prune.
        method, target, sensitivity, allocation, finish: the job's.
    """
    found = ((name, find_layer(model, name)) for name in names)
    expert, layer = next(((name, layer) for name, layer in found if isinstance(layer, ExpertLayer)), (None, None))
    if layer is None:
        return
    asked = {
        "target=stream follows the sum over a token's experts into the residual stream, which is made outside of their "
        "module here": target.beside and not layer.experts.sums,
        "sensitivity=outputs takes gradients at the outputs of single layers": sensitivity.used,
        "this allocation reads the inputs and gradients of single layers": allocation.needs in ("inputs", "gradients"),
        f"finish={finish.name} trains the kept weights of single layers": finish.name != "none",
        f"{type(method).__name__} prunes blocks or the model as a whole": not isinstance(method, Solver),
    }
    for words, given in asked.items():
        if given:
            raise UserError(
                f"{words}, and {expert} is stored with the other experts of its layer: leave that out, or leave the "
                "experts dense (layers.exclude=['*experts*'])"
            )
