"""Copies between a GPU and ordinary host memory through page-locked buffers.

A GPU reads and writes page-locked memory several times as fast as other memory. Locking a whole block's pages would
take longer than its copy: two small buffers serve in turn, and the host's own copy runs beside the GPU's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 25  # bytes


class Staging:
    """Two buffers for copies to and from one device.

    Args:
        device: a GPU; another device's copies are plain ones.

    Attributes:
        device: it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []

    def bring(self, home: Tensor) -> Tensor:
        """A copy on the device of a tensor in host memory. The host's may change as soon as this returns."""
        if not self._serves(home):
            return home.to(self.device)
        there = torch.empty_like(home, device=self.device)
        done: list[torch.cuda.Event | None] = [None, None]
        for number, (source, target) in enumerate(zip(_chunks(home), _chunks(there), strict=True)):
            turn = number % 2
            if done[turn] is not None:
                done[turn].synchronize()
            buffer = self._buffers[turn][: len(source)]
            buffer.copy_(source)
            target.copy_(buffer, non_blocking=True)
            done[turn] = self._marked()
        for event in filter(None, done):
            event.synchronize()
        return there

    def send(self, there: Tensor, home: Tensor) -> None:
        """Copy a tensor on the device to where it lies in host memory."""
        if not self._serves(home) or there.dtype != home.dtype or not there.is_contiguous():
            home.copy_(there)
            return
        former = None  # the host copies one chunk while the device copies the next
        for number, (source, target) in enumerate(zip(_chunks(there), _chunks(home), strict=True)):
            buffer = self._buffers[number % 2][: len(source)]
            buffer.copy_(source, non_blocking=True)
            done = self._marked()
            if former is not None:
                _finish(*former)
            former = done, target, buffer
        _finish(*former)

    def _serves(self, home: Tensor) -> bool:
        large = home.device.type == "cpu" and home.nbytes >= _CHUNK // 8
        large = large and home.is_contiguous() and not home.is_pinned()
        if large and self.device.type == "cuda" and not self._buffers:
            self._buffers = [torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        return large and bool(self._buffers)

    def _marked(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Its bytes."""
    yield from tensor.detach().view(-1).view(torch.uint8).split(_CHUNK)


def _finish(done: torch.cuda.Event, target: Tensor, buffer: Tensor) -> None:
    done.synchronize()
    target.copy_(buffer)
