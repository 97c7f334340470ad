"""Supports of successive iterates under patterns of two levels: in one pass on a GPU, otherwise by their own rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from .tracker import Keeps, Step, Tracker

# Entries of a program of `tile_kernels.shared_step`, and widths of groups that `nested_step` takes.
_SHARED, _WIDTHS = 4096, (2, 4, 8, 16)


class HierarchicalTracker(Tracker):
    """N:M of N:M."""

    kernel = "nested_step"

    def __init__(self, pattern: Keeps, outer: tuple[int, int], inner: tuple[int, int]) -> None:
        super().__init__(pattern)
        self._outer, self._inner = outer, inner
        self.fast = outer[1] in _WIDTHS and inner[1] in _WIDTHS

    def step(self, device: torch.device, heights: Sequence[int]) -> Step | None:
        if not self.fast:
            return None
        from ..numerics import tile_kernels

        return partial(tile_kernels.nested_step, outer=self._outer, inner=self._inner)


class VNMTracker(Tracker):
    """V:N:M, whose choices of shared inputs are tried one after the other."""

    kernel = "shared_step"

    def __init__(self, pattern: Keeps, rows: int, kept: int, width: int, choices: Sequence[tuple[int, ...]]) -> None:
        super().__init__(pattern)
        self._sizes, self._choices = {"rows": rows, "kept": kept, "width": width}, choices
        self.fast = (1 << (rows - 1).bit_length()) * (1 << (width - 1).bit_length()) <= _SHARED

    def step(self, device: torch.device, heights: Sequence[int]) -> Step | None:
        if not self.fast:
            return None
        from ..numerics import tile_kernels

        choices = torch.tensor([sum(1 << place for place in choice) for choice in self._choices])
        return partial(tile_kernels.shared_step, choices=choices.int().to(device), **self._sizes)
