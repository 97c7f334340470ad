"""What a run does when the device's memory does not suffice: the same work in smaller pieces, the same to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..base.errors import UserError
from ..model.hidden import HiddenStates

_ADVICE = "use shorter windows (seqlen), leave the widest layers dense (layers.exclude=[...]), or a larger device"


@dataclass
class Thrift:
    """Measures taken so far; they stay in force for the rest of the run, and when it is resumed.

    Attributes:
        place: where the hidden states were moved to.
        sizes, held_out_sizes: windows of each forward, once they were reduced.
        statistics_on_host: statistics wait in host memory until their layers are solved.
        one_by_one: layers that share an input are solved one after the other.
        passes: into how many passes over the windows the layers of a block are divided.
        notes: what was done where, in words.
    """

    place: str | None = None
    sizes: list[int] = field(default_factory=list)
    held_out_sizes: list[int] = field(default_factory=list)
    statistics_on_host: bool = False
    one_by_one: bool = False
    passes: int = 1
    notes: list[str] = field(default_factory=list)

    def for_statistics(self, where: str, streams: Sequence[HiddenStates], layers: int) -> None:
        """The next measure after collecting a block's statistics failed.

        Args:
            where: the block's name.
            streams: the hidden states, which give way first: of the calibration windows, and of held-out ones.
            layers: how many layers are collected.

        Raises:
            UserError: there is none left.
        """
        measure = _relieve(streams)
        if measure is None and self.passes < layers:
            self.passes = min(2 * self.passes, layers)
            self.statistics_on_host = True
            measure = f"statistics in {self.passes} passes"
        self._note(where, measure, streams)

    def for_solving(self, where: str, streams: Sequence[HiddenStates], layers: int) -> None:
        """The next measure after solving `layers` layers together failed.

        Raises:
            UserError: there is none left.
        """
        measure = None
        if not self.statistics_on_host:
            self.statistics_on_host = True
            measure = "statistics in host memory until they are needed"
        elif any(stream.place == "device" for stream in streams):
            measure = _relieve([stream for stream in streams if stream.place == "device"])
        elif layers > 1 and not self.one_by_one:
            self.one_by_one = True
            measure = "layers with the same input one by one"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._note(where, measure, streams)

    def take_over(self, where: str, streams: Sequence[HiddenStates]) -> bool:
        """Account for the measures that the hidden states took by themselves; whether there were any."""
        measures = [
            measure if number == 0 else f"{measure} (held out)"
            for number, stream in enumerate(streams)
            for measure in stream.measures
        ]
        for measure in measures:
            self._note(where, measure, streams)
        return bool(measures)

    def _note(self, where: str, measure: str | None, streams: Sequence[HiddenStates]) -> None:
        if measure is None:
            raise UserError(f"{where}: the device's memory does not suffice for the smallest piece of work: {_ADVICE}")
        for stream in streams:
            stream.measures.clear()
        if streams:
            self.place, self.sizes = streams[0].place, list(streams[0].sizes)
        if len(streams) > 1:
            self.held_out_sizes = list(streams[1].sizes)
        self.notes.append(f"device memory ran short at {where}; from there on: {measure}")


def _relieve(streams: Sequence[HiddenStates]) -> str | None:
    """All of them take their next measure together, since whichever is forwarded meets the same shortage."""
    measures = [stream.relieve() for stream in streams]
    return next((measure for measure in measures if measure is not None), None)


@contextmanager
def naming_the_step(where: str) -> Iterator[None]:
    """One line for the user when a step that has no smaller form left runs out of device memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{where}: the device's memory does not suffice ({error}): {_ADVICE}") from None
