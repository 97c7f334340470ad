"""How sparse each layer becomes, where the run's sparsity is the mean over all of them.

    uniform       every layer the same
    sensitivity   one threshold over all layers for the scores f_i W_ij² d_j of `calibration.sensitivity`
    atp           an arithmetic progression over depth (Huang et al. 2025): later blocks are sparser
    owl           blocks with more outliers keep more (Yin et al. 2024)
    spectral      blocks whose spectra have heavier tails keep more (AlphaPruning, Lu et al. 2024)
    loss          one threshold over all layers for a weight's share in its layer's output
    file          levels from a file

All keep the mean over the pruned weights to a weight, and stay within `cap` of the run's sparsity. N:M stays as asked,
unless `choices` names a set of N (see `Allocation`).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import ClassVar

import torch

from ..base.checks import local_path, one_of, require
from ..base.errors import UserError
from ..base.files import file_sha256
from ..base.resources import built
from ..calibration.sensitivity import Sensitivity, lost
from ..patterns import NM, Pattern, Unstructured

# Entries of the table of a knapsack over layers (`cheapest`), of two bytes each.
_TABLE = 1 << 24


@dataclass(frozen=True)
class Allocation(ABC):
    """Base of the allocations.

    Class attributes:
        needs: "nothing", "weights" (`Sensitivity.exponents`; the field `tail` is their share of the spectrum), "inputs"
            (`Sensitivity.scores` without f) or "gradients" (`Sensitivity.scores` with f).

    Attributes:
        choices: the numbers N of which each layer gets one where the run's sparsity is N:M; None leaves N:M as asked.
            As many weights are kept as by the run's N:M, or as many below that as the layers' sizes let be
            (`cheapest`). The set bounds the levels, not `cap`.
    """

    needs: ClassVar[str] = "nothing"

    choices: Sequence[int] | None = field(default=None, kw_only=True)

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

    def costs(
        self, sizes: Mapping[str, int], zeros: Sequence[float], target: float, sensitivity: Sensitivity
    ) -> dict[str, list[float]]:
        """What it costs each layer to have each of some fractions of zeros, convex in them. Here the square of how far
        each is from the layer's level, times its weights.

        Args:
            zeros: fractions of zeros to choose from.
            sizes, target, sensitivity: as in `levels`.
        """
        levels = exact_levels(self.levels(sizes, target, sensitivity), sizes, target, self.bound)
        return {name: [size * (part - levels[name]) ** 2 for part in zeros] for name, size in sizes.items()}

    def target_of(self, patterns: Mapping[str, Pattern]) -> Unstructured | NM | None:
        """The sparsity to divide: the one that most of these layers have of the kind that is divided, unstructured or,
        with `choices`, N:M. All others stay as asked."""
        exactly = self.choices is not None  # 2:4T and others derive from N:M
        kinds = [
            pattern
            for pattern in patterns.values()
            if (type(pattern) is NM if exactly else isinstance(pattern, Unstructured))
        ]
        return max(dict.fromkeys(kinds), key=kinds.count) if kinds else None

    def check_choices(self, patterns: Mapping[str, Pattern]) -> None:
        """Raise UserError for `choices` that are no numbers N or that the run's sparsity cannot be the mean of.

        Args:
            patterns: layer name → pattern, of layers without a sparsity of their own.
        """
        if self.choices is None:
            return
        if isinstance(self, Uniform):
            raise UserError("allocation.choices lets N differ, and allocation=uniform gives every layer the same")
        listed = isinstance(self.choices, Sequence) and not isinstance(self.choices, str)
        given = list(self.choices) if listed else []
        text = f"allocation.choices={given if listed else self.choices}"
        if (target := self.target_of(patterns)) is None:
            asked = (
                ", ".join(dict.fromkeys(pattern.written for pattern in patterns.values())) or "no sparsity to divide"
            )
            raise UserError(f"{text} is a set of N for N:M (sparsity=2:4), and {asked} is asked: leave it out")
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < target.width for n in given)
        if not whole or len(set(given)) < 2 or len(set(given)) < len(given):
            raise UserError(
                f"{text} is not allowed: give different whole numbers from 1 to {target.width - 1}, two or more"
            )
        if not min(given) <= target.kept <= max(given):
            raise UserError(f"{text} has no mean of {target.kept}, which sparsity={target.written} asks for")

    def allocate(self, patterns: Mapping[str, Pattern], sizes: Mapping[str, int], sensitivity: Sensitivity):
        """Patterns in place of those that stand for the run's sparsity.

        Args:
            patterns: layer name → pattern, of layers without a sparsity of their own.
            sizes: layer name → number of weights.
            sensitivity: as in `levels`.
        """
        if (target := self.target_of(patterns)) is None:
            return patterns
        chosen = {name: sizes[name] for name, pattern in patterns.items() if pattern == target}
        if isinstance(target, NM):
            kept = sorted(self.choices)
            costs = self.costs(chosen, [1 - n / target.width for n in kept], target.sparsity, sensitivity)
            found = cheapest(costs, chosen, kept, target.kept * sum(chosen.values()))
            return {**patterns, **{name: NM(n, target.width) for name, n in found.items()}}
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

    def costs(
        self, sizes: Mapping[str, int], zeros: Sequence[float], target: float, sensitivity: Sensitivity
    ) -> dict[str, list[float]]:
        return {name: lost(sensitivity.counts(name), [size * part for part in zeros]) for name, size in sizes.items()}


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

    def costs(
        self, sizes: Mapping[str, int], zeros: Sequence[float], target: float, sensitivity: Sensitivity
    ) -> dict[str, list[float]]:
        return {name: lost(sensitivity.relative(name), [size * part for part in zeros]) for name, size in sizes.items()}


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


def cheapest(
    costs: Mapping[str, Sequence[float]], sizes: Mapping[str, int], kept: Sequence[int], limit: int
) -> dict[str, int]:
    """Which of some N each layer gets, so that as many weights are kept as the limit lets be, and of all such choices
    the costs' sum is least (a knapsack, layer by layer). Where that is too large to tabulate, which takes thousands of
    layers, layers step up one after the other (`in_steps`).

    Args:
        costs: layer name → cost of each of `kept`, convex.
        sizes: layer name → number of weights.
        kept: the numbers N, ascending.
        limit: most that Σ size · N may be, at least that of the least N.
    """
    more = {name: [sizes[name] * (n - kept[0]) for n in kept] for name in costs}
    unit = math.gcd(*(extra for extras in more.values() for extra in extras))
    room = (
        min(limit - kept[0] * sum(sizes[name] for name in costs), sum(extras[-1] for extras in more.values())) // unit
    )
    if len(costs) * room > _TABLE:
        return in_steps(costs, sizes, kept, limit)
    best, taken = torch.full((room + 1,), torch.inf, dtype=torch.float64), []
    best[0] = 0.0
    for name, extras in more.items():
        tried = torch.full((len(kept), room + 1), torch.inf, dtype=torch.float64)
        for row, extra, cost in zip(tried, extras, costs[name], strict=True):
            if (shift := extra // unit) <= room:
                row[shift:] = best[: room + 1 - shift] + cost
        best, choice = tried.min(0)
        taken.append(choice.to(torch.int16))
    place, found = int(best.isfinite().nonzero().max()), {}
    for name, choice in zip(reversed(more), reversed(taken), strict=True):
        found[name] = int(choice[place])
        place -= more[name][found[name]] // unit
    return {name: kept[found[name]] for name in costs}


def in_steps(
    costs: Mapping[str, Sequence[float]], sizes: Mapping[str, int], kept: Sequence[int], limit: int
) -> dict[str, int]:
    """`cheapest` but for what does not fit.

    All begin with the least N. The step to the next N that saves most per weight comes first, whatever it costs; one
    that no longer fits is passed over, with all after it in its layer. With convex costs this is the optimum for what
    is kept up to the first step that does not fit (Lagrange): the end, where layers have one size and N even spaces.
    """
    places, steps = dict.fromkeys(costs, 0), []
    left = limit - kept[0] * sum(sizes[name] for name in costs)

    def offer(order: int, name: str) -> None:
        if (place := places[name] + 1) < len(kept):
            more = sizes[name] * (kept[place] - kept[place - 1])
            heappush(steps, ((costs[name][place] - costs[name][place - 1]) / more, order, name, more))

    for order, name in enumerate(costs):
        offer(order, name)
    while steps:
        _, order, name, more = heappop(steps)
        if more <= left:
            left -= more
            places[name] += 1
            offer(order, name)
    return {name: kept[place] for name, place in places.items()}


def block_of(name: str) -> int:
    """Index of the block that a layer is in."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def names_in(sizes: Mapping[str, int], block: int) -> list[str]:
    """Names of the layers in a block."""
    return [name for name in sizes if block_of(name) == block]
