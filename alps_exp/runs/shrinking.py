"""A structured model without the channels and heads that left: smaller matrices, and a configuration that says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..base.errors import UserError
from ..checkpoints.checkpoint import assign
from ..model import loading
from ..model.blocks import BlockModel
from ..model.parts import Units, attention
from ..model.structure import find_blocks
from ..patterns import Pattern
from ..pruning.structured import check_units, kept_of

_CHANNELS = ("intermediate_size", "ffn_dim", "n_inner")


def shrunk_config(model: nn.Module, patterns: Mapping[str, Pattern]) -> PreTrainedConfig:
    """The configuration of the model without the units that leave.

    Args:
        model: the model, or its skeleton on the meta device.
        patterns: layer name → pattern, for every layer that is to be pruned.

    Raises:
        UserError: a model whose family cannot say it.
    """
    prefix, blocks = find_blocks(model)
    sizes: dict[str, set] = {"channels": set(), "heads": set()}
    for found in check_units(model, patterns).values():
        left = {units.kind: (units.count, kept_of(units.count, pattern.sparsity)) for units, pattern in found}
        for kind, several in sizes.items():
            several.add(left.get(kind, (None, None)))
    for kind, several in sizes.items():
        if len(several) > 1:
            raise UserError(
                f"save=shrunk needs the same number of {kind} in every block, and they differ: prune all blocks alike, "
                "or give save=true"
            )
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    try:
        _set(text, sizes, blocks[0])
        smaller = loading.skeleton(type(config).from_dict(config.to_dict()))
    except Exception as error:  # a configuration may check itself, and a model what it is built of
        reason = (
            str(error)
            if isinstance(error, UserError)
            else (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        )
        raise UserError(
            f"{type(config).__name__} cannot say what save=shrunk leaves ({reason}): choose another sparsity, exclude "
            'attention (layers.exclude=["*.self_attn.*"]), or give save=true'
        ) from None
    cut = _shapes(model, prefix, patterns)
    own = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
    if wrong := [name for name in cut if own.get(name) != cut[name]]:
        raise UserError(
            f"save=shrunk would leave {wrong[0]} of shape {cut[wrong[0]]}, and by {type(config).__name__} it is "
            f"{own.get(wrong[0])}: exclude that part of the blocks (layers.exclude=[...]), or give save=true"
        )
    return smaller.config


def _set(text: PreTrainedConfig, sizes: Mapping[str, set], block: nn.Module) -> None:
    """Write the new sizes into the text model's configuration."""
    ((channels, kept),) = sizes["channels"]
    if channels is not None:
        key = next((key for key in _CHANNELS if getattr(text, key, None) == channels), None)
        if key is None:
            raise UserError("it names no number of channels")
        setattr(text, key, kept)
    ((heads, kept),) = sizes["heads"]
    if heads is not None:
        part = attention(block)
        text.num_attention_heads = part.heads // part.groups * kept
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = kept
        text.head_dim = part.width


def _shapes(model: nn.Module, prefix: str, patterns: Mapping[str, Pattern]) -> dict[str, tuple]:
    """The shapes of the model's tensors without the units that leave."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, found in check_units(model, patterns).items():
        for units, pattern in found:
            kept = kept_of(units.count, pattern.sparsity)
            key = f"{name}.{units.writer}.weight"
            shapes[key] = (shapes[key][0], kept * units.width)
            for path, width in units.readers.items():
                for key in (f"{name}.{path}.weight", f"{name}.{path}.bias"):
                    if key in shapes:
                        shapes[key] = (kept * width, *shapes[key][1:])
    return shapes


@dataclass(frozen=True)
class _Cut:
    """Takes the units that left out of a block's tensors."""

    asked: list[tuple[Units, Pattern]]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The smaller tensors, by name inside the block."""
        found = dict(tensors)
        for units, pattern in self.asked:
            stay = self._stay(units, kept_of(units.count, pattern.sparsity), tensors)
            key = f"{units.writer}.weight"
            found[key] = tensors[key][:, stay.repeat_interleave(units.width)].contiguous()
            for path, width in units.readers.items():
                rows = stay.repeat_interleave(width)
                found |= {k: tensors[k][rows].contiguous() for k in _own(path, tensors)}
        return found

    @staticmethod
    def _stay(units: Units, kept: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """(count,) bool: the units with anything but zeros, filled up to their number by the first of the others."""
        alive = (tensors[f"{units.writer}.weight"] != 0).any(0).view(units.count, -1).any(1)
        for path in units.readers:
            for key in _own(path, tensors):
                alive |= (tensors[key] != 0).view(units.count, -1).any(1)
        if (lacking := kept - int(alive.sum())) < 0:
            raise RuntimeError(f"{units.writer} has {-lacking} more {units.kind} than {kept}: nothing was saved")
        alive[(~alive).nonzero().squeeze(1)[:lacking]] = True
        return alive


def _own(path: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [key for key in (f"{path}.weight", f"{path}.bias") if key in tensors]


class _ShrunkBlocks:
    """The blocks of a streamed model, smaller."""

    def __init__(self, take: Callable[[int], dict], cuts: list[_Cut]) -> None:
        self._take, self._cuts = take, cuts

    def take(self, index: int, dense: bool = False) -> dict[str, Tensor]:
        return self._cuts[index](self._take(index))


class ShrunkModel:
    """A pruned model without the units that left, as far as it is needed for saving it; its attributes are those of a
    `BlockModel`. Of a model in memory it is a copy.

    Args:
        model: the pruned model.
        patterns: layer name → pattern, for every layer that was pruned.
    """

    def __init__(self, model: BlockModel, patterns: Mapping[str, Pattern]) -> None:
        network, self.prefix = model.model, model.prefix
        self.model = loading.skeleton(shrunk_config(network, patterns), network.dtype)
        for name in ("own_dtype", "own_use_cache", "generation_config"):
            if hasattr(network, name):
                setattr(self.model, name, getattr(network, name))
        asked = check_units(network, patterns)
        cuts = [_Cut(asked[model.name(index)]) for index in range(len(model))]
        state = {name: tensor for name, tensor in network.state_dict().items() if not tensor.is_meta}
        if model.source is None:
            for index, cut in enumerate(cuts):
                start = f"{model.name(index)}."
                own = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
                state |= {start + name: tensor for name, tensor in cut(own).items()}
        assign(self.model, _shared(state))
        self.source = None if model.source is None else _ShrunkBlocks(model.source.take, cuts)
        self.blocks = find_blocks(self.model)[1]
        self.name = model.name

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def size(self) -> int:
        """Bytes of all parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def _shared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, one object where they share memory, by which `assign` knows that they are tied."""
    known: dict[tuple, Tensor] = {}
    return {name: known.setdefault((t.data_ptr(), t.shape), t) for name, t in state.items()}
