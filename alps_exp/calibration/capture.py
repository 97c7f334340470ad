"""Statistics of linear layers' inputs, accumulated in float32 by hooks while the block runs.

Layers that are fed the same tensor (q/k/v, gate/up) share one accumulator, and so one Gram matrix. Experts have one for
the tokens that each is handed, and one for what its `down_proj` makes of them; what the experts of a module are handed
together is summed, too (`Accumulator.pool`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import UserError
from ..layer.inputs import Inputs, Statistics
from ..model.experts import Routed
from ..model.layers import ExpertLayer, Layer

# The Gram matrix is summed in stripes that leave out most of what lies below the diagonal. On a CPU four stripes take
# 0.65 of the time of the whole product at 1536 inputs, on an H200 stripes of 1280 take 0.67 at 5120 and 0.48 at 20480.
_CPU_STRIPES = 4
_CUDA_STRIPE = 1280
_ALIGNED = 16  # matrix units are slow on odd sizes
_MIRRORED = 1024  # rows that are mirrored at once: a copy of the whole matrix takes five times as long


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

    Attributes:
        tokens: how many were added.
        sequences: of how many sequences.
        pool: the same sums over all experts of a module, where this is the input of one of them.
    """

    def __init__(self, width: int, needed: Statistics, device: torch.device) -> None:
        self.pool: Accumulator | None = None
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

    def add_uneven(self, x: Tensor, lengths: list[int]) -> None:
        """Account for the rows of `x` (tokens, in), of sequences of these lengths, in order, of which some may be 0."""
        self.tokens += x.shape[0]
        self.sequences += sum(length > 0 for length in lengths)
        if Statistics.GRAM in self.needed:
            self._add_gram(x)
        else:
            self._squares += x.float().square().sum(0)
        if Statistics.MOMENTS in self.needed:
            for own in x.float().split(lengths):
                if len(own):
                    self._sum += own.sum(0, dtype=torch.float64)
                    self._variances += (own - own.mean(0)).square_().mean(0).double()

    def add_sums(self, other: Accumulator) -> None:
        """Account for all that another one of the same width was given."""
        self.tokens += other.tokens
        self.sequences += other.sequences
        for own, value in zip(self.tensors(), other.tensors(), strict=False):  # not what a target wants of the other
            own += value

    def correct(self, wanted: Tensor, inputs: Tensor) -> None:
        """Account for what a target wants beyond the dense weight's output.

        Args:
            wanted: (…, out) by token.
            inputs: (…, in) of the same tokens, which `add` was given too.
        """
        r, x = wanted.reshape(-1, wanted.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        self.expect(r.shape[1])
        _add_products(self._correction, r, x)

    def expect(self, rows: int) -> None:
        """There will be something to `correct`: (…, rows)."""
        if self._correction is None:
            self._correction = torch.zeros(rows, len(self._sum), dtype=torch.float32, device=self._sum.device)

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
            fields["mean"] = (self._sum / max(self.tokens, 1)).float()
            fields["var"] = (self._variances / max(self.sequences, 1)).float()
        if Statistics.DIAGONAL in self.needed:
            fields["gram" if Statistics.GRAM in self.needed else "diagonal"] = self._squares
        if Statistics.GRAM in self.needed:
            _mirror(self._squares)  # only the part on and above the diagonal stripes was summed
        return Inputs(**fields)


def _mirror(matrix: Tensor) -> None:
    """Make a matrix symmetric, in place, from what lies on and above its diagonal."""
    for begin in range(0, len(matrix), _MIRRORED):
        end = begin + _MIRRORED
        upper = matrix[begin:end, begin:end].triu()
        matrix[begin:end, begin:end] = upper + upper.triu(1).T
        matrix[end:, begin:end] = matrix[begin:end, end:].T


def _counting(part: Routed) -> Tensor:
    """(n,) the squares of the weights of an expert's tokens, to a factor that a token's experts share."""
    return (part.inputs.norm(dim=-1) if part.weights is None else part.weights).float().square()


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

    Which layers share an input is seen in the first forward: those that receive the very same tensor. Experts are
    hooked together, at the module that holds them.

    Args:
        layers: by name.
        needed: which statistics to collect.
        weighting: how a token counts in the sums of an expert, "none" or "squared".
        together: `layers` and those that other collectors see, where a block is gone through several times.

    Attributes:
        resting: nothing is collected meanwhile.
    """

    def __init__(
        self,
        layers: dict[str, Layer],
        needed: Statistics,
        weighting: str = "none",
        together: Mapping[str, Layer] | None = None,
    ) -> None:
        self.resting = False
        self._layers = layers
        self._needed = needed
        self._leader: dict[str, str] = {}
        self._accumulators: dict[str, Accumulator] = {}
        self._seen: dict[str, Tensor] = {}
        self._shape: tuple[int, int] = (0, 0)
        self._left: set[str] = set()
        self._ending = False
        self._mixtures: dict[nn.Module, _Mixture] = {}
        hooks = {}
        for name, layer in layers.items():
            if isinstance(layer, ExpertLayer):
                if layer.module not in self._mixtures:
                    self._mixtures[layer.module] = _Mixture(layer, needed, weighting)
                    hooks[layer.module] = self._expert_hook(self._mixtures[layer.module])
                self._mixtures[layer.module].own.append(layer)
            else:
                hooks[layer.module] = self._hook(name)
        for layer in (layers if together is None else together).values():
            if isinstance(layer, ExpertLayer) and not layer.reads_hidden and layer.module in self._mixtures:
                self._mixtures[layer.module].sharing.add(layer.expert)
        self._handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()]

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
            self._called([name])

        return hook

    def _expert_hook(self, mixture: _Mixture):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.resting:
                return
            if not mixture.sums:
                self._leader |= mixture.begin(args, kwargs)
                self._accumulators |= mixture.sums
            mixture.add(args, kwargs, self._shape)
            self._called([layer.name for layer in mixture.own])

        return hook

    def _called(self, names: list[str]) -> None:
        self._left.difference_update(names)
        if not self._left and self._ending:
            raise Enough

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
        self._left, self._ending = set(self._layers), ending
        self._seen.clear()

    @property
    def full(self) -> bool:
        """Whether all layers have received theirs in this forward."""
        return not self._left

    @property
    def names(self) -> list[str]:
        """Of the layers."""
        return list(self._layers)

    def order(self) -> list[list[str]]:
        """The groups of layers that are fed together, in the order in which they were called; without those that were
        not. They share an input, but for experts: all that read what their module is handed, and all others."""
        groups: dict[object, list[str]] = {}
        for name, leader in self._leader.items():
            layer = self._layers[name]
            together = (layer.module, layer.reads_hidden) if isinstance(layer, ExpertLayer) else leader
            groups.setdefault(together, []).append(name)
        place = {name: number for number, name in enumerate(self._layers)}
        return [sorted(names, key=place.__getitem__) for names in groups.values()]

    def correct_experts(self, module: nn.Module, args: tuple, kwargs: dict, wanted: Tensor) -> None:
        """Account for what a target wants of a module of experts beyond what it gives.

        Args:
            module: it.
            args, kwargs: of a call that was collected.
            wanted: (tokens, out).
        """
        self._mixtures[module].correct(args, kwargs, wanted)

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
        for name in self._layers:
            if name not in self._leader:
                raise UserError(
                    f"{name} received no calibration tokens: the model takes its weight without calling it, or sends "
                    f"none there; leave it dense (layers.exclude=['*.{name.rpartition('.')[2]}']), or use more windows "
                    "(nsamples)"
                )
            groups.setdefault(self._leader[name], []).append(name)
        for mixture in self._mixtures.values():
            mixture.finish()
        return [(names, self._accumulators[leader]) for leader, names in groups.items()]


class _Mixture:
    """The sums of the experts of one module.

    Args:
        layer: one of their layers.
        needed: which statistics to collect.
        weighting: how a token counts.

    Attributes:
        own: the layers to collect for.
        sharing: the experts whose second layer is pruned, here or in another pass; what a token lacks is divided among
            them.
        sums: by the name of the first layer that each is the input of, once something was handed to the module.
    """

    def __init__(self, layer: ExpertLayer, needed: Statistics, weighting: str) -> None:
        self.own: list[ExpertLayer] = []
        self.sharing: set[int] = set()
        self.sums: dict[str, Accumulator] = {}
        self._experts, self._needed, self._squared = layer.experts, needed, weighting == "squared"
        self._name = layer.name.removesuffix(f".{layer.expert}.{layer.projection}")
        self._by_place: dict[tuple[int, bool], Accumulator] = {}
        self._rest: dict[bool, Accumulator] = {}  # of experts that nothing is collected for, by `reads_hidden`

    def begin(self, args: tuple, kwargs: dict) -> dict[str, str]:
        """Look at the module's first call, and give each layer's name that of the first with the same input.

        Raises:
            UserError: the module does not compute what its matrices do.
        """
        arguments = self._experts.arguments(args, kwargs)
        self._experts.check(arguments, self._name)
        leaders, first = {}, {}
        for layer in self.own:
            place = (layer.expert, layer.reads_hidden)
            if place not in first:
                first[place] = layer.name
                self._by_place[place] = Accumulator(layer.shape[1], self._needed, arguments[0].device)
                self.sums[layer.name] = self._by_place[place]
                self._rest.setdefault(place[1], Accumulator(layer.shape[1], self._needed, arguments[0].device))
            leaders[layer.name] = first[place]
        return leaders

    def add(self, args: tuple, kwargs: dict, shape: tuple[int, int]) -> None:
        """Account for a call of the module within a forward of windows (sequences, length)."""
        arguments = self._experts.arguments(args, kwargs)
        whole = self._experts.count_tokens(arguments) == shape[0] * shape[1]
        for part in self._experts.routed(arguments):
            lengths = self._lengths(part, shape) if whole else [len(part.tokens)]
            for reads_hidden in self._rest:
                sums = self._by_place.get((part.expert, reads_hidden), self._rest[reads_hidden])
                x = part.inputs if reads_hidden else self._experts.inner(part.expert, part.inputs)
                sums.add_uneven(self._weighted(x, part), lengths)

    def _weighted(self, x: Tensor, part: Routed) -> Tensor:
        """(n, …) multiplied by the weights of an expert's tokens, where their squares count."""
        return x * part.weights[:, None].to(x.dtype) if self._squared else x

    @torch.no_grad()
    def correct(self, args: tuple, kwargs: dict, wanted: Tensor) -> None:
        """Divide among a token's experts what is wanted of their sum: to the output of each is added w r / Σ w², with w
        the weight of the expert, the least change of the outputs that gives r. Where inputs are multiplied by the
        weights instead, so that outputs count as they are, w² r / Σ w² is added, with w from the inputs' norms."""
        arguments = self._experts.arguments(args, kwargs)
        parts = [part for part in self._experts.routed(arguments) if part.expert in self.sharing]
        squares = torch.zeros(len(wanted), device=wanted.device)
        for part in parts:
            squares.index_add_(0, part.tokens, _counting(part))
        for (_, reads_hidden), sums in self._by_place.items():
            if not reads_hidden:
                sums.expect(wanted.shape[-1])
        for part in parts:
            if (part.expert, False) not in self._by_place:
                continue
            counted = _counting(part) if part.weights is None else part.weights.float()
            share = counted / squares[part.tokens].clamp(min=torch.finfo(torch.float32).tiny)
            own = (wanted[part.tokens] * share[:, None]).to(wanted.dtype)
            inner = self._experts.inner(part.expert, part.inputs)
            self._by_place[part.expert, False].correct(self._weighted(own, part), self._weighted(inner, part))

    def _lengths(self, part: Routed, shape: tuple[int, int]) -> list[int]:
        if Statistics.MOMENTS not in self._needed and shape[0] == 1:
            return [len(part.tokens)]
        return torch.bincount(part.tokens // shape[1], minlength=shape[0]).tolist()

    def finish(self) -> None:
        """Let each input's sums know those of all experts together."""
        for reads_hidden, pool in self._rest.items():
            for (_, own), sums in self._by_place.items():
                if own == reads_hidden:
                    pool.add_sums(sums)
                    sums.pool = pool
