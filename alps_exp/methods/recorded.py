"""Iterations of ADMM as CUDA graphs, for layers so small that launching a kernel takes longer than the kernel.

Blocks of a model have layers of the same shapes, and what ADMM does between two updates of ρ is the same for all of
them but for the numbers in memory. It is recorded once, at the second solve of some shapes, and replayed in later ones.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import get_ident
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor

from ..numerics.graphs import recorded, stream_of
from ..numerics.resolvent import Resolvent

# Entries of the weights and of the Gram matrices from which on kernels take longer than launches.
_SMALL = 1 << 22
# Recordings that are kept, and shapes that are remembered: those that came last.
_KEPT, _SEEN = 4, 64
# The state that kernels change, and what they read of a layer.
_STATE = ("w", "target", "support", "remembered")


class Iterated(Protocol):
    """What is asked of ADMM's state (`alps._Stack`)."""

    _step: Callable
    w: Tensor
    b: Tensor
    rho: float
    resolvent: Resolvent
    layers: list

    @property
    def description(self) -> tuple: ...

    def step(self) -> None: ...

    def changes(self) -> Tensor: ...

    def counters(self) -> list[Tensor] | None: ...

    def repeated(self, b: Tensor, iterations: int) -> None: ...


class Recording:
    """What ADMM does from one update of ρ to the next, for all values of ρ in turn.

    Args:
        stack: the first layers that it is made for, before their first iteration.
        every: iterations between updates of ρ.
    """

    def __init__(self, stack: Iterated, every: int) -> None:
        self._own = copy.copy(stack)
        self._own.layers = [SimpleNamespace(rows=layer.rows) for layer in stack.layers]  # without their problems
        self._own.resolvent = stack.resolvent.untimed()
        self._every = every
        self._out = torch.empty_like(stack.w)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._changes: list[Tensor] = []
        self._stream = stream_of(get_ident(), stack.w.device)
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):  # libraries take their working memory, which no graph may own
            for dtype in (torch.float32, torch.bfloat16):
                made = torch.zeros(16, 16, dtype=dtype, device=stack.w.device)
                torch.mm(made, made)
        torch.cuda.synchronize(stack.w.device)

    def take_over(self, stack: Iterated) -> None:
        """Work on these layers from now on, whose iterations have not begun; the stack's state is this one's."""
        own = self._own
        for name in _STATE:
            getattr(own, name).copy_(getattr(stack, name))
            setattr(stack, name, getattr(own, name))
        for kept, given in zip(own.counters(), stack.counters(), strict=True):
            kept.copy_(given)
        stack._step = own._step  # which has the counters that the graphs go on with
        for kept, given in zip(own.resolvent.basis(own.rho), stack.resolvent.basis(stack.rho), strict=True):
            kept.copy_(given)

    def advance(self, stack: Iterated, number: int) -> Tensor:
        """The iterations before the next update of ρ; returns the stack's `changes`.

        Args:
            stack: the layers that were taken over.
            number: how many updates there were.
        """
        if number == len(self._graphs):
            self._record(stack.rho)
        self._graphs[number].replay()
        stack.repeated(self._out, self._every)
        return self._changes[number]

    def _record(self, rho: float) -> None:
        graph, self._own.rho = torch.cuda.CUDAGraph(), rho
        torch.cuda.synchronize(self._out.device)
        try:
            with torch.cuda.stream(self._stream), recorded(graph, self._pool):
                for _ in range(self._every):
                    self._own.step()
                self._out.copy_(self._own.b)
                changes = self._own.changes()
        except BaseException:  # for want of memory: what comes next must not go on from here
            forget()
            raise
        self._graphs.append(graph)
        self._changes.append(changes)


_recordings: OrderedDict[Hashable, Recording] = OrderedDict()
_seen: OrderedDict[Hashable, None] = OrderedDict()


def recording_for(stack: Iterated, growth: float, every: int) -> Recording | None:
    """The recording to solve these layers with, which takes them over; None for layers that are large, that had no
    equals before, or whose iterations are not all kernels.

    Args:
        stack: the layers, before their first iteration.
        growth: of ρ.
        every: iterations between updates of ρ.
    """
    largest = max(stack.w.numel(), stack.resolvent.size)
    if growth == 1 or largest > _SMALL or stack.counters() is None:
        return None
    key = (get_ident(), stack.description, growth, every)  # a thread's own, since the state is shared
    found = _recordings.get(key)
    if found is None:
        if key not in _seen:
            _seen[key] = None
            while len(_seen) > _SEEN:
                _seen.popitem(last=False)
            return None
        found = _recordings[key] = Recording(stack, every)
        while len(_recordings) > _KEPT:
            _recordings.popitem(last=False)
    else:
        _recordings.move_to_end(key)
        found.take_over(stack)
    return found


def kept() -> int:
    """How many recordings there are."""
    return len(_recordings)


def forget() -> None:
    """Give back the memory that this thread's recordings hold, and know no shapes any more."""
    for known in (_recordings, _seen):
        for key in [key for key in known if key[0] == get_ident()]:
            known.pop(key, None)
