"""Whether the Triton kernels can run on a device."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """The module of Triton kernels; None where Triton is missing or cannot compile, and torch does the same work."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import triton_kernels

        zeros = torch.zeros(8, device=device)
        triton_kernels.group_step(zeros, zeros.clone(), zeros.bool(), 1.0, 1.0, zeros.bfloat16(), (2, 4))
    except Exception as error:  # no C compiler, a card that is too old: whatever it is, there is the plain path
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton cannot compile here, so passes run unfused and slower ({reason})", stacklevel=2)
        return None
    return triton_kernels
