"""How much the dense model's loss depends on the outputs of its layers: one backward pass over a few windows.

Glossary, for one linear layer y = Wx of the dense model and its cross-entropy L, summed over the windows' tokens t:

    f    (out,)   Σ_t (∂L/∂y_t)², second moments of the gradients by output
    d    (in,)    Σ_t x_t², of the same tokens

With f a change ΔW of the weight raises L by about ½ Σ_i f_i ΔW_i G ΔW_iᵀ / tokens (the Fisher matrix as a product of a
diagonal factor for outputs and the Gram matrix for inputs, as in K-FAC): what layer-wise losses leave out. No gradient
of a weight is made, and blocks visit the device one at a time: a model that can be pruned can be differentiated.

For a matrix of an expert t runs over the expert's own tokens, n of all N. It counts as if it had been handed k =
`BORROWED` tokens more, average ones of its layer's experts, so that one that no token reached in these few windows is
not taken for one that nothing depends on; and d is given for N tokens, so that scores of all layers have one unit:

    f    Σ_t (∂L/∂y_t)² + k f̄            f̄, d̄  means over the tokens of all experts of the layer
    d    (Σ_t x_t² + k d̄) N / (n + k)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.checks import one_of, require
from ..base.errors import UserError
from ..base.progress import Progress
from ..base.resources import check_fields
from ..model.blocks import BlockModel, hidden_of
from ..model.experts import Routed
from ..model.layers import ExpertLayer, Layer
from ..model.structure import block_layers, blocks_of
from .ladder import naming_the_step

# Scores are counted in bins of a hundredth of a power of e, from e⁻²⁰⁰ to e²⁰⁰.
_BINS, _LOWEST, _STEP = 40_000, -200.0, 0.01
# k, tokens that an expert borrows; docs/decisions.md has the measurement.
BORROWED = 0.1


@dataclass(frozen=True)
class SensitivityChoice:
    """Whether the dense model's gradients weigh outputs against each other.

    Attributes:
        name: "none" or "outputs".
        windows: calibration windows for the backward pass, the first ones.
        rows: β; rows are scaled by (f / mean f)^(β/2) before solvers whose scores compete over rows; 0 leaves them be.
    """

    name: str = "none"
    windows: int = 8
    rows: float = 0.5

    def __post_init__(self) -> None:
        one_of("sensitivity", self.name, ("none", "outputs"))
        require("sensitivity.windows", self.windows, int, 1, float("inf"))
        require("sensitivity.rows", self.rows, float, 0, 4)

    @property
    def used(self) -> bool:
        """Whether there is a backward pass."""
        return self.name != "none"


def build_sensitivity(node: Mapping) -> SensitivityChoice:
    """The choice that a composed `sensitivity` node describes.

    Raises:
        UserError: an unknown field, or a value that is not allowed.
    """
    fields = {str(key): value for key, value in node.items() if not str(key).startswith("_")}
    check_fields(SensitivityChoice, fields, f"sensitivity {node.get('name')}")
    return SensitivityChoice(**fields)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What passes over the dense model tell of every layer, by name, in host memory.

    Attributes:
        outputs: (out,) f; empty without a backward pass.
        inputs: (in,) d.
        scores: how many weights have a score f_i W_ij² d_j (or W_ij² d_j) in each of the bins, from low to high, as
            `counts` reads it: how many are zero, then the first bin that is not empty, and the counts from there on.
        exponents: () power-law exponent of the weight's spectrum.
        tokens: number of tokens.
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    exponents: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def rows(self, name: str, power: float) -> Tensor:
        """(out,) factors (f_i / mean f)^(power/2) that weigh a layer's rows against each other; 1 where f says nothing.

        Rows on which the loss hardly depends keep a thousandth of the mean's weight, since f is an estimate.
        """
        f = self.outputs[name].double()
        mean = f.mean()
        if not bool(mean > 0):
            return torch.ones_like(f, dtype=torch.float32)
        return (f / mean).clamp_min(1e-6).pow(power / 2).float()

    def counts(self, name: str) -> Tensor:
        """(bins,) how many of a layer's weights have their score in each; zeros are in the first."""
        zeros, first, *_ = self.scores[name][:2].tolist()
        found = torch.zeros(_BINS, dtype=torch.int64)
        own = self.scores[name][2:]
        found[first : first + len(own)] = own.long()
        found[0] += zeros
        return found

    def outliers(self, names: Sequence[str], times: float) -> float:
        """Share of the weights of some layers whose |W_ij| √d_j is beyond so many times the mean of all of them."""
        counts = sum(self.counts(name) for name in names).double()
        values = _centres(0.5)
        mean = (counts * values).sum() / counts.sum()
        return float(counts[values > times * mean].sum() / counts.sum())

    def relative(self, name: str) -> Tensor:
        """(bins,) the layer's counts by its scores over their sum, a score's share in the layer."""
        counts = self.counts(name)
        total = float((counts.double() * _centres()).sum())
        shift = round(math.log(total) / _STEP) if total > 0 else 0
        places = (torch.arange(_BINS) - shift).clamp(0, _BINS - 1)
        return torch.zeros_like(counts).index_add_(0, places, counts)


