"""float32 masters of the weights that a training changes: of a masked weight, of its kept entries alone.

An optimiser that is given the masters keeps state for kept entries only, and what is pruned stays exactly zero,
since nothing ever writes there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..numerics.kernels import kernel_for


class Places:
    """Where the kept entries of a weight are, by their numbers. `numerics.kept_kernels.Bits` does the same on a GPU.

    Args:
        mask: bool, any shape.

    Attributes:
        count: how many entries are kept.
    """

    def __init__(self, mask: Tensor) -> None:
        index = mask.flatten().nonzero().squeeze(1)
        self._index = index.int() if mask.numel() < 2**31 else index  # half the memory
        self.count = len(index)

    def pick(self, tensor: Tensor, into: Tensor) -> Tensor:
        """Write the kept entries of a tensor into the first `count` of `into`, in its dtype."""
        into[: self.count].copy_(tensor.reshape(-1).index_select(0, self._index))
        return into

    def add(self, tensor: Tensor, into: Tensor) -> Tensor:
        """Add them there."""
        into[: self.count].add_(tensor.reshape(-1).index_select(0, self._index))
        return into

    def put(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Write `values` to the kept entries of a contiguous tensor, in its dtype; the others stay as they are."""
        tensor.view(-1).index_copy_(0, self._index.long(), values[: self.count].to(tensor.dtype))
        return tensor


def places_of(mask: Tensor):
    """Where the kept entries are: as bits where the kernels run, as numbers otherwise."""
    bits = kernel_for(mask.device, "Bits")
    return Places(mask) if bits is None else bits(mask)


# Entries of a mask that are looked at together: each that is kept takes some 30 bytes meanwhile.
_TOGETHER = 1 << 24


def _digest(mask: Tensor) -> int:
    """Of a mask: a sum over the numbers of its entries, each mixed, that wraps around."""
    total = 0
    for begin, part in enumerate(mask.flatten().split(_TOGETHER)):
        numbers = part.nonzero().squeeze(1) + (begin * _TOGETHER + 1)
        numbers = numbers * -7046029254386353131
        numbers = (numbers ^ (numbers >> 29)) * -4658895280553007687
        total += int((numbers ^ (numbers >> 32)).sum())
    return total % 2**64


def _mixed(one: int, other: int) -> int:
    return (one * 6364136223846793005 + other + 1442695040888963407) % 2**64


def _block_of(name: str) -> tuple[str, int]:
    """What a weight's name says of its block: the words before the first number, and the number. Other weights, such as
    those of the last norm and the embedding, are in blocks of their own."""
    found = re.match(r"(?:(.*?)\.)?(\d+)\.", name)
    return (found[1] or "", int(found[2])) if found else (name, 0)


def _divided(sizes: Mapping[str, int], processes: int) -> dict[str, int]:
    """The process that each weight falls to: the largest first, each to the one with the least so far."""
    loads, owners = [0] * processes, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = min(range(processes), key=loads.__getitem__)
        loads[owners[name]] += sizes[name]
    return owners


