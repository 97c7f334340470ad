"""How sparse each layer becomes, where the run's sparsity is the mean over all of them.

    uniform       every layer the same
    sensitivity   one threshold over all layers for the scores f_i W_ij² d_j of `calibration.sensitivity`
    atp           an arithmetic progression over depth (Huang et al. 2025): later blocks are sparser
    owl           blocks with more outliers keep more (Yin et al. 2024)
    spectral      blocks whose spectra have heavier tails keep more (AlphaPruning, Lu et al. 2024)
    loss          one threshold over all layers for a weight's share in its layer's output
    file          levels from a file

All keep the mean over the pruned weights to a weight, and stay within `cap` of the run's sparsity.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from ..base.checks import local_path, one_of, require
from ..base.errors import UserError
from ..base.files import file_sha256
from ..base.resources import built
from ..calibration.sensitivity import Sensitivity
from ..patterns import Pattern, Unstructured


@dataclass(frozen=True)
class Allocation(ABC):
    """Base of the allocations.

    Class attributes:
        needs: "nothing", "weights" (`Sensitivity.exponents`; the field `tail` is their share of the spectrum), "inputs"
            (`Sensitivity.scores` without f) or "gradients" (`Sensitivity.scores` with f).
    """

    needs: ClassVar[str] = "nothing"

    @abstractmethod
    def levels(self, sizes: Mapping[str, int], target: float, sensitivity: Sensitivity) -> dict[str, float]:
        """Fraction of zeros for each layer, as the rule has it: the mean and the bounds are seen to afterwards.

        Args:
            sizes: layer name → number of weights, in the model's order.
            target: fraction of zeros over all of them.
            sensitivity: what the dense model's passes have told, as far as `needs` asks for it.
        """

    @property
    def bound(self) -> float:
        """How far a layer's level may be from the target."""
        return getattr(self, "cap", 1.0)

    def digests(self) -> dict[str, str]:
        """What of the files that the allocation reads decides about results, by name."""
        return {}

    @staticmethod
    def target_of(patterns: Mapping[str, Pattern]) -> Unstructured | None:
        """The sparsity to divide: the unstructured one that most of these layers have. All others stay as asked."""
        kinds = [pattern for pattern in patterns.values() if isinstance(pattern, Unstructured)]
        return max(dict.fromkeys(kinds), key=kinds.count) if kinds else None

    def allocate(self, patterns: Mapping[str, Pattern], sizes: Mapping[str, int], sensitivity: Sensitivity):
        """Patterns in place of the unstructured ones that stand for the run's sparsity.

        Args:
            patterns: layer name → pattern, of layers without a sparsity of their own.
            sizes: layer name → number of weights.
            sensitivity: as in `levels`.
        """
        if (target := self.target_of(patterns)) is None:
            return patterns
        chosen = {name: sizes[name] for name, pattern in patterns.items() if pattern == target}
        raw = self.levels(chosen, target.level, sensitivity)
        found = exact_levels(raw, chosen, target.level, self.bound)
        return {**patterns, **{name: Unstructured(level) for name, level in found.items()}}


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every layer the same."""

    def levels(self, sizes: Mapping[str, int], target: float, sensitivity: Sensitivity) -> dict[str, float]:
        return dict.fromkeys(sizes, target)

    def allocate(self, patterns: Mapping[str, Pattern], sizes: Mapping[str, int], sensitivity: Sensitivity):
        return patterns


@dataclass(frozen=True)
class BySensitivity(Allocation):
    """One threshold over all layers for f_i W_ij² d_j.

    Attributes:
        cap: how far a layer's level may be from the run's sparsity.
    """

    needs: ClassVar[str] = "gradients"

    cap: float = 0.15

    def __post_init__(self) -> None:
        require("allocation.cap", self.cap, float, 0, 1)

    def levels(self, sizes: Mapping[str, int], target: float, sensitivity: Sensitivity) -> dict[str, float]:
        return _below_one_threshold(sensitivity.counts, sizes, target)


@dataclass(frozen=True)
class ByLoss(Allocation):
    """One threshold over all layers for W_ij² d_j / Σ W² d: what a weight's removal adds to its layer's relative loss,
    by the diagonal of the Gram matrix.

    Attributes:
        cap: how far a layer's level may be from the run's sparsity.
    """

    needs: ClassVar[str] = "inputs"

    cap: float = 0.15

    def __post_init__(self) -> None:
        require("allocation.cap", self.cap, float, 0, 1)

    def levels(self, sizes: Mapping[str, int], target: float, sensitivity: Sensitivity) -> dict[str, float]:
        return _below_one_threshold(sensitivity.relative, sizes, target)


@dataclass(frozen=True)
class BySpectrum(Allocation):
    """Levels by a straight line from the smallest exponent of a power law in the spectrum to the largest: heavier tails
    keep more.

    Attributes:
        per: "block" (the mean exponent of its layers, as the paper has it) or "layer".
        tail: share of the eigenvalues that the exponent is estimated from.
        cap: half of what the levels may be apart.
    """

    needs: ClassVar[str] = "weights"

    per: str = "block"
    tail: float = 0.5
    cap: float = 0.15

    def __post_init__(self) -> None:
        one_of("allocation.per", self.per, ("block", "layer"))
        require("allocation.tail", self.tail, float, 0, 1, open_low=True)
        require("allocation.cap", self.cap, float, 0, 1)

    def levels(self, sizes: Mapping[str, int], target: float, sensitivity: Sensitivity) -> dict[str, float]:
        found = {name: float(sensitivity.exponents[name]) for name in sizes}
        if self.per == "block":
            blocks = {index: names_in(sizes, index) for index in map(block_of, sizes)}
            means = {index: sum(found[name] for name in names) / len(names) for index, names in blocks.items()}
            found = {name: means[block_of(name)] for name in sizes}
        low, high = min(found.values()), max(found.values())
        middle, half = (low + high) / 2, (high - low) / 2
        return {name: target + (self.cap * (value - middle) / half if half else 0) for name, value in found.items()}


@dataclass(frozen=True)
class Progression(Allocation):
    """An arithmetic progression over the blocks.

    Attributes:
        step: by how much each block is sparser than the one before it.
        cap: how far a layer's level may be from the run's sparsity.
    """

    step: float = 0.004
    cap: float = 0.3

    def __post_init__(self) -> None:
        require("allocation.step", self.step, float, -1, 1)
        require("allocation.cap", self.cap, float, 0, 1)

    def levels(self, sizes: Mapping[str, int], target: float, sensitivity: Sensitivity) -> dict[str, float]:
        blocks = {name: block_of(name) for name in sizes}
        middle = (min(blocks.values()) + max(blocks.values())) / 2
        return {name: target + self.step * (index - middle) for name, index in blocks.items()}


@dataclass(frozen=True)
class ByOutliers(Allocation):
    """Blocks with a larger share of outliers among |W_ij| ‖X_j‖ keep more.

    Attributes:
        outlier: times the block's mean from which a score is an outlier.
        spread: λ, half of what the levels of the blocks may be apart.
        cap: how far a layer's level may be from the run's sparsity.
    """

    needs: ClassVar[str] = "inputs"

    outlier: float = 5.0
    spread: float = 0.08
    cap: float = 0.3

    def __post_init__(self) -> None:
        require("allocation.outlier", self.outlier, float, 1, 1e6)
        require("allocation.spread", self.spread, float, 0, 0.5)
        require("allocation.cap", self.cap, float, 0, 1)

    def levels(self, sizes: Mapping[str, int], target: float, sensitivity: Sensitivity) -> dict[str, float]:
        blocks = sorted({block_of(name) for name in sizes})
        share = torch.tensor([sensitivity.outliers(names_in(sizes, index), self.outlier) for index in blocks])
        width = float(share.max() - share.min())
        spread = (share - share.min()) * (2 * self.spread / width) if width > 0 else torch.zeros_like(share)
        levels = dict(zip(blocks, (target - (spread - spread.mean())).tolist(), strict=True))
        return {name: levels[block_of(name)] for name in sizes}


@dataclass(frozen=True)
class FromFile(Allocation):
    """Levels by layer from a JSON file.

    Attributes:
        path: a file {"layer": fraction of zeros, …}, or a record.json, whose layers' sparsities are taken.
    """

    path: str | None = None

    def __post_init__(self) -> None:
        if self.path is None:
            raise UserError("allocation=file needs allocation.path=FILE: layer names and their fractions of zeros")
        local_path("allocation.path", self.path)

    def digests(self) -> dict[str, str]:
        return {"allocation": file_sha256(local_path("allocation.path", self.path))[:16]}

    def levels(self, sizes: Mapping[str, int], target: float, sensitivity: Sensitivity) -> dict[str, float]:
        file = Path(self.path).expanduser()
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"allocation.path={self.path} cannot be read as JSON ({error})") from None
        rows = value.get("layers") if isinstance(value, dict) else None
        found = {row["name"]: row["sparsity_target"] for row in rows} if isinstance(rows, list) else value
        for name in sizes:
            level = found.get(name) if isinstance(found, dict) else None
            if not isinstance(level, (int, float)) or not 0 < level < 1:
                raise UserError(f"{self.path} gives {name} no fraction of zeros above 0 and below 1: give all layers")
        mean = sum(found[name] * size for name, size in sizes.items()) / sum(sizes.values())
        if abs(mean - target) > 1e-3:
            raise UserError(
                f"{self.path} has a mean of {mean:.4f}, and sparsity={target:g} is asked: give sparsity={mean:.4f}"
            )
        return {name: float(found[name]) for name in sizes}


def _below_one_threshold(
    counts: Callable[[str], torch.Tensor], sizes: Mapping[str, int], target: float
) -> dict[str, float]:
    """Share of each layer's weights that lie below one score for all, so that of all together the target does."""
    total = sum(counts(name) for name in sizes).cumsum(0)  # one after the other: a mixture has thousands
    wanted = target * sum(sizes.values())
    bin_ = int(torch.searchsorted(total, torch.tensor(int(wanted))))
    return {name: int(counts(name)[: bin_ + 1].sum()) / size for name, size in sizes.items()}