def lost(counts: Tensor, removed: Sequence[float]) -> list[float]:
    """Sums of the lowest scores of a layer, for each of some numbers of weights.

    Args:
        counts: (bins,) as of `Sensitivity.counts` or `Sensitivity.relative`.
        removed: numbers of weights, at most all.
    """
    values = _centres()
    values[0] = 0  # zeros are there
    numbers, sums = counts.double().cumsum(0), (counts * values).cumsum(0)
    wanted = torch.tensor(removed, dtype=torch.float64)
    places = torch.searchsorted(numbers, wanted).clamp_max(_BINS - 1)
    return (sums[places] - (numbers[places] - wanted) * values[places]).tolist()


@torch.no_grad()
def measure_sensitivity(
    model: BlockModel,
    tokens: Tensor,
    names: Mapping[str, object],
    excluded: Callable[[str], bool],
    gradients: bool = True,
    by_outputs: bool | None = None,
    quiet: bool = False,
) -> Sensitivity:
    """Run the dense model forwards and backwards, window by window in each block.

    Args:
        model: the model, not pruned yet.
        tokens: (windows, seqlen).
        names: of the layers to measure.
        excluded: the layers that the user leaves dense, for which nothing is refused.
        gradients: with a backward pass.
        by_outputs: f takes part in the scores; by default where it is known.
        quiet: no progress.

    Raises:
        UserError: gradients that are not finite, or too little device memory for one window.
    """
    by_outputs = gradients if by_outputs is None else by_outputs
    windows, first = list(tokens.split(1)), min(blocks_of(names, model.prefix))
    with _without_weight_gradients(model.model), naming_the_step("the backward pass (sensitivity)"):
        hidden = [[model.embed(window).to("cpu", copy=True) for window in windows]]
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        for index in Progress(range(len(model)), "sensitivity, forwards", quiet=quiet):
            with model.block(index, changing=False) as block:
                layers = _layers(model, index, block, names, excluded)
                with _summing(layers, inputs, tokens.numel()):
                    hidden.append([model.forward_block(index, block, h.to(model.device)).cpu() for h in hidden[-1]])
                if uncalled := [name for name in layers if name not in inputs]:
                    raise UserError(
                        f"{uncalled[0]} received no calibration tokens: the model takes its weight without calling it; "
                        f"leave it dense (layers.exclude=['*.{uncalled[0].rpartition('.')[2]}'])"
                    )
                if not gradients:
                    hidden.pop(0)
                if not by_outputs:
                    for name, layer in layers.items():
                        ones = torch.ones(layer.shape[0], dtype=torch.float64, device=model.device)
                        scores[name] = _count(layer.weight, ones, inputs[name])
        ends = zip(windows, hidden.pop(), strict=True) if gradients else ()
        behind = [_from_loss(model, window, h) for window, h in ends]
        backwards = range(len(model) - 1, first - 1, -1) if gradients else ()
        for index in Progress(backwards, "sensitivity, backwards", quiet=quiet):
            with model.block(index, changing=False, ahead=False) as block:
                layers = _layers(model, index, block, names, excluded)
                with _squaring(layers, outputs):
                    pairs = zip(hidden.pop(), behind, strict=True)
                    behind = [_backwards(model, index, block, h, gradient) for h, gradient in pairs]
                for name, layer in layers.items():
                    if not bool(torch.isfinite(outputs[name]).all()):
                        raise UserError(
                            f"{name}: the loss has NaN or infinite gradients there: use dtype=float32 or bfloat16, or "
                            "sensitivity=none"
                        )
                    if by_outputs:
                        scores[name] = _count(layer.weight, outputs[name], inputs[name])
    on_host = [{name: value.cpu() for name, value in found.items()} for found in (outputs, inputs, scores)]
    return Sensitivity(*on_host, tokens=tokens.numel())


