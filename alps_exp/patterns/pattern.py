"""What a sparsity pattern is: a set of allowed supports.

A pattern answers one question, `keep(score)`: which entries survive. Counts are exact. Ties keep the entry that comes
first in row-major order (but see `separable`), so a result depends on nothing but the scores.

A pattern is one class, which also says how it is written, and one yaml in conf/sparsity that names the class. Modules
of patterns import torch inside their methods only: the command line reads what is written without it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from ..base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from .tracker import Tracker

Scope = Literal["layer", "row", "block"]

# What stands in file names for the signs that patterns are written with; `written.of_slug` reads it back.
WORDS = {":": "of", "@": "at", ">": "over", "=": ""}


class Pattern(ABC):
    """A set of allowed supports of a weight (out, in). A frozen dataclass of a few numbers.

    Class attributes:
        kind: the name of its yaml, by which a solver says that it can keep the pattern.
        rank: where tables list the kind, lowest first.
        separable: whether of equal entries the first stays, all over; a pattern that chooses by sums of entries says
            itself which of equal choices it takes.
        across: whether entries of different output rows compete, whatever the method's scope.
    """

    kind: ClassVar[str]
    rank: ClassVar[int] = 9
    separable: ClassVar[bool] = True
    across: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Pattern | None:
        """The pattern that a text such as "0.7" or "2:4" means; None if the text is of another form.

        Raises:
            UserError: of this form, with numbers that are not allowed.
        """

    @property
    @abstractmethod
    def written(self) -> str:
        """The text from which `parse` makes this pattern."""

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Fraction of zeros that the pattern asks for."""

    @abstractmethod
    def keep(self, score: Tensor, scope: Scope = "layer") -> Tensor:
        """Mask of the entries with the largest scores.

        Args:
            score: (out, in), any real dtype, no NaN. A block of columns of a layer is passed as its own matrix.
            scope: the selection group where the pattern leaves it open: "layer" and "block" compare all entries of
                `score` (they round differently), "row" those of one output row.

        Returns:
            (out, in) bool, True where kept.

        Raises:
            UserError: the shape does not divide into the pattern's groups.
        """

    def keep_each(self, scores: Tensor, scope: Scope = "layer") -> Tensor:
        """The same for several matrices.

        Args:
            scores: (matrices, out, in).
            scope: as of `keep`.
        """
        import torch

        return torch.stack([self.keep(score, scope) for score in scores])

    @property
    def group(self) -> int | None:
        """Width of the groups of consecutive inputs within which entries compete; None when the solver may choose."""
        return None

    @property
    def swaps(self) -> int | None:
        """Width of the groups of consecutive inputs within which a row may exchange a kept weight for a pruned one."""
        return self.group

    def selected(self, selection: str) -> str:
        """The set of weights that compete, as a record states it.

        Args:
            selection: the method's, where the pattern leaves it open.
        """
        return f"group of {self.group}" if self.group else selection

    @property
    def slug(self) -> str:
        """The pattern as a word that is safe in file names and identifiers."""
        text = self.written
        for sign, word in WORDS.items():
            text = text.replace(sign, word)
        return re.sub(r"[^A-Za-z0-9._]+", "-", text)

    @property
    def note(self) -> str | None:
        """What a table's footnote says of it; None where what is written says all."""
        return None

    def holds(self, support: Tensor) -> bool:
        """Whether a mask (out, in) has no more entries than the pattern allows, at places that it allows."""
        import torch

        return not bool((support & ~self.keep(support.to(torch.uint8))).any())

    @property
    def order(self) -> tuple:
        """Sorts patterns as tables list them: by kind, then by zeros."""
        return self.rank, self.sparsity, self.written

    def tracker(self) -> Tracker:
        """A cheaper `keep` (scope "layer") for the iterates of one layer, whose supports are not a result."""
        from .tracker import Tracker

        return Tracker(self)

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Why a weight (out, in) of this shape cannot hold the pattern; None when it can."""
        return None

    def check(self, shape: tuple[int, int], name: str = "the layer") -> None:
        """Raise UserError if a weight (out, in) of this shape cannot hold the pattern."""
        if (why := self.misfit(shape)) is not None:
            raise UserError(f"sparsity {self.written} does not fit {name}: {why}, or exclude it (layers.exclude=[...])")

    def __str__(self) -> str:
        return self.written
