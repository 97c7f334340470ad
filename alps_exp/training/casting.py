"""A module that computes in another dtype for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def cast(module: nn.Module, dtypes: Mapping[torch.dtype, torch.dtype]) -> Iterator[None]:
    """Parameters and buffers of some dtypes in others for the length of the context; then they are what they were."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in dtypes]
    homes = [(tensor, tensor.data) for tensor in dict.fromkeys(tensors)]
    try:
        for tensor, home in homes:
            tensor.data = home.to(dtypes[home.dtype])
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def floats_in(dtype: torch.dtype, value):
    """A tensor, or what dictionaries, lists and tuples hold, with what is in floating point in this dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: floats_in(dtype, part) for key, part in value.items()}
    return type(value)(floats_in(dtype, part) for part in value) if type(value) in (tuple, list) else value