@torch.no_grad()
def measure_spectra(
    model: BlockModel,
    names: Mapping[str, object],
    excluded: Callable[[str], bool],
    tail: float,
    quiet: bool = False,
) -> Sensitivity:
    """The exponents of the layers' spectra (`spectral_exponent`); no text is needed.

    Args:
        model: the model, not pruned yet.
        names, excluded, quiet: as in `measure_sensitivity`.
        tail: share of the eigenvalues that makes the tail.
    """
    exponents = {}
    with naming_the_step("the spectra of the weights (allocation)"):
        for index in Progress(blocks_of(names, model.prefix), "spectra", quiet=quiet):
            with model.block(index, changing=False) as block:
                for name, layer in _layers(model, index, block, names, excluded).items():
                    exponents[name] = torch.tensor(spectral_exponent(layer.weight, tail, name), dtype=torch.float64)
    return Sensitivity(exponents=exponents)


def spectral_exponent(weight: Tensor, tail: float, name: str = "the layer") -> float:
    """Hill's estimate of α in p(λ) ~ λ^-α for the largest eigenvalues λ_1 ≥ λ_2 ≥ … of WᵀW:

        α = 1 + k / Σ_{i ≤ k} ln(λ_i / λ_{k+1}),    k = ⌊tail · number of λ above rounding⌋

    Args:
        weight: (out, in).
        tail: share of the eigenvalues that are used.
        name: the layer's, for the message.

    Raises:
        UserError: the eigenvalues are all alike, or a single one is not zero.
    """
    w = weight.double()
    eigenvalues = torch.linalg.eigvalsh(w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w).flip(0)
    eigenvalues = eigenvalues[eigenvalues > eigenvalues[0] * len(eigenvalues) * torch.finfo(torch.float64).eps]
    count = min(max(1, int(tail * len(eigenvalues))), len(eigenvalues) - 1)
    spread = float((eigenvalues[:count] / eigenvalues[count]).log().sum()) if count > 0 else 0.0
    if not spread > 0:
        raise UserError(
            f"{name}: the spectrum of the weight has no tail, so that allocation=spectral says nothing of it: leave it "
            "out (layers.exclude), or give another allocation"
        )
    return 1 + count / spread


def _layers(model: BlockModel, index: int, block: nn.Module, names, excluded) -> dict[str, Layer]:
    layers = block_layers(block, model.name(index), excluded)
    return {name: layer for name, layer in layers.items() if name in names}


def _from_loss(model: BlockModel, window: Tensor, hidden: Tensor) -> Tensor:
    """∂L/∂h of the hidden states behind the last block."""
    with torch.enable_grad():
        h = hidden.to(model.device).requires_grad_()
        with model.stubs(lambda index, passed, args, kwargs: h if index == 0 else passed):
            logits = model.forward(window)
        targets = window[:, 1:].reshape(-1).to(logits.device)
        loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="sum")
        return torch.autograd.grad(loss, h)[0]


