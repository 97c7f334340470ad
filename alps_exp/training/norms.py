"""Root-mean-square norms in one kernel each, while a model is trained on a GPU.

Written out, as models have them, such a norm passes through memory about six times forwards and more backwards, and
keeps two copies of its input in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn

_EPSILON = ("variance_epsilon", "eps", "epsilon")


@contextmanager
def fused_norms(module: nn.Module) -> Iterator[None]:
    """The norms that a module on a GPU has inside run fused for the length of the context; results differ in rounding.

    A norm is known by its values: x / √(mean x² + ε) times w, or 1 + w in single precision. Others, and those that have
    hooks, a forward of their own, or one that takes more than the hidden states, stay as they are.
    """
    found = [(part, offset) for part in module.modules() if (offset := _offset(part)) is not None]
    for part, offset in found:
        part.forward = _fused(part, offset)
    try:
        yield
    finally:
        for part, _ in found:
            del part.forward


def _offset(part: nn.Module) -> float | None:
    """What is added to the weights of a norm on a GPU; None of what is not one, or is more than that."""
    weight = getattr(part, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not weight.is_cuda or weight.is_meta:
        return None
    if len(list(part.parameters())) > 1 or any(True for _ in part.children()) or "forward" in vars(part):
        return None
    if part._forward_hooks or part._forward_pre_hooks or len(signature(part.forward).parameters) != 1:
        return None
    offset = matching_offset(part) if _epsilon(part) is not None else None
    # 1 + w in half precision would be rounded, the same way for every token; models do not round it.
    return None if offset and weight.dtype in (torch.float16, torch.bfloat16) else offset


@torch.no_grad()
def matching_offset(norm: nn.Module) -> float | None:
    """0 or 1, whichever makes of a norm's weights what it does to some input; None if neither does."""
    weight = norm.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator).to(weight)
    x[1] *= 1e-3  # where ε counts
    with torch.autocast(weight.device.type, enabled=False):
        wanted = norm(x)
        for offset in (0.0, 1.0):
            made = _normed(x, weight, offset, _epsilon(norm))
            close = wanted.shape == made.shape and torch.allclose(wanted.float(), made.float(), rtol=2e-2, atol=1e-5)
            if close and made.abs().max() > 1e-3:  # weights of zero would hide what the norm does
                return offset
    return None


def _epsilon(norm: nn.Module) -> float | None:
    return next((value for name in _EPSILON if isinstance(value := getattr(norm, name, None), float)), None)


def _fused(norm: nn.Module, offset: float):
    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return _normed(hidden, norm.weight, offset, _epsilon(norm))

    return forward


def _normed(x: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
    scale = (weight + offset if offset else weight).to(x.dtype)
    return nn.functional.rms_norm(x, (x.shape[-1],), scale, epsilon)
