"""What is asked of finishing: supports stay as they are, and the kept weights follow gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..base.checks import one_of, require
from ..base.errors import UserError
from ..base.resources import check_fields
from .optimisers import STATES, eight_bit
from .recipe import PRECISIONS, Recipe

STAGES = ("block", "distil")
# Keys that belong to no stage: which text is distilled on beside the calibration windows, and the time of all stages.
BESIDE = ("data", "path", "tokens", "minutes")
# The rates are meant for this width and this root mean square of kept weights, those of SmolLM2-135M (0.27 at 0.5, 0.31
# at 0.7). For a matrix of larger entries the same relative step is a larger rate. The largest singular value of what
# AdamW's steps add up to, since their signs agree, goes with √(rows · columns), that of a random matrix with √rows +
# √columns: a root of the width is left.
_WIDTH, _SIZE = 576, 0.28
_BACK = 0.25  # of the rate, where the held-out windows get worse


@dataclass(frozen=True)
class Finishing:
    """What both kinds have.

    Attributes:
        rate: learning rate of a matrix whose kept weights have a root mean square of 0.28, for hidden states of width
            576; it goes with that root mean square, and with 1/√width.
        epochs: passes over the windows.
        batch: windows per step.
        warmup: share of the steps in which the rate rises.
        clip: largest norm of all gradients together; None: they are not clipped.
        patience: end after so many looks at the held-out windows without improvement. Where one is worse than the best
            by 5 %, the weights go back to the best ones, and the rate falls to a quarter.
        minutes: end after so long; None: when all is done.
        precision: "bfloat16" computes under autocast, "float32" does not; "auto" is bfloat16 on a GPU.
        state: of the optimiser; "8bit" needs torchao or bitsandbytes.
    """

    rate: float = 1e-3
    epochs: int = 4
    batch: int = 4
    warmup: float = 0.0
    clip: float | None = None
    patience: int = 3
    minutes: float | None = None
    precision: str = "auto"
    state: str = "float32"

    key = "finish"

    def __post_init__(self) -> None:
        require(f"{self.key}.rate", self.rate, float, 0, 1, open_low=True)
        for name in ("epochs", "batch", "patience"):
            require(f"{self.key}.{name}", getattr(self, name), int, 1, float("inf"))
        require(f"{self.key}.warmup", self.warmup, float, 0, 1)
        for name in ("clip", "minutes"):
            if (value := getattr(self, name)) is not None:
                require(f"{self.key}.{name}", value, float, 0, float("inf"), open_low=True)
        one_of(f"{self.key}.precision", self.precision, PRECISIONS)
        one_of(f"{self.key}.state", self.state, STATES)
        if self.state == "8bit":
            eight_bit()

    def recipe(self, windows: int, width: int, minutes: float | None, micro: int | None = None) -> Recipe:
        """How a training on so many windows goes.

        Args:
            windows: to train on.
            width: of the hidden states.
            minutes: for this training.
            micro: windows per backward pass, where earlier trainings have found that `batch` is too many.
        """
        same = ("batch", "warmup", "clip", "patience", "precision", "state")
        return Recipe(
            rate=self.rate,
            scale=math.sqrt(_WIDTH / width),
            size=_SIZE,
            steps=self.epochs * math.ceil(windows / self.batch),
            judged=max(4, self.epochs),
            minutes=minutes,
            micro=min(micro, self.batch) if micro else None,
            back=_BACK,
            key=self.key,
            **{name: getattr(self, name) for name in same},
        )


@dataclass(frozen=True)
class BlockFinish(Finishing):
    """Block by block, towards the dense block's output; `minutes` are those of all blocks together.

    Attributes:
        fresh: whether windows of fresh text are trained on, too.
    """

    fresh: bool = False

    key = "finish.block"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(f"{self.key}.fresh", self.fresh, (False, True))


@dataclass(frozen=True)
class Distillation(Finishing):
    """All blocks together, towards the dense model's next-token distributions.

    Attributes:
        windows: to train on, the calibration windows first, then fresh ones; None: the calibration windows.
    """

    rate: float = 5e-4
    warmup: float = 0.05
    clip: float | None = 1.0
    windows: int | None = None

    key = "finish.distil"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows is not None:
            require(f"{self.key}.windows", self.windows, int, 1, float("inf"))


@dataclass(frozen=True)
class Finish:
    """Which of the two, and how; neither by default.

    Attributes:
        block, distil: how, or None.
        data: name of the data set whose text is trained on beside the calibration windows, or "generated", which the
            dense model writes; None: the calibration's.
        path: a local file of that text in place of a data set's; alone it means finish.data=local.
        tokens: how many of that text (`data` or `path`), in windows none of which is held out or evaluated on; every
            epoch sees them all.
        minutes: all ends after so long: `block` after half of it where `distil` follows, that after what is left; None:
            when all is done.
    """

    block: BlockFinish | None = None
    distil: Distillation | None = None
    data: str | None = None
    path: str | None = None
    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None:
            require("finish.minutes", self.minutes, float, 0, float("inf"), open_low=True)
        if self.tokens is None:
            for key in ("data", "path"):
                if (value := getattr(self, key)) is not None:
                    raise UserError(f"finish.{key}={value} is text to distil on: say how much (finish.tokens=1000000)")
            return
        require("finish.tokens", self.tokens, int, 1, float("inf"))
        if not self.reads:
            raise UserError(
                f"finish.tokens={self.tokens} is text to distil on: give finish=distil, [block,distil], or "
                "finish.block.fresh=true, which trains blocks on it"
            )
        if self.distil is not None and self.distil.windows is not None:
            raise UserError(
                f"finish.tokens={self.tokens} and finish.distil.windows={self.distil.windows} both say how much text "
                "there is: leave one of them out"
            )

    @property
    def name(self) -> str:
        """As it is written: "none", "block", "distil" or "block+distil"."""
        return "+".join(stage for stage in STAGES if getattr(self, stage) is not None) or "none"

    @property
    def reads(self) -> bool:
        """Whether a stage reads fresh text, where there is some."""
        return self.distil is not None or (self.block is not None and self.block.fresh)

    @property
    def block_minutes(self) -> float | None:
        """For the trainings of all blocks together."""
        share = None if self.minutes is None else self.minutes / (1 if self.distil is None else 2)
        return min((given for given in (share, self.block.minutes) if given is not None), default=None)

    def distil_minutes(self, seconds: float) -> float | None:
        """For the distillation; a tenth of all the time at least, where blocks have taken too long.

        Args:
            seconds: that the trainings of all blocks took.
        """
        left = None if self.minutes is None else max(self.minutes - seconds / 60, self.minutes / 10)
        return min((given for given in (left, self.distil.minutes) if given is not None), default=None)

    def check(self, propagate: str, held_out: int, windows: int) -> None:
        """Raise UserError for what cannot be.

        Args:
            propagate: the job's.
            held_out: how many windows are held out.
            windows: number of calibration windows.
        """
        if self.name == "none":
            return
        if not held_out:
            raise UserError(
                f"finish={self.name} needs windows that are held out, which tell when to stop: give some, as in "
                "data.holdout=8 (prune_model: held_out)"
            )
        if self.block is not None and propagate == "dense":
            raise UserError(
                "finish=block makes up for what pruned blocks have lost, and propagate=dense feeds every block what "
                "the dense ones produce: leave one of them out"
            )
        if self.distil is not None and (self.distil.windows or windows) < windows:
            raise UserError(
                f"finish.distil.windows={self.distil.windows} is less than the calibration windows "
                f"(nsamples={windows}): give at least that many"
            )

    def fresh(self, windows: int, seqlen: int) -> int:
        """How many windows of fresh text there must be beside the calibration windows.

        Args:
            windows: number of calibration windows.
            seqlen: tokens in a window.
        """
        if self.tokens is not None:
            return math.ceil(self.tokens / seqlen)
        return (self.distil.windows or windows) - windows if self.distil is not None else 0


def build_finish(node: Mapping) -> Finish:
    """The choice that a composed `finish` node describes: `name`, a node per stage, and `BESIDE`.

    Raises:
        UserError: an unknown stage or field, or a value that is not allowed.
    """
    found: dict = {}
    for stage, kind in {"block": BlockFinish, "distil": Distillation}.items():
        if stage in node:
            if not isinstance(node[stage], Mapping):
                raise UserError(
                    f"finish.{stage}={node[stage]} is not allowed: give its keys, as in finish.{stage}.epochs=2"
                )
            check_fields(kind, node[stage], f"finish {stage}")
            found[stage] = kind(**node[stage])
    if unknown := sorted(map(str, node.keys() - {"name", *STAGES, *BESIDE})):
        raise UserError(f"finish has no stage {unknown[0]!r}: give none, block, distil or [block,distil]")
    return Finish(**found, **{key: node[key] for key in BESIDE if key in node})
