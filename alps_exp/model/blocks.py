"""A causal language model as embedding → decoder blocks → head, one block on the device at a time.

Any `AutoModelForCausalLM` works by finding its list of decoder blocks. The model's own forward does everything outside
the blocks: the blocks' forwards are replaced by stubs that record how the model calls them (masks, rotary embeddings
and positions differ between layer types) or hand in finished hidden states, so no family needs its own code here.
`faithful` tells the models for which that is the same as their own forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..base.errors import UserError
from ..base.memory import free_device, trim_host
from ..base.staging import Staging
from ..checkpoints.checkpoint import assign
from ..checkpoints.hub import first_line
from .structure import find_blocks

if TYPE_CHECKING:
    from .source import StreamedBlocks

# A model that takes less than this share of the free device memory stays there; a larger one visits block by block.
_RESIDENT_SHARE = 0.1


class _Stop(Exception):
    """Ends a forward once the blocks' arguments are known."""


@dataclass(frozen=True)
class Call:
    """A block's arguments besides the hidden states."""

    args: tuple
    kwargs: dict

    def copied(self) -> Call:
        """With dictionaries and lists of its own, since blocks and models may fill those that they are handed."""
        return Call(*_copied((self.args, self.kwargs)))

    def same(self, other: Call) -> bool:
        """Whether tensors and plain values are equal, and objects of the same kind."""
        return _equal((self.args, self.kwargs), (other.args, other.kwargs))


@dataclass
class Known:
    """What was found of a network.

    Attributes:
        faithful: so many of its first blocks, run one by one, do what they do in its own forward (`faithful.ensure`).
    """

    faithful: int = 0


