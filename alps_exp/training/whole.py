"""Training a model as a whole: what distillation and the methods that train have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..calibration.ladder import naming_the_step
from ..model.blocks import BlockModel


def working_dtypes(compute: torch.dtype) -> Mapping[torch.dtype, torch.dtype]:
    """What weights compute in: float16, whose gradients vanish, in bfloat16; with float32 asked for, all in that."""
    if compute is torch.bfloat16:
        return {torch.float16: torch.bfloat16}
    return {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@contextmanager
def on_device(model: BlockModel, what: str) -> Iterator[None]:
    """All blocks on the device for the length of the context, where their weights change; `what` wants that."""
    with ExitStack() as stack, naming_the_step(what):
        for index in range(len(model)) if model.offload else ():
            stack.enter_context(model.block(index, ahead=False))
        yield


class Checkpointing:
    """Blocks that make their activations again in the backward pass, once that is begun."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks, self._on = blocks, False

    def begin(self) -> str | None:
        """Begin; in words what it is, None where it was begun before."""
        if self._on:
            return None
        self._on = True
        return "activations of blocks are made again in the backward pass"

    def __enter__(self) -> Checkpointing:
        self._kept = [(block, vars(block).get("forward")) for block in self._blocks]
        for block in self._blocks:
            block.forward = self._around(block.forward)
        return self

    def __exit__(self, *error) -> None:
        for block, forward in self._kept:
            del block.forward
            if forward is not None:
                block.forward = forward

    def _around(self, forward: Callable) -> Callable:
        def around(*args, **kwargs):
            if self._on and torch.is_grad_enabled():
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)
            return forward(*args, **kwargs)

        return around


def window_bytes(
    shapes: Sequence[tuple[int, int]], itemsize: int, blocks: int, seqlen: int, vocabulary: float
) -> float:
    """Memory of a forward and backward of one window, activations made again.

    Args:
        shapes: (out, in) of the linear layers in the blocks.
        itemsize: bytes of an activation.
        blocks: number of decoder blocks.
        seqlen: tokens in the window.
        vocabulary: number of tokens that there are, or how many logits per token are held at a time.
    """
    width = max(min(shape) for shape in shapes)
    inside = sum(map(sum, shapes)) / max(1, blocks)
    return seqlen * itemsize * (blocks * width + 3 * inside) + seqlen * vocabulary * (3 * itemsize + 12)
