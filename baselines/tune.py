"""Fine-tuning of a pruned model under its mask: the weights follow the cross-entropy of text, and zeros stay zeros.

The model is the pruned checkpoint itself. Every weight matrix of it that has zeros is masked, whatever is pruned by the
run's choice of layers, and vectors (norms, biases) are not. What is trained is either the kept weights, and all else
beside them, or LoRA adapters of the pruned layers: with the mask M, the rank r and the scale α / r, a layer computes

    W + M ⊙ (α / r) B A

in training as well as in the end, when that becomes its weight, so that nothing is lost by merging.

The sparsity of the run says what the checkpoint is expected to have, as in `given`. Held-out windows (data.holdout)
choose among the weights, where there are such; otherwise the last ones are kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from alps_exp.base.checks import require
from alps_exp.base.errors import UserError
from alps_exp.model.blocks import BlockModel
from alps_exp.model.layers import Layer, find_layer
from alps_exp.patterns import Pattern, Unstructured
from alps_exp.procedure.trained import TrainingMethod, accounted
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.rows import PruneResult
from alps_exp.pruning.tools import Tools
from alps_exp.training.whole import on_device

_ADAPTER = "default"


@dataclass(frozen=True)
class Tune(TrainingMethod):
    """Fine-tuning under the mask, with hyperparameters beside those of every training.

    Attributes:
        lora: rank of the adapters; None: all weights are trained.
        alpha: α of the adapters.
        targets: globs on the names of the layers that adapters are for.
        tolerance: how far from the sparsity the share of zeros may be.
    """

    selection: ClassVar[str] = "mask"
    label: ClassVar[str] = "fine-tuning"

    steps: int = 1000
    rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    lora: int | None = None
    alpha: float = 32.0
    targets: Sequence[str] = ("*",)
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require("method.tolerance", self.tolerance, float, 0, 1)
        require("method.alpha", self.alpha, float, 0, 1e6, open_low=True)
        if isinstance(self.targets, str) or not self.targets or not all(isinstance(glob, str) for glob in self.targets):
            raise UserError(f'method.targets={self.targets} is not allowed: give a list of globs, as in ["*_proj"]')
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.lora is not None:
            require("method.lora", self.lora, int, 1, float("inf"))
            if self.others:
                raise UserError("method.lora trains adapters and nothing else: give method.others=false, or lora=null")

    def for_layers(self, patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]]) -> TrainingMethod:
        if self.lora is not None:
            _peft()
            self._targets(patterns)
        return super().for_layers(patterns, shapes)

    def _targets(self, names: Mapping) -> list[str]:
        found = [name for name in names if any(fnmatchcase(name, glob) for glob in self.targets)]
        if not found:
            raise UserError(
                f"method.targets={list(self.targets)} matches no layer that is pruned: give globs such as "
                f"{next(iter(names), 'model.layers.0.self_attn.q_proj')!r}"
            )
        return found

    @property
    def whole(self) -> bool:
        return self.lora is None

    def misfit_of_experts(self, names: Collection[str]) -> str | None:
        wanted = self.lora is not None and any(fnmatchcase(name, glob) for name in names for glob in self.targets)
        return "adapters are for linear layers (method.targets)" if wanted else None

    def state_bytes(self, network: nn.Module, patterns: Mapping[str, Pattern], itemsize: int) -> float:
        shapes = {name: find_layer(network, name).shape for name in patterns}
        if self.lora is not None:
            adapters = self.lora * sum(sum(shapes[name]) for name in self._targets(patterns))
            return adapters * (12 + self.moment_bytes()) + 3 * itemsize * max(map(math.prod, shapes.values()))
        kept = sum((1 - patterns[name].sparsity) * math.prod(shape) for name, shape in shapes.items())
        every = sum(parameter.numel() for parameter in network.parameters())
        others = (every - sum(map(math.prod, shapes.values()))) * self.others
        found = kept * (12 + self.moment_bytes()) + others * ((4 if itemsize < 4 else 0) + 4 + self.moment_bytes())
        return found + itemsize * max(map(math.prod, shapes.values()))

    def run(self, model: BlockModel, job: PruneJob, tools: Tools) -> PruneResult:
        self.check(model, job, tools)
        masks = {name: p != 0 for name, p in model.model.named_parameters() if p.ndim > 1}
        masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}
        layers = {name: find_layer(model.model, name) for name in job.patterns}
        before = self._checked(layers, job.patterns)
        with on_device(model, f"method={self.label}"):
            if self.lora is None:
                names = [name for name, _ in model.model.named_parameters()]
                pruned = {layer.stored for layer in layers.values()}
                trained = {name: masks.get(name) for name in names if self.others or name in pruned}
                done = self.fit(model, job, tools, trained, held_out=True)
            else:
                with adapted(model.model, self._targets(layers), self.lora, self.alpha) as trained:
                    done = self.fit(model, job, tools, dict.fromkeys(trained), held_out=True)
            for name, mask in masks.items():
                weight = model.model.get_parameter(name)
                if bool(weight.masked_select(~mask.to(weight.device)).any()):
                    raise RuntimeError(f"{name} has weights that are not zero where it was pruned")
            result = accounted(model, job, self, done, {name: {"sparsity_before": before[name]} for name in layers})
        sizes = [math.prod(row.shape) for row in result.layers]
        done["sparsity_before"] = _mean(before.values(), sizes)
        done["sparsity_after"] = _mean([row.sparsity for row in result.layers], sizes)
        if done["sparsity_after"] != done["sparsity_before"]:
            more = done["sparsity_after"] - done["sparsity_before"]
            result.notes.append(f"{more:.3g} of the weights have become zero in the model's dtype beside the mask's")
        return result

    def _checked(self, layers: Mapping[str, Layer], patterns: Mapping[str, Pattern]) -> dict[str, float]:
        """The share of zeros of each layer.

        Raises:
            UserError: the checkpoint is not pruned, or otherwise than the run's sparsity says; an adapter for a layer
                that is not.
        """
        found = {name: 1 - int(layer.weight.count_nonzero()) / layer.weight.numel() for name, layer in layers.items()}
        sizes = [layer.weight.numel() for layer in layers.values()]
        mean = _mean(found.values(), sizes)
        if mean == 0:
            raise UserError(
                "fine-tuning keeps zeros where they are, and the checkpoint has none in the layers of this run: give "
                "the model.path of a pruned one"
            )
        for name, pattern in patterns.items():
            if not isinstance(pattern, Unstructured) and not pattern.holds(layers[name].weight != 0):
                raise UserError(f"{name} is not {pattern}: give its sparsity, {found[name]:.2g}, or its own pattern")
        loose = [name for name, pattern in patterns.items() if isinstance(pattern, Unstructured)]
        if loose:
            sizes = [layers[name].weight.numel() for name in loose]
            mean, asked = (
                _mean(shares, sizes)
                for shares in ([found[name] for name in loose], [patterns[name].sparsity for name in loose])
            )
            if abs(mean - asked) > self.tolerance:
                raise UserError(
                    f"the checkpoint has {mean:.3g} zeros, and sparsity={asked:.3g} was asked for: give "
                    f"sparsity={mean:.2g}"
                )
        for name in self._targets(layers) if self.lora is not None else ():
            if found[name] == 0:
                raise UserError(
                    f"method.targets: {name} has no zeros, and adapters are for layers that are pruned: give other "
                    "globs, or leave it out (layers.exclude=[...])"
                )
        return found


def _mean(shares, sizes: Sequence[int]) -> float:
    return math.fsum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)


def _peft():
    try:
        import peft
    except ImportError:
        raise UserError("method.lora needs peft, which cannot be imported: pip install --no-deps peft") from None
    return peft


@contextmanager
def adapted(network: nn.Module, names: Sequence[str], rank: int, alpha: float) -> Iterator[list[str]]:
    """Layers with adapters, whose weights these become at the end; of an error nothing but the layers as they were.

    Args:
        network: the model, in which the layers are replaced meanwhile.
        names: of the layers.
        rank, alpha: of the adapters.

    Yields:
        The names of the adapters' weights in the network.
    """
    peft = _peft()
    layers, known = {name: network.get_submodule(name) for name in names}, set(vars(network))
    with torch.random.fork_rng():  # where adapters start does not depend on what was drawn before
        torch.manual_seed(0)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names), lora_dropout=0.0)
        peft.inject_adapter_in_model(config, network)
    try:
        found = {name: network.get_submodule(name) for name in names}
        for adapter in found.values():
            adapter.forward = _masked(adapter)
        yield [f"{name}.lora_{part}.{_ADAPTER}.weight" for name in names for part in "AB"]
        with torch.no_grad():
            for name, adapter in found.items():
                layers[name].weight.copy_(merged(adapter))
    finally:
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, layer)
        for name in set(vars(network)) - known:  # peft notes there that it was here
            delattr(network, name)


def merged(adapter: nn.Module) -> Tensor:
    """W + M ⊙ (α / r) B A, in the base layer's shape."""
    weight = adapter.base_layer.weight
    return torch.where(weight != 0, weight + adapter.get_delta_weight(_ADAPTER), 0.0).to(weight.dtype)


def _masked(adapter: nn.Module):
    def forward(inputs: Tensor) -> Tensor:
        return torch.func.functional_call(adapter.base_layer, {"weight": merged(adapter)}, (inputs,))

    return forward
