"""Reads decoder blocks from files when they are needed, the next one while the current one is solved."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..base.errors import UserError
from ..checkpoints.checkpoint import Checkpoint, Merged, assign, model_keys, tied_names
from .structure import find_blocks


class StreamedBlocks:
    """The blocks' tensors by index, from a checkpoint or, once pruned, from their shards.

    Args:
        checkpoint: the dense weights.
        prefix: name of the list of blocks in the model.
        names: per block, name inside the block → (checkpoint's key, or how the tensor is made of several, dtype).
        pin: read into page-locked memory, for a CUDA device.
    """

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, names: list[dict[str, tuple[str | Merged, torch.dtype]]], pin: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._names = names
        self._pin = pin
        self._shards: dict[int, Path] = {}
        self._ahead: dict[int, Future] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def take(self, index: int, dense: bool = False) -> dict[str, Tensor]:
        """The tensors of a block in host memory, by name inside the block.

        Args:
            index: the block.
            dense: read the checkpoint's weights even if the block has been pruned.
        """
        if dense and index in self._shards:
            return self._read(index, None)
        future = self._ahead.pop(index, None)
        return future.result() if future is not None else self._read(index, self._shards.get(index))

    def prefetch(self, index: int) -> None:
        """Start reading a block in the background, unless it is being read or there is none of this number."""
        if index < len(self._names) and index not in self._ahead:
            self._ahead.clear()
            self._ahead[index] = self._reader.submit(self._read, index, self._shards.get(index))

    def replace(self, index: int, shard: Path) -> None:
        """From now on read this block from `shard`."""
        self._shards[index] = shard
        self._ahead.pop(index, None)

    def _read(self, index: int, shard: Path | None) -> dict[str, Tensor]:
        if shard is not None:
            prefix = f"{self._prefix}.{index}."
            return {n.removeprefix(prefix): _copied(tensor, self._pin) for n, tensor in load_file(shard).items()}
        names = self._names[index]
        whole = {key: dtype for key, dtype in names.values() if isinstance(key, str)}
        read = self._checkpoint.read(whole, self._pin)
        found = {}
        for name, (key, dtype) in names.items():
            if isinstance(key, str):
                found[name] = read[key]
            else:  # one after the other, lest the block is there twice
                made = key.made(self._checkpoint.read(dict.fromkeys(key.keys, dtype)))
                found[name] = _copied(made, True) if self._pin else made
        return found


def _copied(tensor: Tensor, pin: bool) -> Tensor:
    """A copy in memory: the pages of a mapped file count as the process's, and the file may be replaced."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin).copy_(tensor)


def open_streamed(network: nn.Module, checkpoint: Checkpoint, what: str, pin: bool) -> StreamedBlocks:
    """Load the weights outside the blocks into a skeleton, and return the source of its blocks.

    Args:
        network: a skeleton in the dtype to run in; its parameters outside the blocks are loaded (host memory).
        checkpoint: its weights.
        what: how to speak of the checkpoint.
        pin: read blocks into page-locked memory.

    Raises:
        UserError: weights that are missing or do not fit, or a model whose weights cannot be read block by block.
    """
    keys, merged = model_keys(network, checkpoint, what)
    targets = network.state_dict()
    _refuse_mixed_precision(network)
    prefix, blocks = find_blocks(network)
    inside = [{} for _ in blocks]
    outside = {}
    for name, key in {**keys, **merged}.items():
        if name.startswith(f"{prefix}."):
            index, _, local = name.removeprefix(f"{prefix}.").partition(".")
            inside[int(index)][local] = (key, targets[name].dtype)
        else:
            if not isinstance(key, str):
                raise UserError(f"{what} stores {name} in several tensors: load it whole, stream=false")
            outside[name] = (key, targets[name].dtype)
    for names in tied_names(network):
        if any(name.startswith(f"{prefix}.") for name in names):
            raise UserError(f"{names[0]} and {names[1]} of {what} share a weight: load the model whole, stream=false")
    tensors = checkpoint.read(dict(outside.values()))
    assign(network, {name: tensors[key] for name, (key, _) in outside.items()})
    return StreamedBlocks(checkpoint, prefix, inside, pin)


def _refuse_mixed_precision(network: nn.Module) -> None:
    """Weights that transformers keeps in float32 beside half-precision ones would be read in the wrong precision."""
    if network.dtype == torch.float32:
        return
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        if getattr(network, attribute, None):
            raise UserError(
                f"{type(network).__name__} keeps some weights in float32: load it whole (stream=false) or give "
                "dtype=float32"
            )
