"""A causal language model as embedding → decoder blocks → head, one block on the device at a time.

Any `AutoModelForCausalLM` works by finding its list of decoder blocks. The model's own forward does everything outside
the blocks: the blocks' forwards are replaced by stubs that record how the model calls them (masks, rotary embeddings
and positions differ between layer types) or hand in finished hidden states, so no family needs its own code here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .checkpoint import assign
from .errors import UserError
from .memory import free_device, trim_host

if TYPE_CHECKING:
    from .streaming import StreamedBlocks

# A model that takes less than this share of the free device memory stays there; a larger one visits block by block.
_RESIDENT_SHARE = 0.1


class _Stop(Exception):
    """Ends a forward once the blocks' arguments are known."""


@dataclass(frozen=True)
class Call:
    """A block's arguments besides the hidden states."""

    args: tuple
    kwargs: dict


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's list of decoder blocks and its dotted name: the `ModuleList` of like modules with most parameters.

    Raises:
        UserError: there is none that contains linear layers.
    """
    best, best_size = None, 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(block) for block in module}) != 1:
            continue
        if not any(is_linear(layer) for layer in module.modules()):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > best_size:
            best, best_size = (name, module), size
    if best is None:
        raise UserError(
            f"{type(model).__name__} has no decoder blocks (no ModuleList of equal modules with linear layers): "
            "give a decoder-only language model that AutoModelForCausalLM loads"
        )
    return best


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer in one of the two layouts that transformers uses."""
    return isinstance(module, (nn.Linear, Conv1D))


def block_linears(block: nn.Module, prefix: str, excluded: Callable[[str], bool] = lambda name: False) -> dict:
    """The block's linear layers by full name.

    Args:
        block: a decoder block.
        prefix: its full name.
        excluded: names that the user asked not to prune, for which nothing is refused.

    Raises:
        UserError: the block holds weights that act as linear layers but cannot be pruned as such (fused 3-D expert
            weights, quantised weights).
    """
    linears = {}
    for path, module in block.named_modules():
        name = f"{prefix}.{path}" if path else prefix
        if is_linear(module):
            if not module.weight.is_floating_point() and not excluded(name):
                raise UserError(
                    f"{name} holds quantised weights ({module.weight.dtype}): load an unquantised checkpoint, "
                    "or exclude it (layers.exclude=[...])"
                )
            linears[name] = module
            continue
        if type(module).__module__.startswith("torch.nn."):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 3 and not excluded(f"{name}.{own}"):
                raise UserError(
                    f"{name}.{own} is a fused weight of shape {tuple(parameter.shape)}, not a linear layer, and cannot "
                    f"be pruned: leave it dense by layers.exclude=['*{own}']"
                )
    return linears


def blocks_of(names: Iterable[str], prefix: str) -> list[int]:
    """Indices of the blocks that these layers belong to, in order.

    Args:
        names: of layers.
        prefix: name of the list of blocks.
    """
    return sorted({int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in names})