class BlockModel:
    """A model cut into blocks.

    Args:
        model: a `transformers` causal language model in evaluation mode. Forwards of its modules that were replaced on
            the instance, and hooks, stay in force and in place.
        device: where the blocks compute.
        offload: keep the blocks where they are and bring one at a time to `device`; by default so unless the model is
            small beside the device's free memory.
        source: reads the blocks from files, for a model of which only the rest is in memory (`open_streamed`).
        hidden_states: where hidden states lie between blocks, one of `base.choices.PLACES`.
        scratch: folder for those on disk; the system's for temporary files by default.
        known: what a `BlockModel` of the same network and device, whose weights alone have changed, has found.

    Raises:
        UserError: no decoder blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        offload: bool | None = None,
        source: StreamedBlocks | None = None,
        hidden_states: str = "auto",
        scratch: Path | None = None,
        known: Known | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.source = source
        self._staging = Staging(device)
        self.hidden_states = hidden_states
        self.scratch = scratch
        self.prefix, self.blocks = find_blocks(model)
        self.known = Known() if known is None else known
        self._returns: Callable[[Tensor], object] | None = None
        self._calls: dict[tuple[int, int], list[Call]] = {}  # by (windows, seqlen) of a batch
        if offload is None:
            offload = device.type == "cuda" and self.size > _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
        self.offload = offload or source is not None
        if self.offload:
            self._move_outside_blocks()
        elif any(tensor.device != device for tensor in (*model.parameters(), *model.buffers())):
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
            with _visiting(block, self._staging, changing):
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
    def stubs(self, stub: Callable[[int, Tensor, tuple, dict], Tensor], first: int = 0) -> Iterator[None]:
        """Replace the forward of every block from `first` on by stub(index, hidden, args, kwargs) -> hidden.

        The blocks' hooks rest meanwhile: they act on what blocks do. Forwards and hooks are put back as they were.
        """

        def forward_of(index: int) -> Callable:
            def forward(*args, **kwargs):
                if args:
                    hidden, args = args[0], args[1:]
                else:
                    hidden = kwargs.pop("hidden_states")
                return self._returns(stub(index, hidden, args, kwargs))

            return forward

        names, kept = ("forward", "_forward_hooks", "_forward_pre_hooks"), []
        for index, block in enumerate(self.blocks):
            if index >= first:
                own = vars(block)  # to set attributes of a module takes ten times as long
                kept.append((own, {name: own[name] for name in names if name in own}))
                own.update(forward=forward_of(index), _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        try:
            yield
        finally:
            for own, before in reversed(kept):
                del own["forward"]
                own.update(before)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states that the first block receives, (windows, seqlen, width), for `tokens` (windows, seqlen).

        Records each block's other arguments for this shape on the way, the first time.

        Raises:
            UserError: the model does not call its blocks once each, in order, with hidden states of this form.
        """
        if self._returns is None:
            self._learn_return(tokens)
        shape = tuple(tokens.shape)
        calls: list[Call] = []
        first: list[Tensor] = []
        known = self._calls.get(shape)

        def stub(index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
            self.expect(index, len(calls))
            if index == 0:
                if tuple(hidden.shape[:2]) != shape:
                    raise UserError(
                        f"the blocks of {type(self.model).__name__} take hidden states of shape {tuple(hidden.shape)} "
                        f"for tokens of shape {shape}, and the block-wise loop needs (windows, seqlen, width): choose "
                        "another model"
                    )
                first.append(hidden)
                if known is not None:
                    self._compare(0, known[0], Call(args, kwargs))
                    raise _Stop
            calls.append(Call(args, kwargs).copied())
            if index == len(self) - 1:
                raise _Stop
            return hidden

        with self.stubs(stub), suppress(_Stop):
            self.forward(tokens)
            self.expect(len(self), len(calls))
        if known is None:
            self._calls[shape] = calls
        return first[0]

    def expect(self, index: int, number: int) -> None:
        """Refuse a model that does not run its blocks once each in order.

        Args:
            index: the block that it runs next; as many as there are at the end of its forward.
            number: how many it ran before.
        """
        if index == number:
            return
        again = " again" if index < number else ""
        what = f"runs {self.name(index)}{again}" if index < len(self) else "ends"
        raise UserError(
            f"{type(self.model).__name__} {what} after {number} of its blocks ({self.prefix}, {len(self)} of them): "
            "the block-wise loop needs models that run each block once, in order; choose another model"
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits by the model's own forward, whatever its blocks do at the moment.

        Raises:
            UserError: it failed.
        """
        try:
            output = self.model(tokens.to(self.device), use_cache=False)
        except (UserError, _Stop, MemoryError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any that a model's code may raise, about values that stubs do not give
            raise UserError(
                f"{type(self.model).__name__} fails when it runs block by block ({type(error).__name__}: "
                f"{first_line(error)}): where its own forward does not fail, choose another model"
            ) from error
        return output.logits if hasattr(output, "logits") else output[0]

    def _learn_return(self, tokens: Tensor) -> None:
        """In what form blocks return hidden states, seen from the first one: alone, or first in a tuple or list.

        Of what else is returned stubs give nothing: a model that needs it is found out.
        """

        def look(block: nn.Module, args: tuple, output) -> None:
            if isinstance(output, Tensor):
                self._returns = lambda hidden: hidden
            elif isinstance(output, (tuple, list)) and type(output) in (tuple, list):
                self._returns = lambda hidden: type(output)([hidden, *[None] * (len(output) - 1)])
            else:
                raise UserError(
                    f"{self.name(0)} of {type(self.model).__name__} returns a {type(output).__name__}, where the "
                    "block-wise loop needs hidden states, alone or first in a tuple: choose another model"
                )
            raise _Stop

        with self.block(0, changing=False, ahead=False) as block:
            handle = block.register_forward_hook(look)
            try:
                with suppress(_Stop):
                    self.forward(tokens[:1])
            finally:
                handle.remove()
        if self._returns is None:
            self.expect(len(self), 0)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(windows, seqlen) of the batches for which the blocks' arguments are known."""
        return list(self._calls)

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
            self._compare(index, one, other)

    def _compare(self, index: int, one: Call, other: Call) -> None:
        if not one.same(other):
            raise UserError(
                f"{self.name(index)} of {type(self.model).__name__} takes arguments that depend on the tokens "
                "(per-layer inputs), which the block-wise loop does not support: choose another model"
            )

    def call(self, index: int, hidden: Tensor) -> Call:
        """The block's arguments as they were recorded for `hidden` (windows, seqlen, width), of a shape that `embed`
        has seen."""
        return self._calls[hidden.shape[0], hidden.shape[1]][index].copied()

    def forget(self, tokens: Tensor) -> None:
        """Drop the arguments for windows of this shape, (windows, seqlen)."""
        self._calls.pop(tuple(tokens.shape), None)

    @torch.no_grad()
    def forward_block(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for `hidden` (windows, seqlen, width), of a shape that `embed` has seen."""
        call = self.call(index, hidden)
        return hidden_of(block(hidden, *call.args, **call.kwargs))

    def behind(self, tokens: Tensor) -> Tensor:
        """The last block's output (windows, seqlen, width) in the model's own forward, which ends there."""
        found: list[Tensor] = []

        def stop(block: nn.Module, args: tuple, output: Tensor | tuple | list) -> None:
            found.append(hidden_of(output))
            raise _Stop

        handle = self.blocks[-1].register_forward_hook(stop)
        try:
            with suppress(_Stop):
                self.forward(tokens)
        finally:
            handle.remove()
        return found[0]

    @torch.no_grad()
    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits (windows, seqlen, vocabulary) from the last block's output, by the model's own final norm and head."""
        return self.logits(tokens, hidden)

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The same, with gradients where they are enabled."""
        with self.stubs(lambda index, passed, args, kwargs: hidden if index == 0 else passed):
            return self.forward(tokens)


def hidden_of(output: Tensor | tuple | list) -> Tensor:
    """The hidden states in what a block returned."""
    return output if isinstance(output, Tensor) else output[0]


def refuse_scattered(model: nn.Module, device: torch.device) -> None:
    """Raise UserError for a model that accelerate has spread out: it moves weights and inputs by itself.

    Args:
        model: the model.
        device: where its blocks are to compute.
    """
    remedy = "load it without device_map, as a whole in host memory: blocks are brought to the device one at a time"
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1 or places == {"meta"}:
        raise UserError(f"{type(model).__name__} has its weights on {', '.join(sorted(places))}: {remedy}")
    for name, module in model.named_modules():
        target = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if target is not None and not _same_device(target, device):
            raise UserError(f"a hook of accelerate runs {name or 'the model'} on {target}, not {device}: {remedy}")


def _same_device(one: torch.device | str | int, other: torch.device) -> bool:
    one = torch.device(one)
    return one.type == other.type and (one.index or 0) == (other.index or 0)


@contextmanager
def _visiting(block: nn.Module, staging: Staging, changing: bool) -> Iterator[None]:
    """The block on the device for the length of the context. Its memory at home is kept: fresh pages would cost more
    than the copy."""
    tensors = (*block.parameters(), *block.buffers())
    homes = [(tensor, tensor.data) for tensor in tensors if tensor.device != staging.device]
    try:
        for tensor, home in homes:
            tensor.data = staging.bring(home)
        yield
    finally:
        for tensor, home in homes:
            if changing and tensor.data is not home:
                staging.send(tensor.data, home)
            tensor.data = home


def _copied(value):
    if isinstance(value, MutableMapping):
        copied = copy(value)
        copied.update((key, _copied(part)) for key, part in value.items())
        return copied
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value


def _equal(one, other) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, (bool, int, float, str)):
        return type(one) is type(other) and one == other
    return type(one) is type(other)
