"""N:M sparsity, written 2:4: groups of consecutive inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..base.errors import UserError
from .pattern import Pattern, Scope
from .tiles import fitting

if TYPE_CHECKING:
    from torch import Tensor

    from .tracker import Tracker


@dataclass(frozen=True)
class NM(Pattern):
    """At most `kept` of every `width` consecutive inputs of an output row (SparseGPT's and Wanda's codes count the
    removed ones instead, ALPS's the kept ones; the two readings agree on 2:4 and 4:8 only)."""

    kind: ClassVar[str] = "nm"
    rank: ClassVar[int] = 1

    kept: int
    width: int

    def __post_init__(self) -> None:
        for name in ("kept", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"sparsity.{name}={value!r} is not allowed: give a whole number")
        if not 0 < self.kept < self.width:
            raise UserError(
                f"sparsity {self.kept}:{self.width} is not allowed: N:M keeps N of every M consecutive weights, "
                "with 0 < N < M, as in 2:4"
            )

    @classmethod
    def parse(cls, text: str) -> NM | None:
        match = re.fullmatch(r"(\d+):(\d+)", text)
        return cls(int(match[1]), int(match[2])) if match else None

    @property
    def written(self) -> str:
        return f"{self.kept}:{self.width}"

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.width

    @property
    def group(self) -> int:
        return self.width

    @property
    def note(self) -> str:
        return "N:M: N of M consecutive inputs kept"

    @property
    def order(self) -> tuple:
        return self.rank, self.width, -self.kept

    def keep(self, score: Tensor, scope: Scope = "layer") -> Tensor:
        from .keeping import keep_per_row

        self.check(tuple(score.shape))
        return keep_per_row(score.reshape(-1, self.width), self.kept).reshape(score.shape)

    def tracker(self) -> Tracker:
        from .tracker import Tracker

        return Tracker(self, (self.kept, self.width))

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.width:
            inputs = f"its {shape[1]} inputs are not a multiple of {self.width}"
            return f"{inputs}; M that fit: {fitting(shape[1], self.width, self.kept)}"
        return None