def _backwards(model: BlockModel, index: int, block: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    """∂L/∂h before a block, from that behind it; hooks see the gradients between."""
    with torch.enable_grad():
        h = hidden.to(model.device).requires_grad_()
        call = model.call(index, h)
        output = hidden_of(block(h, *call.args, **call.kwargs))
        return torch.autograd.grad(output, h, gradient.to(output.dtype))[0]


@contextmanager
def _summing(layers: Mapping[str, Layer], sums: dict[str, Tensor], tokens: int):
    """Add the squares of the layers' inputs while the block runs.

    Args:
        layers: by name.
        sums: by name, which this fills.
        tokens: N, of all windows.
    """

    def hook_of(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            square = _squares(args[0] if args else kwargs["input"])
            sums[name] = sums[name] + square if name in sums else square

        return hook

    def hook_of_experts(mixture: _Mixture) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for part in mixture.experts.routed(mixture.experts.arguments(args, kwargs)):
                read, inner = _squares(part.inputs), _squares(mixture.experts.inner(part.expert, part.inputs))
                kinds = mixture.experts.projections
                mixture.add(part, {kind: inner if kind == "down_proj" else read for kind in kinds})

        return hook

    plain, mixtures = _apart(layers)
    handles = [layer.module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in plain.items()]
    handles += [m.register_forward_pre_hook(hook_of_experts(own), with_kwargs=True) for m, own in mixtures.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for mixture in mixtures.values():
        for name, (value, handed) in mixture.borrowing().items():
            if name in layers:
                sums[name] = value * (tokens / handed)


@contextmanager
def _squaring(layers: Mapping[str, Layer], sums: dict[str, Tensor]):
    """Add the squares of the gradients of the layers' outputs while the block runs backwards."""
    plain, mixtures = _apart(layers)
    for name, layer in plain.items():
        sums[name] = torch.zeros(layer.shape[0], dtype=torch.float64, device=layer.weight.device)

    def hook_of(name: str) -> Callable:
        def seen(gradient: Tensor) -> None:
            sums[name] += _squares(gradient)

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(seen)

        return hook

    def hook_of_experts(mixture: _Mixture) -> Callable:
        experts = mixture.experts

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            arguments = experts.arguments(args, kwargs)

            def seen(gradient: Tensor) -> None:
                for part in experts.routed(arguments):
                    found = experts.gradients(part, arguments, gradient)
                    mixture.add(part, {kind: _squares(g) for kind, g in found.items()})

            if output.requires_grad:
                output.register_hook(seen)

        return hook

    handles = [layer.module.register_forward_hook(hook_of(name)) for name, layer in plain.items()]
    handles += [m.register_forward_hook(hook_of_experts(own), with_kwargs=True) for m, own in mixtures.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for mixture in mixtures.values():
        sums.update({name: value for name, (value, _) in mixture.borrowing().items() if name in layers})


class _Mixture:
    """Sums over tokens, of all experts of a module, whichever of them are asked for."""

    def __init__(self, layer: ExpertLayer) -> None:
        self.experts = layer.experts
        self._owner = layer.name.removesuffix(f".{layer.expert}.{layer.projection}")
        self._tokens = dict.fromkeys(range(self.experts.count), 0)
        self._sums: dict[str, dict[int, Tensor]] = {kind: {} for kind in self.experts.projections}

    def add(self, part: Routed, squares: Mapping[str, Tensor]) -> None:
        """Account for an expert's tokens: the sums over them by projection."""
        self._tokens[part.expert] += len(part.tokens)
        for kind, value in squares.items():
            own = self._sums[kind]
            own[part.expert] = own[part.expert] + value if part.expert in own else value

    def borrowing(self) -> dict[str, tuple[Tensor, float]]:
        """Layer name → the sums with those of the borrowed tokens, and the number of both; empty without any tokens."""
        found, every = {}, sum(self._tokens.values())
        for kind, own in self._sums.items():
            more = sum(own.values()) * (BORROWED / every) if own else None
            for expert, count in self._tokens.items() if own else ():
                value = own[expert] + more if expert in own else more.clone()
                found[f"{self._owner}.{expert}.{kind}"] = value, count + BORROWED
        return found


def _apart(layers: Mapping[str, Layer]) -> tuple[dict[str, Layer], dict[nn.Module, _Mixture]]:
    """The linear layers among some by name, and the experts' by their module."""
    mixtures: dict[nn.Module, _Mixture] = {}
    for layer in layers.values():
        if isinstance(layer, ExpertLayer) and layer.module not in mixtures:
            mixtures[layer.module] = _Mixture(layer)
    return {name: layer for name, layer in layers.items() if not isinstance(layer, ExpertLayer)}, mixtures


def _squares(value: Tensor) -> Tensor:
    """(width,) sums over tokens."""
    return value.detach().float().square().reshape(-1, value.shape[-1]).sum(0, dtype=torch.float64)


@contextmanager
def _without_weight_gradients(model: nn.Module):
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _centres(power: float = 1.0) -> Tensor:
    """(bins,) the score in the middle of each bin, to a power."""
    return torch.exp((_LOWEST + _STEP * (torch.arange(_BINS, dtype=torch.float64) + 0.5)) * power)


def _count(weight: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """How many weights have their score in each bin, as `Sensitivity.scores` has it."""
    # In logarithms: a product of three such numbers does not fit float32.
    score = weight.float().abs().log().mul_(2).add_(inputs.log().float()).add_(outputs.log().float()[:, None])
    bins = score.sub_(_LOWEST).div_(_STEP).nan_to_num_(neginf=0.0).clamp_(0, _BINS - 1).to(torch.int64)
    counts = torch.bincount(bins.flatten(), minlength=_BINS).cpu()
    zeros, counts[0] = counts[0].clone(), 0
    there = counts.nonzero()
    first, last = (int(there[0]), int(there[-1])) if len(there) else (0, 0)
    return torch.cat([torch.stack([zeros, torch.tensor(first)]), counts[first : last + 1]]).int()
