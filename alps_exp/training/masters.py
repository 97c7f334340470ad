"""float32 masters of the weights that a training changes: of a masked weight, of its kept entries alone.

An optimiser that is given the masters keeps state for kept entries only, and what is pruned stays exactly zero,
since nothing ever writes there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Masters:
    """The masters of some weights of a module.

    Gradients are gathered into them as soon as a backward pass has made each, in float32, and those of the weights are
    freed: gradients of one weight at a time are held in full.

    Args:
        module: it computes with the weights, in their own dtype.
        trained: name of a weight in the module → its mask, of the same shape, or None: all of its entries are trained.
        multiple: of which the number of kept entries is made by zeros behind them, which stay zero; optimisers with
            8-bit state ask for that.

    Attributes:
        values: name → parameter in float32, or float64 where the weight is: (kept,) of a masked weight, of the weight's
            own shape otherwise. A weight without mask that is not in half precision is its own master.
    """

    def __init__(self, module: nn.Module, trained: Mapping[str, Tensor | None], multiple: int = 1) -> None:
        self._multiple = multiple
        self._module = module
        self._weights: dict[str, nn.Parameter] = {}
        self._indices: dict[str, Tensor | None] = {}
        self.values: dict[str, nn.Parameter] = {}
        for name, mask in trained.items():
            weight = module.get_parameter(name)
            if mask is not None and tuple(mask.shape) != tuple(weight.shape):
                raise ValueError(f"{name}: a mask of shape {tuple(mask.shape)} for {tuple(weight.shape)}")
            weight.data = weight.data.contiguous()
            index = None
            if mask is not None and not bool(mask.all()):
                index = mask.to(weight.device).flatten().nonzero().squeeze(1)
                index = index.int() if weight.numel() < 2**31 else index  # half the memory
                if not len(index):
                    continue
            self._weights[name], self._indices[name] = weight, index
            taken = weight.data if index is None else self._picked(weight.data, index)
            self.values[name] = nn.Parameter(taken.to(torch.promote_types(taken.dtype, torch.float32)))

    def _picked(self, tensor: Tensor, index: Tensor) -> Tensor:
        return nn.functional.pad(tensor.reshape(-1).index_select(0, index), (0, -len(index) % self._multiple))

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """For the length of the context backward passes fill the masters' gradients, and of all the module's parameters
        none but the trained ones asks for one."""
        others = [(parameter, parameter.requires_grad) for parameter in self._module.parameters()]
        handles = []
        for parameter, _ in others:
            parameter.requires_grad_(False)
        for name, weight in self._weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(self._collector(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, asked in others:
                parameter.requires_grad_(asked)
            self.forget()

    def _collector(self, name: str):
        index, value = self._indices[name], self.values[name]

        def collect(weight: nn.Parameter) -> None:
            gradient, weight.grad = weight.grad, None
            gradient = gradient if index is None else self._picked(gradient, index)
            if value.grad is None:
                value.grad = gradient.to(value.dtype, copy=True)
            else:
                value.grad.add_(gradient)

        return collect

    def forget(self) -> None:
        """Drop all gradients."""
        for value in self.values.values():
            value.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Give the module's weights the masters' values, rounded to their dtype."""
        strict = torch.are_deterministic_algorithms_enabled()
        warned = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)  # it would sort the places, none of which comes twice, in every step
        try:
            self._write()
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warned)

    def _write(self) -> None:
        for name, value in self.values.items():
            weight, index = self._weights[name].data, self._indices[name]
            if index is not None:
                weight.view(-1).index_copy_(0, index.long(), value.detach()[: len(index)].to(weight.dtype))
            elif weight.data_ptr() != value.data_ptr():
                weight.copy_(value)

    def copied(self) -> dict[str, Tensor]:
        """The values in host memory."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.values.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over values that `copied` gave."""
        for name, value in self.values.items():
            value.copy_(values[name])

    def check_zeros(self, what: str) -> None:
        """Raise RuntimeError if any pruned entry of the module's weights is not zero."""
        for name, index in self._indices.items():
            if index is not None:
                weight = self._weights[name].data.view(-1)
                if weight.count_nonzero() != weight.index_select(0, index).count_nonzero():
                    raise RuntimeError(f"{what}: {name} has weights that are not zero where it was pruned")
