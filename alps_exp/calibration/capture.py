"""Statistics of linear layers' inputs, accumulated in float32 by hooks while the block runs.

Layers that are fed the same tensor (q/k/v, gate/up) share one accumulator, and so one Gram matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import UserError
from ..layer.inputs import Inputs, Statistics

# The Gram matrix is summed in stripes that leave out most of what lies below the diagonal. On a CPU four stripes take
# 0.65 of the time of the whole product at 1536 inputs, on an H200 stripes of 1280 take 0.67 at 5120 and 0.48 at 20480.
_CPU_STRIPES = 4
_CUDA_STRIPE = 1280
_ALIGNED = 16  # matrix units are slow on odd sizes


class Group(NamedTuple):
    """Layers that share an input, by name, and what is known of it."""

    names: list[str]
    inputs: Inputs


class Accumulator:
    """Sums over tokens of one input.

    Args:
        width: number of inputs.
        needed: which statistics to collect.
        device: where they live.
    """

    def __init__(self, width: int, needed: Statistics, device: torch.device) -> None:
        self.needed = needed
        self.tokens = 0
        self.sequences = 0
        shape = (width, width) if Statistics.GRAM in needed else (width,)
        self._squares = torch.zeros(shape, dtype=torch.float32, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._variances = torch.zeros(width, dtype=torch.float64, device=device)
        self._correction: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Account for `inputs` (sequences, length, in)."""
        sequences, length, width = inputs.shape
        x = inputs.reshape(-1, width)
        self.tokens += x.shape[0]
        self.sequences += sequences
        if Statistics.GRAM in self.needed:
            self._add_gram(x)
        else:
            self._squares += x.float().square().sum(0)
        if Statistics.MOMENTS in self.needed:
            exact = inputs.float()
            means = exact.mean(1, keepdim=True)
            self._sum += means.sum((0, 1), dtype=torch.float64) * length
            # Tensor.var along this axis takes more than twice the time.
            self._variances += (exact - means).square_().mean(1).sum(0, dtype=torch.float64)

    def correct(self, wanted: Tensor, inputs: Tensor) -> None:
        """Account for what a target wants beyond the dense weight's output.

        Args:
            wanted: (…, out) by token.
            inputs: (…, in) of the same tokens, which `add` was given too.
        """
        r, x = wanted.reshape(-1, wanted.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        if self._correction is None:
            self._correction = torch.zeros(r.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        _add_products(self._correction, r, x)

    def tensors(self) -> list[Tensor]:
        """The sums themselves, for adding those of other processes in place."""
        moments = [self._sum, self._variances] if Statistics.MOMENTS in self.needed else []
        correction = [self._correction] if self._correction is not None else []
        return [self._squares, *moments, *correction] if self.needed else []

    def _add_gram(self, x: Tensor) -> None:
        x = x if _is_half(x) else x.float()
        width = x.shape[1]
        stripes = max(width // _CUDA_STRIPE, 1) if x.is_cuda else _CPU_STRIPES
        step = -(-width // (stripes * _ALIGNED)) * _ALIGNED
        for begin in range(0, width, step):
            end = begin + step
            _add_products(self._squares[begin:end, begin:], x[:, begin:end], x[:, begin:])

    def inputs(self, name: str) -> Inputs:
        """What these sums tell of the input of the layer `name`, and of those that share it. The Gram matrix is not
        copied: nothing can be added any more."""
        fields = {"tokens": self.tokens, "sequences": self.sequences, "name": name, "correction": self._correction}
        if Statistics.MOMENTS in self.needed:
            fields["mean"] = (self._sum / self.tokens).float()
            fields["var"] = (self._variances / self.sequences).float()
        if Statistics.DIAGONAL in self.needed:
            fields["gram" if Statistics.GRAM in self.needed else "diagonal"] = self._squares
        if Statistics.GRAM in self.needed:
            # Only the part on and above the diagonal stripes was summed.
            upper = self._squares.triu()
            self._squares.copy_(upper).add_(upper.triu(1).T)
        return Inputs(**fields)


def _is_half(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _add_products(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right, the sum over tokens, to `sums` in float32.

    On CUDA factors in half precision are multiplied as they are: their products are exact in float32, so with sums in
    float32 this equals the float32 product of the upcast factors but for the order of summation, at the matrix units'
    rate.
    """
    if _is_half(left) and left.dtype == right.dtype:
        torch.addmm(sums, left.T, right, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(left.float().T, right.float())


class Enough(Exception):
    """Ends a forward once all that is wanted of it is known."""


class Collector:
    """Hooks on a block's linear layers that feed one accumulator per distinct input.

    Which layers share an input is seen in the first forward: those that receive the very same tensor.

    Args:
        linears: layers by name.
        needed: which statistics to collect.

    Attributes:
        resting: nothing is collected meanwhile.
    """

    def __init__(self, linears: dict[str, nn.Module], needed: Statistics) -> None:
        self.resting = False
        self._linears = linears
        self._needed = needed
        self._leader: dict[str, str] = {}
        self._accumulators: dict[str, Accumulator] = {}
        self._seen: dict[str, Tensor] = {}
        self._shape: tuple[int, int] = (0, 0)
        self._left: set[str] = set()
        self._ending = False
        self._handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, module in linears.items()
        ]

    def _hook(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.resting:
                return
            inputs = args[0] if args else kwargs["input"]
            if name not in self._leader:
                same = [other for other, tensor in self._seen.items() if tensor is inputs]
                self._leader[name] = same[0] if same else name
                self._seen[name] = inputs
            if self._leader[name] == name:
                if name not in self._accumulators:
                    self._accumulators[name] = Accumulator(inputs.shape[-1], self._needed, inputs.device)
                self._accumulators[name].add(self._by_sequence(inputs))
            self._left.discard(name)
            if not self._left and self._ending:
                raise Enough

        return hook

    def _by_sequence(self, inputs: Tensor) -> Tensor:
        """(sequences, length, in), also where the model flattened its tokens before the layer."""
        if inputs.ndim == 2 and inputs.shape[0] == self._shape[0] * self._shape[1]:
            return inputs.reshape(*self._shape, -1)
        return inputs if inputs.ndim == 3 else inputs.reshape(1, -1, inputs.shape[-1])

    def begin(self, hidden: Tensor, ending: bool = False) -> None:
        """Announce a forward on `hidden` (sequences, length, width).

        Args:
            hidden: the block's input.
            ending: end the forward by `Enough` once all layers have received theirs.
        """
        self._shape = (hidden.shape[0], hidden.shape[1])
        self._left, self._ending = set(self._linears), ending
        self._seen.clear()

    @property
    def names(self) -> list[str]:
        """Of the layers."""
        return list(self._linears)

    def order(self) -> list[list[str]]:
        """The groups of layers that share an input, in the order in which they were called; without those that were
        not."""
        leaders = dict.fromkeys(self._leader.values())
        return [[name for name in self._linears if self._leader.get(name) == leader] for leader in leaders]

    def of(self, name: str) -> Accumulator:
        """The sums of the input of a layer that was called."""
        return self._accumulators[self._leader[name]]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def finish(self) -> list[tuple[list[str], Accumulator]]:
        """Remove the hooks and return the groups of layers that share an input, with its statistics.

        Raises:
            UserError: a layer was never called.
        """
        self.remove()
        groups: dict[str, list[str]] = {}
        for name in self._linears:
            if name not in self._leader:
                raise UserError(
                    f"{name} received no calibration tokens: the model takes its weight without calling it, or sends "
                    f"none there; leave it dense (layers.exclude=['*.{name.rpartition('.')[2]}']), or use more windows "
                    "(nsamples)"
                )
            groups.setdefault(self._leader[name], []).append(name)
        return [(names, self._accumulators[leader]) for leader, names in groups.items()]
