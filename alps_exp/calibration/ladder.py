"""What a run does when the device's memory does not suffice: the same work in smaller pieces, the same to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..base.errors import UserError
from ..model.hidden import HiddenStates

CALIBRATION = "calibration"  # the stream of the calibration windows through the pruned model

_ADVICE = "use shorter windows (seqlen), leave the widest layers dense (layers.exclude=[...]), or a larger device"


@dataclass
class Ladder:
    """Measures taken so far; they stay in force for the rest of the run, and when it is resumed.

    Attributes:
        place: where the hidden states were moved to.
        sizes: windows of each forward, by the name of the stream, once they were reduced.
        statistics_on_host: statistics wait in host memory until their layers are solved.
        apart: experts of the same shapes are solved one after the other.
        one_by_one: layers that share an input are solved one after the other.
        passes: into how many passes over the windows the layers of a block are divided.
        micro: windows per backward pass of a training, once they were reduced.
        notes: what was done where, in words.
    """

    place: str | None = None
    sizes: dict[str, list[int]] = field(default_factory=dict)
    statistics_on_host: bool = False
    apart: bool = False
    one_by_one: bool = False
    passes: int = 1
    micro: int | None = None
    notes: list[str] = field(default_factory=list)

    # Called with all of them as plain values whenever one is taken; set by who keeps them for later attempts.
    remember = staticmethod(lambda measures: None)

    def for_statistics(self, where: str, streams: Mapping[str, HiddenStates], layers: int) -> None:
        """The next measure after collecting a block's statistics failed.

        Args:
            where: the block's name.
            streams: the hidden states by name, which give way first.
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

    def for_solving(self, where: str, streams: Mapping[str, HiddenStates], layers: int, groups: int = 1) -> None:
        """The next measure after solving `layers` layers of one input together failed, with those of other inputs
        where `groups` is more than one.

        Raises:
            UserError: there is none left.
        """
        measure = None
        if groups > 1:
            self.apart = True
            measure = "experts one by one"
        elif not self.statistics_on_host:
            self.statistics_on_host = True
            measure = "statistics in host memory until they are needed"
        elif any(stream.place == "device" for stream in streams.values()):
            measure = _relieve({name: stream for name, stream in streams.items() if stream.place == "device"})
        elif layers > 1 and not self.one_by_one:
            self.one_by_one = True
            measure = "layers with the same input one by one"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._note(where, measure, streams)

    def for_training(self, where: str, micro: int, streams: Mapping[str, HiddenStates]) -> None:
        """Remember that a training makes smaller backward passes."""
        self.micro = micro
        self._note(where, f"gradients of {micro} {'windows' if micro > 1 else 'window'} at a time", streams)

    def lighter_training(self, where: str, streams: Mapping[str, HiddenStates]) -> str | None:
        """The next measure when gradients of one window are too much, and which it is; None when there is none left."""
        there = {name: stream for name, stream in streams.items() if stream.place == "device"}
        measure = _relieve(there) if there else None
        if measure is not None:
            self._note(where, measure, streams)
        return measure

    def take_over(self, where: str, streams: Mapping[str, HiddenStates]) -> None:
        """Account for the measures that the hidden states took by themselves while `where` was at work."""
        measures = [
            measure if name == CALIBRATION else f"{measure} ({name})"
            for name, stream in streams.items()
            for measure in stream.measures
        ]
        for measure in measures:
            self._note(where, measure, streams)

    def _note(self, where: str, measure: str | None, streams: Mapping[str, HiddenStates]) -> None:
        if measure is None:
            raise UserError(f"{where}: the device's memory does not suffice for the smallest piece of work: {_ADVICE}")
        for name, stream in streams.items():
            stream.measures.clear()
            self.sizes[name] = list(stream.sizes)
        if CALIBRATION in streams:
            self.place = streams[CALIBRATION].place
        self.notes.append(f"device memory ran short at {where}; from there on: {measure}")
        self.remember(dataclasses.asdict(self))


def _relieve(streams: Mapping[str, HiddenStates]) -> str | None:
    """All of them take their next measure together, since whichever is forwarded meets the same shortage."""
    measures = [stream.relieve() for stream in streams.values()]
    return next((measure for measure in measures if measure is not None), None)


@contextmanager
def naming_the_step(where: str) -> Iterator[None]:
    """One line for the user when a step that has no smaller form left runs out of device memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{where}: the device's memory does not suffice ({error}): {_ADVICE}") from None
