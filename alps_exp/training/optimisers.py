"""Optimisers: AdamW with its state in float32, or in 8 bits by a library that is installed."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..base.errors import UserError

STATES = ("float32", "8bit")
MULTIPLE = 256  # entries that share a scale in 8 bits; torchao keeps other numbers of entries in float32
_EIGHT_BIT = ("torchao.optim", "bitsandbytes.optim")


def optimiser(
    groups: Iterable[Sequence[nn.Parameter]],
    rate: float,
    betas: tuple[float, float],
    decay: float,
    state: str = "float32",
) -> torch.optim.Optimizer:
    """AdamW.

    Args:
        groups: float32 parameters on one device, in groups that may get rates of their own; there may be none.
        rate: learning rate.
        betas: decay of the first and of the second moment.
        decay: of the weights, decoupled.
        state: "float32" or "8bit" for both moments.

    Raises:
        UserError: 8 bits, and no library for them is installed.
    """
    made = [{"params": list(values)} for values in groups] or [{"params": []}]
    if state == "8bit":
        return eight_bit()(made, lr=rate, betas=betas, weight_decay=decay)
    fused = any(value.is_cuda for group in made for value in group["params"])
    return torch.optim.AdamW(made, lr=rate, betas=betas, weight_decay=decay, fused=fused)


def second_moment(optimiser: torch.optim.Optimizer, value: nn.Parameter) -> Tensor:
    """AdamW's running mean of squared gradients of a parameter, in its shape, without the correction for the start.

    Raises:
        UserError: it is in 8 bits of a library that does not give it in numbers.
    """
    found = optimiser.state[value].get("exp_avg_sq")
    if found is None:
        raise UserError(
            f"{type(optimiser).__module__} does not tell its second moments: install torchao, or give "
            "method.projection=magnitude"
        )
    return found if type(found) is Tensor else found.dequantize()


def eight_bit() -> type[torch.optim.Optimizer]:
    """AdamW with 8-bit state of the first library that is installed.

    Raises:
        UserError: there is none.
    """
    heard = logging.root.manager.disable
    logging.disable(max(heard, logging.WARNING))  # torchao tells of kernels for other machines
    try:
        for module in _EIGHT_BIT:
            with contextlib.suppress(ImportError, AttributeError, RuntimeError):
                return importlib.import_module(module).AdamW8bit
    finally:
        logging.disable(heard)
    raise UserError(
        "state=8bit needs torchao or bitsandbytes, and neither can be imported: pip install --no-deps torchao, or give "
        "state=float32"
    )
