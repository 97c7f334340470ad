"""What a configuration names beside the method, built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..allocation.allocations import Allocation, build_allocation
from ..calibration.sensitivity import SensitivityChoice, build_sensitivity
from ..methods.target import Target, build_target
from ..training.finish import Finish, build_finish


class Choices(NamedTuple):
    """One of each; the fields are those of `Settings`."""

    target: Target
    sensitivity: SensitivityChoice
    allocation: Allocation
    finish: Finish

    @classmethod
    def of(cls, cfg: Mapping) -> Choices:
        """Those of a composed configuration.

        Raises:
            UserError: an unknown choice or field, or a value that is not allowed.
        """
        target, sensitivity = build_target(cfg["target"]), build_sensitivity(cfg["sensitivity"])
        return cls(target, sensitivity, build_allocation(cfg["allocation"]), build_finish(cfg["finish"]))
