"""Whether a model that is run block by block is still that model: its logits against those of its own forward.

The loop assumes that a model runs the blocks of one list once each, in order; that each receives what the one before
it gave, unchanged; that its other arguments depend on the windows' shape only; and that what follows acts on each
position by itself. Families that do otherwise (looped stacks, keys and values shared between blocks, per-layer inputs,
adapters around a shared block) would be calibrated and evaluated as another model, so they are refused here.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..base.errors import UserError
from ..checkpoints.hub import first_line
from .blocks import BlockModel, Call, hidden_of
from .structure import block_lists, count

# One window is compared, cut to this length and to so many logits: less work than the forward of a usual window.
_LENGTH, _LOGITS = 512, 2**25

# Largest difference that is rounding, relative to the spread of the values. With the same operations on the same
# numbers there is none; the head takes its positions in two parts, and some kernels on GPUs add in another order.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Other blocks that the model runs matter from this share of the pruned ones' weights on.
_BESIDE = 0.05


def ensure(model: BlockModel, tokens: Tensor, blocks: int | None = None) -> None:
    """Compare the loop's logits with the model's own on one window, unless that was done before.

    Blocks come to the device one at a time. A second window goes through each block after the first, as in the loop, so
    that whatever a block keeps of one shows in the other.

    Args:
        model: the model.
        tokens: (windows, seqlen); the first window is used.
        blocks: only the first so many run, and the others pass on what they are given, on both sides; all by default.

    Raises:
        UserError: they differ by more than rounding, or the model does not run block by block at all.
        torch.OutOfMemoryError: a block and one window do not fit on the device.
    """
    blocks = len(model) if blocks is None else blocks
    if model.known.faithful < blocks:
        _compare(model, tokens, blocks)
        model.known.faithful = blocks


@torch.no_grad()
def _compare(model: BlockModel, tokens: Tensor, blocks: int) -> None:
    vocabulary = model.model.config.get_text_config(decoder=True).vocab_size
    window = tokens[:1, : max(2, min(_LENGTH, _LOGITS // vocabulary))]
    known = tuple(window.shape) in model.shapes
    try:
        passes = _Passes(model, window, blocks)
        own = passes.own_logits()
        passes.finish()
        half = window.shape[1] // 2
        parts = (slice(half), slice(half, None))
        loops = torch.cat([model.head(window[:, part], passes.states[0][:, part]) for part in parts], dim=1)
    finally:
        if not known:
            model.forget(window)
    difference = _difference(loops, own)
    if difference > _tolerance(model):
        raise UserError(
            f"block by block, the logits of {type(model.model).__name__} differ by {difference:.2g} of their spread "
            f"from its own forward's ({passes.cause() or 'its head takes more than the last hidden states'}): choose "
            "another model"
        )


@dataclass
class _Step:
    """What went into a block and came out, at the last position.

    Attributes:
        entered, left: hidden states.
        alike: of the model's own, whether its other arguments were those that the loop gives.
    """

    entered: Tensor
    left: Tensor | None = None
    alike: bool = True


class _Passes:
    """A window's way through the model's own forward, and that of two windows through the loop.

    The own forward comes first and by itself, lest something that the blocks keep is the loop's. Only where blocks are
    read from files does the loop go along, so that each is read once.

    Args:
        model: the model.
        window: (1, seqlen).
        blocks: how many blocks run, the first ones.

    Attributes:
        states: the loop's hidden states, of `window` and of another.
    """

    def __init__(self, model: BlockModel, window: Tensor, blocks: int) -> None:
        self.states = [model.embed(window), model.embed(window.roll(1, dims=1))]
        self._model, self._window, self._blocks = model, window, blocks
        self._own: list[_Step] = []
        self._loop: list[_Step] = []
        self._others: dict[str, nn.ModuleList] = {}
        self._busy = False

    def own_logits(self) -> Tensor:
        """The model's own forward, with each block on the device while it runs.

        Raises:
            UserError: it does not run the blocks of one list once each, in order.
        """
        model = self._model
        with ExitStack() as stack:
            visit = stack.enter_context(ExitStack())
            for index, block in enumerate(list(model.blocks)[: self._blocks]):
                before, after = self._before(index, visit), self._after(index, visit)
                stack.callback(block.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after).remove)
            for name, blocks in block_lists(model.model).items():
                if not f"{name}.".startswith(f"{model.prefix}.") and not f"{model.prefix}.".startswith(f"{name}."):
                    for block in blocks:
                        note = block.register_forward_pre_hook(partial(self._note, name, blocks))
                        stack.callback(note.remove)
            stack.enter_context(model.stubs(self._pass, first=self._blocks))
            logits = model.forward(self._window)
        model.expect(len(model), len(self._own))
        for name, blocks in self._others.items():
            if count(blocks.parameters()) > _BESIDE * count(model.blocks.parameters()):
                raise UserError(
                    f"{type(model.model).__name__} runs the blocks of {name} beside those of {model.prefix}, and the "
                    "block-wise loop prunes one stack: choose another model"
                )
        return logits

    def finish(self) -> None:
        """Take the loop through the blocks, unless it went along with the model's own forward."""
        for index in range(len(self._loop), self._blocks):
            with self._model.block(index, changing=False, ahead=index < self._blocks - 1) as block:
                self._advance(index, block)

    def cause(self) -> str | None:
        """Where the loop first came to something else, in words; None where no block did."""
        tolerance = _tolerance(self._model)
        for index, (own, loop) in enumerate(zip(self._own, self._loop, strict=False)):
            name = self._model.name(index)
            if not own.alike:
                return f"{name} is handed what the blocks before it make: a state, keys and values"
            if _difference(loop.entered, own.entered) > tolerance:
                return f"{name} does not receive what {'the block before it' if index else 'the embedding'} gives"
            if loop.left is not None and _difference(loop.left, own.left) > tolerance:
                return f"{name} is random, or shares something with other blocks: a state, keys and values"
        return None

    def _note(self, name: str, blocks: nn.ModuleList, *_) -> None:
        self._others[name] = blocks

    def _pass(self, index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        self._model.expect(index, len(self._own))
        self._own.append(_Step(hidden))
        return hidden

    def _before(self, index: int, visit: ExitStack):
        def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._busy:
                return
            self._model.expect(index, len(self._own))
            hidden, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], args)
            kwargs = {key: value for key, value in kwargs.items() if value is not hidden}
            alike = Call(args, kwargs).same(self._model.call(index, self.states[0]))
            self._own.append(_Step(hidden[:, -1].clone(), alike=alike))
            visit.enter_context(self._model.block(index, changing=False, ahead=index < self._blocks - 1))

        return before

    def _after(self, index: int, visit: ExitStack):
        def after(block: nn.Module, args: tuple, output) -> None:
            if self._busy:
                return
            self._own[index].left = hidden_of(output)[:, -1].clone()
            if self._model.source is not None:
                self._busy = True
                self._advance(index, block)
                self._busy = False
            visit.close()

        return after

    def _advance(self, index: int, block: nn.Module) -> None:
        """The loop's step through a block."""
        model, name = self._model, self._model.name(index)
        self._loop.append(_Step(self.states[0][:, -1].clone()))
        try:
            self.states = [model.forward_block(index, block, hidden) for hidden in self.states]
        except (UserError, MemoryError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any that a model's code may raise
            why = f"; {cause}" if (cause := self.cause()) else ""
            raise UserError(
                f"{name} of {type(model.model).__name__} does not run by itself ({type(error).__name__}: "
                f"{first_line(error)}{why}): choose another model"
            ) from error
        self._loop[index].left = self.states[0][:, -1].clone()


def _difference(one: Tensor, other: Tensor) -> float:
    """‖one - other‖ over the spread of `other` around each position's mean; 0 where `other` is not finite, which is
    reported elsewhere."""
    if one.shape != other.shape:
        return float("inf")
    one, other = one.float(), other.float()
    spread = float((other - other.mean(-1, keepdim=True)).norm())
    distance = float((one - other).norm())
    if not torch.isfinite(other).all() or distance == 0:
        return 0.0
    return distance / spread if spread else float("inf")


def _tolerance(model: BlockModel) -> float:
    return _TOLERANCE.get(model.model.dtype, 5e-2)
