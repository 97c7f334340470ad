"""The two parts of a decoder block, feed-forward and attention, where they are built of linear layers in the usual way.

plain     down(act(up(x)))                 fc1 and fc2 of OPT
gated     down(act(gate(x)) * up(x))       gate_proj, up_proj and down_proj of Llama, Qwen, Gemma
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import Layer
from .structure import is_linear

# up, down and gate by the last part of their names.
_FEED_FORWARD = (
    ("up_proj", "down_proj", "gate_proj"),
    ("fc1", "fc2", None),
    ("c_fc", "c_proj", None),
    ("dense_h_to_4h", "dense_4h_to_h", None),
    ("fc_in", "fc_out", None),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The feed-forward part of a block.

    Attributes:
        up, down: paths of the layers inside the block.
        gate: likewise; None in a plain one.
        activation: the function of the gate, or of the only layer.
    """

    up: str
    down: str
    gate: str | None
    activation: Callable[[Tensor], Tensor]

    @property
    def readers(self) -> list[str]:
        """The layers whose output rows are its channels."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    @property
    def layers(self) -> list[str]:
        """All of them."""
        return [*self.readers, self.down]

    def channels(self, outputs: dict[str, Tensor]) -> Tensor:
        """What `down` is fed.

        Args:
            outputs: of the readers, by path.
        """
        activated = self.activation(outputs[self.readers[0]])
        return activated if self.gate is None else activated * outputs[self.up]

    def computes(self, function: Callable[[Tensor], Tensor]) -> bool:
        """Whether the activation is this function, by its values."""
        points = torch.linspace(-8, 8, 257)
        return torch.allclose(self.activation(points), function(points), atol=1e-6)


def feed_forward(block: nn.Module) -> FeedForward | None:
    """The feed-forward part of a block; None where it has none of this form, or several."""
    found = []
    for path, parent in block.named_modules():
        for up, down, gate in _FEED_FORWARD:
            names = [name for name in (up, down, gate) if name is not None]
            activation = next((a for name in _ACTIVATIONS if callable(a := getattr(parent, name, None))), None)
            if activation is not None and all(is_linear(getattr(parent, name, None)) for name in names):
                start = f"{path}." if path else ""
                found.append(FeedForward(start + up, start + down, start + gate if gate else None, activation))
    return found[0] if len(found) == 1 and _fits(block, found[0]) else None


def _fits(block: nn.Module, part: FeedForward) -> bool:
    shapes = {path: Layer(path, block.get_submodule(path)).shape for path in part.layers}
    return all(shapes[path] == (shapes[part.down][1], shapes[part.up][1]) for path in part.readers)


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a block, of heads that share nothing but its input and output.

    Attributes:
        query, key, value, output: paths of the layers inside the block.
        width: outputs of a head.
        heads, groups: how many heads of queries there are, and of keys and values.
        spanning: a parameter of more than one head beside these layers, by which heads depend on each other; None.
    """

    query: str
    key: str
    value: str
    output: str
    width: int
    heads: int
    groups: int
    spanning: str | None

    @property
    def layers(self) -> list[str]:
        """All of them."""
        return [self.query, self.key, self.value, self.output]


def attention(block: nn.Module) -> Attention | None:
    """The attention of a block; None where it has none of this form, or several."""
    found = []
    for path, parent in block.named_modules():
        writer = next((name for name in ("o_proj", "out_proj", "dense") if is_linear(getattr(parent, name, None))), "")
        names, width = ["q_proj", "k_proj", "v_proj", writer], getattr(parent, "head_dim", None)
        if not writer or not isinstance(width, int) or not all(is_linear(getattr(parent, n, None)) for n in names):
            continue
        shapes = {name: Layer(name, getattr(parent, name)).shape for name in names}
        queries, keys = shapes["q_proj"][0], shapes["k_proj"][0]
        if shapes["v_proj"][0] != keys or shapes[writer][1] != queries or keys % width or queries % keys:
            continue
        others = (n for n, p in parent.named_parameters() if n.split(".")[0] not in names and p.numel() != width)
        start = f"{path}." if path else ""
        paths = (start + name for name in names)
        found.append(Attention(*paths, width, queries // width, keys // width, next(others, None)))
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Units:
    """Channels of a feed-forward part, or heads of attention: what can leave a block whole.

    A unit is `width` consecutive inputs of the writer, and the consecutive output rows of the readers that make them. A
    head of keys and values is one unit with all queries that attend to it.

    Attributes:
        kind: "channels" or "heads".
        count: how many units there are.
        writer: path of the layer that they are inputs of.
        width: inputs of the writer in each.
        readers: path of a layer → its output rows in each.
    """

    kind: str
    count: int
    writer: str
    width: int
    readers: dict[str, int]

    @property
    def layers(self) -> list[str]:
        """Paths of all layers that a unit has a part in."""
        return [*self.readers, self.writer]


def units_of(block: nn.Module) -> list[Units]:
    """What can leave a block whole: heads where its attention has a known form and heads that do not depend on each
    other, and channels where its feed-forward part has one. In the order in which a block runs them."""
    found = []
    heads, part = attention(block), feed_forward(block)
    if heads is not None and heads.spanning is None:
        each = heads.heads // heads.groups * heads.width
        rows = {heads.query: each, heads.key: heads.width, heads.value: heads.width}
        found.append(Units("heads", heads.groups, heads.output, each, rows))
    if part is not None:
        count = Layer(part.down, block.get_submodule(part.down)).shape[1]
        found.append(Units("channels", count, part.down, 1, dict.fromkeys(part.readers, 1)))
    return found
