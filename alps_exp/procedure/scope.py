"""What the block loop does only with layers that are solved one by one."""

from __future__ import annotations

from ..base.errors import UserError
from ..calibration.sensitivity import SensitivityChoice
from ..layer.method import Method
from ..layer.solver import Solver
from ..methods.target import LayerTarget, StreamTarget, Target


def check_scope(
    name: str, method: Method, target: Target, sensitivity: SensitivityChoice, capture: str, devices: int = 1
) -> None:
    """Raise UserError for what a method that prunes blocks or the model as a whole would pass over.

    Args:
        name: of the method, for the message.
        method: that prunes.
        target, sensitivity, capture: the job's.
        devices: number of processes.
    """
    if isinstance(method, Solver) or not method.prunes:
        return
    asked = {
        f"target={target.name}": target.beside or not isinstance(target, (LayerTarget, StreamTarget)),
        "capture=groups": capture == "groups",
        "sensitivity.rows": sensitivity.used and sensitivity.rows > 0,
        f"devices={devices}": devices > 1 and not method.trains,
    }
    for words, given in asked.items():
        if given:
            raise UserError(
                f"{words} goes with methods that prune layer by layer, and {name} prunes blocks or the model as a "
                "whole: leave it out"
            )
