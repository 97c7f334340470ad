"""Recording what a GPU is given as CUDA graphs, so that a recording that fails leaves nothing behind."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch


@contextmanager
def recorded(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> Iterator[None]:
    """What the current stream is given in here goes into the graph, and its memory comes from the pool.

    Raises:
        RuntimeError: what is done in here cannot be recorded. Later allocations and random numbers do not notice.
    """
    collecting = gc.isenabled()
    gc.disable()  # what it frees may ask the device, which nobody may meanwhile
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # which would hide what has failed
                _end(graph, pool)
            raise
        with warnings.catch_warnings():  # weights that are their own masters are not written
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty")
            _end(graph, pool)
    finally:
        if collecting:
            gc.enable()


@cache
def stream_of(thread: int, device: torch.device) -> torch.cuda.Stream:
    """One for all recordings of a thread: libraries keep working memory for every stream."""
    return torch.cuda.Stream(device)


def _end(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        _forget(torch.cuda.current_device(), pool)
        raise


def _forget(device: int, pool: tuple[int, int]) -> None:
    """What torch leaves undone when a capture fails.

    Its allocator would go on as in a capture: what is cached would not be freed when memory runs short, and the pool's
    memory never. The device's random numbers would refuse to be drawn, as outside of the capture that they are in.
    """
    _close(device, pool)
    generator = torch.cuda.default_generators[device]
    other = torch.Generator(generator.device)
    other.set_state(generator.get_state())
    generator.graphsafe_set_state(other.graphsafe_get_state())


def _close(device: int, pool: tuple[int, int]) -> None:
    """End the allocator's part of a capture, if it goes on. What does so has no public name: without it, nothing is
    done."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it was over before the capture failed, and the graph gives the pool back
        return
    except AttributeError:
        return
    torch._C._cuda_releasePool(device, pool)
