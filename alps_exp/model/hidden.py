"""The hidden states of all windows between two blocks: where they lie, and how many windows are forwarded at a time."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.errors import UserError
from ..base.memory import free_device, free_host
from . import faithful
from .blocks import BlockModel


class HiddenStates:
    """Hidden states (windows, seqlen, width), in the order of the windows, forwarded block by block.

    When the device runs out of memory they move to the host, and then fewer windows are forwarded at a time.

    Args:
        model: the model, which embeds the windows.
        tokens: (windows, seqlen).
        batch_size: windows per forward.
        place: "device", "host", "disk" (a file in the model's `scratch` folder that exists as long as this object), or
            "auto": the first of them where they leave enough room for the rest; the model's choice by default.
        blocks: how many blocks they will go through, the first ones; all by default.
        room: bytes that they may take on the device, for "auto"; by default a quarter of what is free there.
        sharers: how many processes keep as many in this host's memory, for "auto".

    Attributes:
        sizes: windows of each forward.
        place: where they are.
        measures: what was done for want of device memory, in words.

    Raises:
        UserError: block by block the model would not be what it is (`faithful.ensure`).
        torch.OutOfMemoryError: not even one window can be embedded.
    """

    def __init__(
        self,
        model: BlockModel,
        tokens: Tensor,
        batch_size: int,
        place: str | None = None,
        blocks: int | None = None,
        room: float | None = None,
        sharers: int = 1,
    ) -> None:
        faithful.ensure(model, tokens, blocks)
        self._model = model
        self._tokens = tokens
        self.place = place or model.hidden_states
        self.sizes = _even(len(tokens), batch_size)
        self.measures: list[str] = []
        self._states: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._room, self._sharers = room, sharers
        begin = 0
        while begin < len(tokens):
            size = self._size_at(begin)
            try:
                self._embed(begin, size)
            except torch.OutOfMemoryError:
                failed = True
            else:
                failed = False
            # Outside the handler, whose traceback would hold on to the tensors of the failed attempt.
            if failed:
                self.relieve_or_raise(begin)
            else:
                begin += size

    @property
    def nbytes(self) -> int:
        """What they take."""
        return self._states.nbytes

    def copy(self) -> HiddenStates:
        """The same hidden states, to go another way from here on."""
        made = copy.copy(self)
        made.sizes, made.measures = list(self.sizes), []
        made._states = self._empty(tuple(self._states.shape), self._states.dtype).copy_(self._states)
        return made

    def _embed(self, begin: int, size: int) -> None:
        chunk = self._tokens[begin : begin + size]
        hidden = self._model.embed(chunk)
        if self._states is None:
            self._allocate(hidden)
            self._model.check_calls(chunk.roll(1, dims=1))  # other tokens at every place, also with one batch only
        self._states[begin : begin + size].copy_(hidden)

    def _allocate(self, like: Tensor) -> None:
        shape = (len(self._tokens), *like.shape[1:])
        size = shape[0] * like[0].numel() * like.element_size()
        if self.place == "auto":
            self.place = choose_place(self._model.device, size, self._room, self._sharers)
        self._dtype = like.dtype
        self._states = self._empty(shape, like.dtype)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.place == "disk":
            return _on_disk(shape, dtype, self._model.scratch)
        cuda = self._model.device.type == "cuda"
        device = self._model.device if self.place == "device" else torch.device("cpu")
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=cuda and device.type == "cpu")

    def __iter__(self) -> Iterator[Tensor]:
        """The batches on the device."""
        for begin, end in self.spans():
            yield self.at(begin, end)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First window, and the one after the last, of every batch; batches may get smaller on the way."""
        begin = 0
        while begin < len(self._tokens):
            end = begin + self._size_at(begin)
            yield begin, end
            begin = end

    def at(self, begin: int, end: int) -> Tensor:
        """The hidden states of some windows on the device."""
        self._model.know_calls(self._tokens[begin:end])
        return self._states[begin:end].to(self._model.device, self._dtype, non_blocking=True)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def seqlen(self) -> int:
        """Tokens in a window."""
        return self._tokens.shape[1]

    @property
    def width(self) -> int:
        """Entries of a hidden state."""
        return self._states.shape[-1]

    def take(self, numbers: Sequence[int]) -> Tensor:
        """The hidden states of the windows of these numbers on the device."""
        rows = torch.as_tensor(numbers)
        self._model.know_calls(self._tokens[rows])
        picked = self._states[rows.to(self._states.device, non_blocking=True)]
        return picked.to(self._model.device, self._dtype, non_blocking=True)

    def _size_at(self, begin: int) -> int:
        """Size of the batch that begins at a window."""
        for size in self.sizes:
            if begin == 0:
                return size
            begin -= size
        raise IndexError(begin)

    def rechunk(self, sizes: list[int]) -> None:
        """Forward that many windows at a time from now on.

        Args:
            sizes: one number per batch, the number of windows in all.
        """
        if sum(sizes) != len(self._tokens):
            raise ValueError(f"{sum(sizes)} windows in batches, {len(self._tokens)} in all")
        self.sizes = list(sizes)

    def relieve(self, begin: int = 0) -> str | None:
        """Take the next measure that needs less device memory, and say which; None when there is none left.

        Args:
            begin: windows before this one have been forwarded and keep their batches.
        """
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._states is not None and self.place == "device":
            self.place = "host"
            self._states = self._empty(tuple(self._states.shape), self._states.dtype).copy_(self._states)
            measure = "hidden states in host memory"
        else:
            size = self._size_at(begin)
            if size == 1:
                return None
            before = [last - first for first, last in self.spans() if first < begin]
            self.sizes = before + _even(len(self._tokens) - begin, size // 2)
            measure = f"{size // 2} windows at a time"
        self.measures.append(measure)
        return measure

    def relieve_or_raise(self, begin: int = 0) -> None:
        """`relieve`, where there must be a next measure.

        Raises:
            torch.OutOfMemoryError: there is none.
        """
        if self.relieve(begin) is None:
            raise torch.OutOfMemoryError("one window at a time with its hidden states in host memory is still too much")

    def advance(
        self,
        model: BlockModel,
        index: int,
        block: nn.Module,
        output_of: Callable[[int, int, Callable[[], Tensor]], Tensor] = lambda begin, end, run: run(),
    ) -> None:
        """Replace the hidden states by the block's output.

        Args:
            model: the model.
            index: the block's.
            block: on the device.
            output_of: the output for the windows from `begin` to `end`, which `run` computes.

        Raises:
            UserError: the output has NaN or infinite entries.
            torch.OutOfMemoryError: not even one window can be forwarded.
        """
        bad = torch.zeros((), dtype=torch.int64, device=model.device)
        dtype, begin = self._dtype, 0
        while begin < len(self._tokens):
            end = begin + self._size_at(begin)
            try:
                run = partial(self._forward, model, index, block, begin, end)
                output = output_of(begin, end, run)
            except torch.OutOfMemoryError:
                output = None
            if output is None:
                self.relieve_or_raise(begin)
                continue
            bad += (~torch.isfinite(output)).sum()
            self._keep(begin, end, output)
            dtype, begin = output.dtype, end
        self._dtype = dtype
        if int(bad):
            raise UserError(
                f"{model.name(index)} produces {int(bad)} NaN or infinite activations: check the checkpoint, or use "
                "another dtype (dtype=bfloat16 or dtype=float32 where float16 overflows)"
            )

    def _forward(self, model: BlockModel, index: int, block: nn.Module, begin: int, end: int) -> Tensor:
        return model.forward_block(index, block, self.at(begin, end))

    def _keep(self, begin: int, end: int, output: Tensor) -> None:
        wide = torch.promote_types(self._states.dtype, output.dtype)
        if wide != self._states.dtype:  # a block may answer in another precision than it was asked in
            self._states = self._empty(tuple(self._states.shape), wide).copy_(self._states)
        self._states[begin:end].copy_(output)


def _even(windows: int, size: int) -> list[int]:
    return [min(size, windows - begin) for begin in range(0, windows, size)]


def choose_place(device: torch.device, size: int, room: float | None = None, sharers: int = 1) -> str:
    """The device while they take at most a quarter of what is free there, and no more than `room`; then the host, where
    all sharers together take half of what is free; then the disk."""
    if device.type == "cuda" and size <= min(0.25 * free_device(device), room if room is not None else size):
        return "device"
    return "host" if sharers * size <= 0.5 * free_host() else "disk"


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """A tensor in a memory-mapped file that has no name any more: it is gone with the process, however that ends.

    Raises:
        OSError: no room; the file is given all its blocks at once, since a full disk ends the process otherwise.
    """
    descriptor, name = tempfile.mkstemp(prefix=".hidden-", dir=folder)
    try:
        elements = int(torch.Size(shape).numel())
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, elements * dtype.itemsize)
        return torch.from_file(name, shared=True, size=elements, dtype=dtype).view(shape)
    finally:
        os.close(descriptor)
        os.unlink(name)
