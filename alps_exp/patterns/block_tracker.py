"""Supports of successive iterates whose blocks stay or go as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .tracker import Keeps, Step, Tracker

# Entries of a block that a program of the kernel holds.
_LEAST, _MOST = 16, 4096


class KeepsTiles(Keeps, Protocol):
    """What is tracked of a pattern of tiles."""

    def keep_tiles(self, energy: Tensor) -> Tensor: ...


class BlockTracker(Tracker):
    """Selects blocks of so many outputs and inputs; where both are powers of two, by a kernel on a GPU."""

    def __init__(self, pattern: KeepsTiles, tile: tuple[int, int]) -> None:
        super().__init__(pattern)
        self._tile = tile
        powers = all(side & (side - 1) == 0 for side in tile) and _LEAST <= tile[0] * tile[1] <= _MOST
        self.fast, self.kernel = powers, "blocks_step" if powers else None

    def step(self, device: torch.device, heights: Sequence[int]) -> Step | None:
        if not self.fast:
            return None
        from ..numerics import tile_kernels

        parts = [height // self._tile[0] for height in heights]

        def keep(energy: Tensor) -> Tensor:  # each layer's blocks compete among themselves
            return torch.cat([self._pattern.keep_tiles(part) for part in energy.split(parts)])

        def step(*state: Tensor | float) -> None:
            tile_kernels.blocks_step(*state, tile=self._tile, keep=keep)

        return step