class BlockModel:
    """A model cut into blocks.

    Args:
        model: a `transformers` causal language model in evaluation mode.
        device: where the blocks compute.
        offload: keep the blocks where they are and bring one at a time to `device`; by default so unless the model is
            small beside the device's free memory.
        source: reads the blocks from files, for a model of which only the rest is in memory (`open_streamed`).
        hidden_states: where hidden states lie between blocks, one of `hidden.PLACES`.
        scratch: folder for those on disk; the system's for temporary files by default.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        offload: bool | None = None,
        source: StreamedBlocks | None = None,
        hidden_states: str = "auto",
        scratch: Path | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.source = source
        self.hidden_states = hidden_states
        self.scratch = scratch
        self.prefix, self.blocks = find_blocks(model)
        self._returns_tuple: bool | None = None
        self._calls: dict[tuple[int, int], list[Call]] = {}  # by (windows, seqlen) of a batch
        if offload is None:
            offload = device.type == "cuda" and self.size > _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
        self.offload = offload or source is not None
        if self.offload:
            self._move_outside_blocks()
        else:
            model.to(device)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def size(self) -> int:
        """Bytes of all parameters, wherever they are."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def name(self, index: int) -> str:
        """Full name of a block."""
        return f"{self.prefix}.{index}"

    def _move_outside_blocks(self) -> None:
        parent, _, attribute = self.prefix.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, attribute, nn.ModuleList())
        try:
            self.model.to(self.device)
        finally:
            setattr(owner, attribute, self.blocks)
        if self.source is not None:  # what blocks hold besides the weights that are read, such as rotary frequencies
            for module in self.blocks.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and not buffer.is_meta:
                        module._buffers[name] = buffer.to(self.device)

    @contextmanager
    def block(self, index: int, dense: bool = False, changing: bool = True, ahead: bool = True) -> Iterator[nn.Module]:
        """A block, on the device for the length of the context.

        Args:
            index: which one.
            dense: of a streamed model, the unpruned one although it was pruned already.
            changing: its weights change meanwhile and are brought back.
            ahead: of a streamed model, begin to read the next one meanwhile.
        """
        block = self.blocks[index]
        if self.source is None:
            with _visiting(block, self.device, changing):
                yield block
            return
        tensors = self.source.take(index, dense)
        if ahead:
            self.source.prefetch(index + 1)
        assign(block, {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()})
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        del tensors  # on a GPU the host's copy is of no use any more
        try:
            yield block
        finally:
            assign(block, empty)
            trim_host()

    @contextmanager
    def whole(self) -> Iterator[nn.Module | None]:
        """The model with all blocks on the device for the length of the context; None where they do not fit."""
        if not self.offload:
            yield self.model
        elif self.size > 0.8 * free_device(self.device):
            yield None
        else:
            with ExitStack() as stack:
                for index in range(len(self)):
                    stack.enter_context(self.block(index, changing=False))
                yield self.model

    @contextmanager
    def _stubs(self, stub: Callable[..., Tensor | tuple]) -> Iterator[None]:
        """Replace every block's forward by stub(index, hidden, args, kwargs)."""

        def forward_of(index: int) -> Callable:
            def forward(*args, **kwargs):
                if args:
                    hidden, args = args[0], args[1:]
                else:
                    hidden = kwargs.pop("hidden_states")
                return stub(index, hidden, args, kwargs)

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = forward_of(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _wrap(self, hidden: Tensor) -> Tensor | tuple[Tensor]:
        return (hidden,) if self._returns_tuple else hidden

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states that the first block receives, (windows, seqlen, width), for `tokens` (windows, seqlen).

        Records each block's other arguments for this shape on the way, the first time.
        """
        shape = tuple(tokens.shape)
        calls: list[Call] = []
        first: list[Tensor] = []
        known = shape in self._calls

        def stub(index: int, hidden: Tensor, args: tuple, kwargs: dict):
            if index == 0:
                first.append(hidden)
                if known:
                    raise _Stop
                if self._returns_tuple is None:
                    self._learn_return(hidden, Call(args, kwargs))
            calls.append(Call(args, kwargs))
            if index == len(self) - 1:
                raise _Stop
            return self._wrap(hidden)

        with self._stubs(stub), suppress(_Stop):
            self.model(tokens.to(self.device), use_cache=False)
        if not known:
            self._calls[shape] = calls
        return first[0]

    def _learn_return(self, hidden: Tensor, call: Call) -> None:
        """Whether blocks return hidden states alone or first in a tuple, seen from the first one."""
        with self.block(0, changing=False, ahead=False) as block:
            output = type(block).forward(block, hidden[:, :1].expand_as(hidden), *call.args, **call.kwargs)
        self._returns_tuple = isinstance(output, tuple)

    def know_calls(self, tokens: Tensor) -> None:
        """Record the blocks' arguments for windows of this shape, (windows, seqlen), unless they are known."""
        if tuple(tokens.shape) not in self._calls:
            self.embed(tokens)

    def check_calls(self, tokens: Tensor) -> None:
        """Refuse a model whose blocks take arguments that depend on the tokens, since each block's are recorded once.

        Args:
            tokens: (windows, seqlen), other windows than the recorded ones, of a shape that was seen.
        """
        recorded = self._calls.pop(tuple(tokens.shape))
        self.embed(tokens)
        for index, (one, other) in enumerate(zip(recorded, self._calls[tuple(tokens.shape)], strict=True)):
            if not _equal((one.args, one.kwargs), (other.args, other.kwargs)):
                raise UserError(
                    f"{self.name(index)} of {type(self.model).__name__} takes arguments that depend on the tokens "
                    "(per-layer inputs), which the block-wise loop does not support: choose another model"
                )

    @torch.no_grad()
    def forward_block(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for `hidden` (windows, seqlen, width), of a shape that `embed` has seen."""
        call = self._calls[hidden.shape[0], hidden.shape[1]][index]
        output = block(hidden, *call.args, **call.kwargs)
        return output[0] if self._returns_tuple else output

    @torch.no_grad()
    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits (windows, seqlen, vocabulary) from the last block's output, by the model's own final norm and head."""

        def stub(index: int, passed: Tensor, args: tuple, kwargs: dict):
            return self._wrap(hidden if index == 0 else passed)

        with self._stubs(stub):
            return self.model(tokens.to(self.device), use_cache=False).logits


@contextmanager
def _visiting(block: nn.Module, device: torch.device, changing: bool) -> Iterator[None]:
    """The block on the device for the length of the context. Its memory at home is kept: fresh pages would cost more
    than the copy."""
    homes = [(tensor, tensor.data) for tensor in (*block.parameters(), *block.buffers()) if tensor.device != device]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in homes:
            if changing and tensor.data is not home:
                home.copy_(tensor.data)
            tensor.data = home


def _equal(one, other) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other)
