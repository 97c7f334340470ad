"""Supports of successive iterates under patterns of two levels: in one pass on a GPU, otherwise by their own rule."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from .tracker import Step, Tracker

if TYPE_CHECKING:
    from .nested import VNM, Hierarchical

# Entries of a program of `tile_kernels.shared_step`, and widths of groups that `nested_step` takes.
_SHARED, _WIDTHS = 4096, (2, 4, 8, 16)


class HierarchicalTracker(Tracker):
    """N:M of N:M."""

    def __init__(self, pattern: Hierarchical) -> None:
        super().__init__(pattern)
        self._outer, self._inner = (pattern.outer_kept, pattern.outer_width), (pattern.kept, pattern.width)
        self.fast = pattern.outer_width in _WIDTHS and pattern.width in _WIDTHS

    def step(self, device: torch.device) -> Step | None:
        if not self.fast:
            return None
        from ..numerics import tile_kernels

        return partial(tile_kernels.nested_step, outer=self._outer, inner=self._inner)


class VNMTracker(Tracker):
    """V:N:M, whose choices of shared inputs are tried one after the other."""

    def __init__(self, pattern: VNM) -> None:
        super().__init__(pattern)
        self._vnm = pattern
        self.fast = (1 << (pattern.rows - 1).bit_length()) * (1 << (pattern.width - 1).bit_length()) <= _SHARED

    def step(self, device: torch.device) -> Step | None:
        if not self.fast:
            return None
        from ..numerics import tile_kernels

        choices = torch.tensor([sum(1 << place for place in choice) for choice in self._vnm.choices])
        sizes = {"rows": self._vnm.rows, "kept": self._vnm.kept, "width": self._vnm.width}
        return partial(tile_kernels.shared_step, choices=choices.int().to(device), **sizes)