def build_allocation(node: Mapping) -> Allocation:
    """The allocation that a composed `allocation` node describes (`_target_`, `name`, one key per field).

    Raises:
        UserError: a class that is no allocation, an unknown field, or a value that is not allowed.
    """
    return built(node, Allocation, "allocation")


def exact_levels(raw: Mapping[str, float], sizes: Mapping[str, int], target: float, bound: float) -> dict[str, float]:
    """Levels within `bound` of the target whose mean over all weights is the target to a weight.

    The raw levels are moved together until the mean of what is left after clamping is right; the last weights go to the
    layers whose rounding has cost them most.

    Args:
        raw: layer name → fraction of zeros.
        sizes: layer name → number of weights.
        target: fraction of zeros over all of them.
        bound: how far from the target a layer may be.
    """
    names, total = list(raw), sum(sizes.values())
    wanted = total - round((1 - target) * total)
    size = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
    level = torch.tensor([raw[name] for name in names], dtype=torch.float64)
    least, most = 1 / size, 1 - 1 / size
    low = torch.maximum(least, torch.full_like(size, target - bound))
    high = torch.minimum(most, torch.full_like(size, target + bound))
    begin, end = min(-2.0, float((low - level).min())), max(2.0, float((high - level).max()))
    for _ in range(200):
        shift = (begin + end) / 2
        if float(((level + shift).clamp(low, high) * size).sum()) < wanted:
            begin = shift
        else:
            end = shift
    exact = (level + end).clamp(low, high) * size
    zeros = exact.floor().clamp_min(1)
    for place in (exact - zeros).argsort(descending=True)[: max(int(wanted - zeros.sum()), 0)].tolist():
        zeros[place] += 1
    return {name: round(float(z / n), 10) for name, z, n in zip(names, zeros, size, strict=True)}


def block_of(name: str) -> int:
    """Index of the block that a layer is in."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def names_in(sizes: Mapping[str, int], block: int) -> list[str]:
    """Names of the layers in a block."""
    return [name for name in sizes if block_of(name) == block]