class Single:
    """A process that trains by itself. Of several, of number `rank` from 0, each has all the weights, and each weight's
    master is in one of them."""

    size, rank = 1, 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor of process `owner` by its sum over the processes; the others' are of no use afterwards."""

    def spread(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor by that of process `owner`."""

    def gather(self, values: list) -> list:
        """What all processes give, one after the other."""
        return values

    def tell(self, value: object) -> object:
        """The first process's value."""
        return value


SINGLE = Single()


class Masters:
    """The masters of some weights of a module.

    Gradients are gathered into them as soon as a backward pass has made each, in float32, and those of the weights are
    freed: gradients of one weight at a time are held in full. Where processes work together, each weight's master is in
    one of them, which is sent the sum of all its gradients (ZeRO's stage 2, by whole weights). They are sent in one
    order, the reverse of the weights': in every pass each process sends each of them, zeros where it has none, whatever
    came first there. What waits for its turn is of one block: when an earlier one has gradients, a later one's weights
    that have none, such as experts without tokens, get none in this pass.

    Args:
        module: it computes with the weights, in their own dtype.
        trained: name of a weight in the module → its mask, of the same shape, or None: all of its entries are trained.
        multiple: of which the number of kept entries is made by zeros behind them, which stay zero; optimisers with
            8-bit state ask for that.
        together: the processes that work together.
        idle: make none, since the weights are only to be taken over.

    Attributes:
        values: name → parameter in float32, or float64 where the weight is: (kept,) of a masked weight, of the weight's
            own shape otherwise. A weight without mask that is not in half precision is its own master. Of several
            processes each has some of them.
        shapes: of the masters of all processes.
        digest: of which entries are trained.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Mapping[str, Tensor | None],
        multiple: int = 1,
        together: Single = SINGLE,
        idle: bool = False,
    ) -> None:
        self._multiple, self._together = multiple, together
        self._module = module
        self._weights: dict[str, nn.Parameter] = {}
        self._places: dict[str, Places | None] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._ready: set[str] = set()  # weights that have their gradients of this pass
        self._sent = 0  # how many of them have been
        self._reached: dict[
            str, int
        ] = {}  # the first block with gradients of this pass, by what comes before its number
        self.values: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, list[int]] = {}
        self._room: dict[str, Tensor] = {}
        self.digest = 0
        for name, mask in trained.items():
            weight = module.get_parameter(name)
            if mask is not None and tuple(mask.shape) != tuple(weight.shape):
                raise ValueError(f"{name}: a mask of shape {tuple(mask.shape)} for {tuple(weight.shape)}")
            weight.data = weight.data.contiguous()
            if mask is not None and not bool(mask.any()):
                continue
            places = None if mask is None or bool(mask.all()) else places_of(mask.to(weight.device))
            self._weights[name], self._places[name] = weight, places
            self.digest = _mixed(self.digest, 0 if places is None else _digest(mask))
            self._dtypes[name] = torch.promote_types(weight.dtype, torch.float32)
            self.shapes[name] = list(weight.shape) if places is None else [self._padded(places.count)]
        self._turn = {name: turn for turn, name in enumerate(reversed(self._weights))}
        self._owners = _divided({name: math.prod(shape) for name, shape in self.shapes.items()}, together.size)
        for name, weight in self._weights.items():
            if not idle and self._owners[name] == together.rank:
                places, dtype = self._places[name], self._dtypes[name]
                taken = weight.data.to(dtype) if places is None else self._picked(weight.data, places, dtype)
                self.values[name] = nn.Parameter(taken)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self._weights.values())).device

    @property
    def weights(self) -> list[Tensor]:
        """The module's weights that are trained, as they are."""
        return [weight.data for weight in self._weights.values()]

    def size(self, name: str) -> float:
        """Root mean square of the trained entries of a weight whose master this process has."""
        value, places = self.values[name].detach(), self._places[name]
        norm = torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float32))
        return float(norm) / math.sqrt(value.numel() if places is None else places.count)

    def _padded(self, count: int) -> int:
        return count + -count % self._multiple

    def _picked(self, tensor: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
        into = tensor.new_empty(self._padded(places.count), dtype=dtype)
        into[places.count :] = 0
        return places.pick(tensor, into)

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
        if self._together.size > 1:
            stack, block = _block_of(name)

            def collect(weight: nn.Parameter) -> None:
                if self._turn[name] < self._sent:
                    raise RuntimeError(f"the gradient of {name} came after those of an earlier block")
                self._ready.add(name)
                self._reached[stack] = min(block, self._reached.get(stack, block))
                self._send(everything=False)

            return collect
        places, value = self._places[name], self.values[name]

        def collect(weight: nn.Parameter) -> None:
            gradient, weight.grad = weight.grad, None
            if value.grad is not None:
                value.grad.add_(gradient) if places is None else places.add(gradient.contiguous(), value.grad)
            elif places is None:
                value.grad = gradient.to(value.dtype, copy=True)
            else:
                value.grad = self._picked(gradient.contiguous(), places, value.dtype)

        return collect

    def end_pass(self) -> None:
        """After every backward pass, also of one that was broken off or that this process had no windows for."""
        if self._together.size > 1:
            self._send(everything=True)
            self._ready, self._reached, self._sent = set(), {}, 0

    def _is_due(self, name: str) -> bool:
        """Whether a weight has its gradients of this pass, or gets none any more."""
        stack, block = _block_of(name)
        return name in self._ready or block > self._reached.get(stack, block)

    def _send(self, everything: bool) -> None:
        order = list(self._turn)
        while self._sent < len(order) and (everything or self._is_due(order[self._sent])):
            name = order[self._sent]
            weight, places, dtype = self._weights[name], self._places[name], self._dtypes[name]
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                gradient = torch.zeros(self.shapes[name], dtype=dtype, device=weight.device)
            elif places is None:
                gradient = gradient.to(dtype).contiguous()
            else:
                gradient = self._picked(gradient.contiguous(), places, dtype)
            self._together.reduce(gradient, self._owners[name])
            self._sent += 1
            if (value := self.values.get(name)) is not None:
                value.grad = gradient if value.grad is None else value.grad.add_(gradient)

    def forget(self) -> None:
        """Drop all gradients."""
        for value in self.values.values():
            value.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Give the module's weights, in all processes, the masters' values, rounded to their dtype."""
        strict = torch.are_deterministic_algorithms_enabled()
        warned = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)  # it would sort the places, none of which comes twice, in every step
        try:
            self._write()
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warned)

    def _write(self) -> None:
        for name, weight in self._weights.items():
            if (value := self.values.get(name)) is not None:
                self._put(name, value.detach())
            self._together.spread(weight.data, self._owners[name])

    def _put(self, name: str, value: Tensor) -> None:
        weight, places = self._weights[name].data, self._places[name]
        if places is not None:
            places.put(value, weight)
        elif weight.data_ptr() != value.data_ptr():
            weight.copy_(value)

    def trained(self) -> dict[str, Tensor]:
        """What the module's weights have where they are trained, in their dtype, in host memory."""
        return {
            name: (weight.data if places is None else self._picked(weight.data, places, weight.dtype)).cpu()
            for (name, weight), places in zip(self._weights.items(), self._places.values(), strict=True)
        }

    @torch.no_grad()
    def take(self, trained: Mapping[str, Tensor]) -> None:
        """Give the module's weights what `trained` gave."""
        for name, weight in self._weights.items():
            self._put(name, trained[name].to(weight.device))

    def copied(self) -> dict[str, Tensor]:
        """The values in host memory, of which there is one copy: the next takes its place."""
        if not self._room:
            self._room = {
                name: torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                for name, value in self.values.items()
            }
        for name, value in self.values.items():
            self._room[name].copy_(value.detach(), non_blocking=True)
        if any(value.is_cuda for value in self.values.values()):
            torch.cuda.synchronize()
        return self._room

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over values that `copied` gave."""
        for name, value in self.values.items():
            value.copy_(values[name])

    def check_zeros(self, what: str) -> int:
        """How many entries of the module's weights were pruned. Raises RuntimeError if any of them is not zero."""
        zeros = 0
        for name, places in self._places.items():
            if places is not None:
                weight = self._weights[name].data
                if weight.count_nonzero() != self._picked(weight, places, weight.dtype).count_nonzero():
                    raise RuntimeError(f"{what}: {name} has weights that are not zero where it was pruned")
                zeros += weight.numel() - places.count
        return zeros
