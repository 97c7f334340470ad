"""Supports of the successive iterates of one layer, which need not have exactly the pattern's count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Keeps(Protocol):
    """What is tracked of a pattern."""

    @property
    def sparsity(self) -> float: ...

    def keep(self, score: Tensor) -> Tensor: ...


# b, target, support, scale, rho, change
Step = Callable[[Tensor, Tensor, Tensor, float, float, Tensor], None]


class Tracker:
    """Selects the supports of a layer's successive iterates.

    Attributes:
        group: (N, M) where the rule is no more than the N largest of every M consecutive entries, the first among
            equals, so that a caller may apply it in a pass of its own.
        fast: whether there is a kernel for the rule; otherwise the pattern selects by itself.
        kernel: name of the kernel that `step` calls (`numerics.kernels.PROBES`).
    """

    kernel: str | None = None

    def __init__(self, pattern: Keeps, group: tuple[int, int] | None = None) -> None:
        self._pattern = pattern
        self.group = group
        self.fast = group is not None and group[1] in (2, 4, 8, 16)

    def __call__(self, score: Tensor) -> Tensor:
        """Mask of the entries to keep, of the pattern's count or nearly so."""
        return self._pattern.keep(score)

    def step(self, device: torch.device, heights: Sequence[int]) -> Step | None:
        """Where the rule has a kernel of its own: the pass that selects and updates (`triton_kernels.threshold_step`)
        for layers of this pattern that lie one below the other. To be asked for where `kernel` runs.

        Args:
            heights: outputs of each of these layers.
        """
        return None

    def stride(self, score: Tensor) -> int | None:
        """Where the rule may be a threshold from a sample: every how many entries one is taken; otherwise None."""
        return None


class ThresholdTracker(Tracker):
    """Selects about the right number of largest entries of a slowly changing score, by a quantile of a fixed sample.

    The sampling error is corrected from call to call by the number that the last threshold kept, all on the device, so
    that after a few calls the counts are off by a few entries only. That matters: iterating with 0.8 % more entries
    than the result may have was seen to cost 13 % in loss.
    """

    def __init__(self, pattern: Keeps) -> None:
        super().__init__(pattern)
        self.fast = True
        self._drift: Tensor | None = None

    def stride(self, score: Tensor) -> int | None:
        size = score.numel()
        if size < 1 << 16 or not 0 < self.count(size) < size:
            return None
        # An odd stride, or the sample would hold a few columns only where the width is a power of two.
        if not score.is_cuda:
            return size >> 14 | 1
        # Of small layers no more than a kernel selects from by itself (`triton_kernels.SELECTED`): launches, not
        # entries, take the time there.
        return size >> 18 | 1 if size >= 1 << 22 else -(-size >> 14) | 1

    @property
    def sparsity(self) -> float:
        """Share of the entries that are not kept."""
        return self._pattern.sparsity

    def __call__(self, score: Tensor) -> Tensor:
        stride = self.stride(score)
        if stride is None:
            return self._pattern.keep(score)
        mask = score >= self.threshold(score.reshape(-1)[::stride])
        self.observe(mask.count_nonzero(), score.numel(), stride)
        return mask

    def threshold(self, sample: Tensor) -> Tensor:
        """0-dim: scores from here on are to be kept. To be followed by `observe`.

        Args:
            sample: every `stride`-th score.
        """
        if self._drift is None:
            self._drift = torch.zeros((), dtype=torch.float64, device=sample.device)
        rank = (self._pattern.sparsity * len(sample) + self._drift).clamp_(0, len(sample) - 1)
        # The rank stays on a GPU, which sorts as fast as it selects; a CPU has nothing to wait for and selects faster.
        if sample.is_cuda:
            return sample.sort().values.index_select(0, rank.long().view(1)).view(())
        return sample.kthvalue(int(rank) + 1).values

    def observe(self, kept: Tensor, size: int, stride: int) -> None:
        """Learn how many of `size` scores the last threshold kept (0-dim)."""
        self._drift += (kept - self.count(size)) / stride

    def count(self, size: int) -> int:
        """How many of `size` entries are to be kept."""
        return round((1 - self._pattern.sparsity) * size)
