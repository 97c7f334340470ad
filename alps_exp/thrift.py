"""What a run does when the device's memory does not suffice: the same work in smaller pieces, the same to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .errors import UserError
from .hidden import HiddenStates

_ADVICE = "use shorter windows (seqlen), leave the widest layers dense (layers.exclude=[...]), or a larger device"


@dataclass
class Thrift:
    """Measures taken so far; they stay in force for the rest of the run, and when it is resumed.

    Attributes:
        place: where the hidden states were moved to.
        sizes: windows of each forward, once they were reduced.
        statistics_on_host: statistics wait in host memory until their layers are solved.
        one_by_one: layers that share an input are solved one after the other.
        passes: into how many passes over the windows the layers of a block are divided.
        notes: what was done where, in words.
    """

    place: str | None = None
    sizes: list[int] = field(default_factory=list)
    statistics_on_host: bool = False
    one_by_one: bool = False
    passes: int = 1
    notes: list[str] = field(default_factory=list)

    def for_statistics(self, where: str, hidden: HiddenStates, layers: int) -> None:
        """The next measure after collecting a block's statistics failed.

        Args:
            where: the block's name.
            hidden: the hidden states, which give way first.
            layers: how many layers are collected.

        Raises:
            UserError: there is none left.
        """
        measure = hidden.relieve()
        if measure is None and self.passes < layers:
            self.passes = min(2 * self.passes, layers)
            self.statistics_on_host = True
            measure = f"statistics in {self.passes} passes"
        self._note(where, measure, hidden)

    def for_solving(self, where: str, hidden: HiddenStates | None, layers: int) -> None:
        """The next measure after solving `layers` layers together failed.

        Raises:
            UserError: there is none left.
        """
        measure = None
        if not self.statistics_on_host:
            self.statistics_on_host = True
            measure = "statistics in host memory until they are needed"
        elif hidden is not None and hidden.place == "device":
            measure = hidden.relieve()
        elif layers > 1 and not self.one_by_one:
            self.one_by_one = True
            measure = "layers with the same input one by one"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._note(where, measure, hidden)

    def take_over(self, where: str, hidden: HiddenStates) -> bool:
        """Account for the measures that the hidden states took by themselves; whether there were any."""
        measures, hidden.measures[:] = list(hidden.measures), []
        for measure in measures:
            self._note(where, measure, hidden)
        return bool(measures)

    def _note(self, where: str, measure: str | None, hidden: HiddenStates | None) -> None:
        if measure is None:
            raise UserError(f"{where}: the device's memory does not suffice for the smallest piece of work: {_ADVICE}")
        if hidden is not None:
            hidden.measures.clear()
            self.place, self.sizes = hidden.place, list(hidden.sizes)
        self.notes.append(f"device memory ran short at {where}; from there on: {measure}")


@contextmanager
def naming_the_step(where: str) -> Iterator[None]:
    """One line for the user when a step that has no smaller form left runs out of device memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{where}: the device's memory does not suffice ({error}): {_ADVICE}") from None
