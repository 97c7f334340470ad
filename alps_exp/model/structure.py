"""Where a model's decoder blocks are, and the linear layers in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base.errors import UserError
from .experts import Experts, is_router
from .layers import Layer, expert_layers


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's list of decoder blocks and its dotted name.

    Of the lists of blocks (`block_lists`) it is the largest that belongs to the text model, whose configuration tells
    it from a vision or audio tower's.

    Raises:
        UserError: there is none that contains linear layers, its blocks are wrapped, or the model carries adapters.
    """
    _refuse_adapters(model)
    text = _text_config(model)
    found = block_lists(model)
    if not found:
        raise UserError(
            f"{type(model).__name__} has no decoder blocks (no ModuleList of equal modules with linear layers): "
            "give a decoder-only language model that AutoModelForCausalLM loads"
        )
    prefix, blocks = max(found.items(), key=lambda item: (_belongs(model, item[0], text), count(item[1].parameters())))
    if any("_orig_mod" in block._modules for block in blocks):
        raise UserError(
            f"the blocks of {prefix} are wrapped by torch.compile, which hides their forwards: compile them after "
            "pruning, or in place (block.compile())"
        )
    return prefix, blocks


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """All `ModuleList`s with linear layers by name, of like modules or of as many as the text model has layers."""
    layers = getattr(_text_config(model), "num_hidden_layers", None)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and (len({type(block) for block in module}) == 1 or len(module) == layers)
        and any(is_linear(layer) for layer in module.modules())
    }


def count(parameters: Iterable[Tensor]) -> int:
    """How many weights these parameters have together."""
    return sum(parameter.numel() for parameter in parameters)


def _text_config(model: nn.Module):
    config = getattr(model, "config", None)
    with suppress(AttributeError, ValueError):  # no configuration of transformers, or one of several text models
        return config.get_text_config(decoder=True)
    return config


def _belongs(model: nn.Module, name: str, text) -> bool:
    """Whether the model around a list of blocks has the text model's configuration."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return type(config) is type(text)
    return True


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UserError(
                f"{name or 'the model'} is an adapter of peft ({type(module).__name__}), whose matrices are no layers "
                "to prune: merge it first (model = model.merge_and_unload()), or save the merged model and give that"
            )


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer in one of the two layouts that transformers uses."""
    return isinstance(module, (nn.Linear, Conv1D))


def block_layers(
    block: nn.Module, prefix: str, excluded: Callable[[str], bool] = lambda name: False
) -> dict[str, Layer]:
    """The block's linear layers by full name, those of experts apart; routers are none.

    Args:
        block: a decoder block.
        prefix: its full name.
        excluded: names that the user asked not to prune, for which nothing is refused.

    Raises:
        UserError: the block holds weights that act as linear layers but cannot be pruned as such (fused weights,
            quantised weights, weights made of other parameters).
    """
    layers: dict[str, Layer] = {}
    fused = {}
    whole = count(block.parameters())
    holders = _holders(block, prefix)
    apart: set[nn.Module] = set()
    for path, module in block.named_modules():
        name = f"{prefix}.{path}" if path else prefix
        if module in apart:
            continue
        if own := expert_layers(name, module):
            layers |= own
            apart.update(module.modules())
            continue
        if is_linear(module):
            if is_router(name, tuple(module.weight.shape), holders):
                continue
            if not module.weight.is_floating_point() and not excluded(name):
                raise UserError(
                    f"{name} holds quantised weights ({module.weight.dtype}): load an unquantised checkpoint, "
                    "or exclude it (layers.exclude=[...])"
                )
            if module._parameters.get("weight") is None and not excluded(name):
                raise UserError(
                    f"{name} makes its weight anew from other parameters in every forward, as weight_norm and masks "
                    "of torch.nn.utils.prune do: make it permanent first (remove_parametrizations, prune.remove), or "
                    "exclude it (layers.exclude=[...])"
                )
            layers[name] = Layer(name, module)
            continue
        for own, parameter in (*module.named_parameters(recurse=False), *_kept_buffers(module)):
            if is_router(name, tuple(parameter.shape), holders):
                continue
            if _is_large(parameter, whole) and not excluded(f"{name}.{own}") and not excluded(name):
                fused[f"{name}.{own}"] = parameter
    for name, parameter in fused.items():
        globs = ",".join(dict.fromkeys(f"'*{'.'.join(other.rsplit('.', 2)[1:])}'" for other in fused))
        raise UserError(
            f"{name} is a fused weight of shape {tuple(parameter.shape)}, not a linear layer, and cannot be pruned: "
            f"leave such weights, {count(fused.values()) / whole:.0%} of the block's, dense by layers.exclude=[{globs}]"
        )
    return layers


def _holders(block: nn.Module, prefix: str) -> dict[str, int]:
    """Names of the modules that experts are in → how many there are, 0 where their layout does not tell."""
    found = {}
    for path, module in block.named_modules():
        if isinstance(experts := getattr(module, "experts", None), nn.Module):
            several = len(experts) if isinstance(experts, nn.ModuleList) else 0
            known = Experts.of(experts)
            found[f"{prefix}.{path}" if path else prefix] = several if known is None else known.count
    return found


def _kept_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are saved with the model, such as packed weights; masks of booleans are none."""
    return [
        (name, buffer)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and buffer.dtype != torch.bool
    ]


def _is_large(parameter: Tensor, whole: int) -> bool:
    """Whether a parameter outside the linear layers must not be passed over in silence.

    Vectors, short convolutions, decay matrices of state-space layers and small tables may; matrices, and stacks of
    them, that hold a hundredth of the block's weights may not.
    """
    size = parameter.numel()
    return size > 16 * max(parameter.shape, default=1) and 100 * size >= whole


def blocks_of(names: Iterable[str], prefix: str) -> list[int]:
    """Indices of the blocks that these layers belong to, in order.

    Args:
        names: of layers.
        prefix: name of the list of blocks.
    """
    return sorted({int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in names})
