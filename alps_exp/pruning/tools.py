"""What a model method works with beside the model and its job; each tool has a form that does nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..calibration.ladder import Ladder
from ..calibration.sharing import NoPasses, NoSharing, PassCache, StatisticsCache
from .store import NoStore, ProgressStore
from .team import Alone, Team


@dataclass(frozen=True)
class Tools:
    """What a model method works with.

    Attributes:
        store: where finished blocks are kept; those that it holds are taken from there and not solved again.
        sharing: statistics of other runs with the same inputs, for a process that works alone.
        team: the processes that prune the same model together, each with the same job.
        passes: what passes over the dense model have told other runs, for a process that works alone.
        ladder: the measures taken against lack of device memory.
    """

    store: ProgressStore | NoStore = field(default_factory=NoStore)
    sharing: StatisticsCache | NoSharing = field(default_factory=NoSharing)
    team: Team | Alone = field(default_factory=Alone)
    passes: PassCache | NoPasses = field(default_factory=NoPasses)
    ladder: Ladder = field(init=False)

    def __post_init__(self) -> None:
        ladder = Ladder(**self.store.ladder)
        ladder.remember = self.store.keep_ladder
        object.__setattr__(self, "ladder", ladder)
