"""How a training goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..base.checks import one_of, require
from .optimisers import STATES

PRECISIONS = ("auto", "bfloat16", "float32")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a training goes.

    Attributes:
        rate: learning rate of AdamW after the warm-up, as the user gave it.
        steps: how many.
        batch: windows per step; the last step of an epoch takes those that are left.
        betas: decay of AdamW's moments.
        decay: of the weights, decoupled; pruned weights stay zero.
        clip: largest norm of all gradients together; None: they are not clipped.
        warmup: share of the steps in which the rate rises from 0.
        schedule: of the rate after that: "cosine" and "linear" end at 0.
        precision: "bfloat16" computes under autocast, "float32" does not; "auto" is bfloat16 on a GPU.
        state: of the optimiser, "float32" or "8bit".
        judged: how often the held-out windows are looked at after the start, evenly.
        patience: end after so many looks without improvement.
        back: at a look that is worse than the best by 5 % go back to the best weights, and multiply the rate by this
            from there on; None: go on from where the weights are.
        minutes: end after so long; the rate has come to its end by then. Two such trainings are not alike to the bit.
        micro: windows per backward pass; `batch` by default, fewer when the device's memory does not suffice.
        saved: steps between checkpoints, where there is a file for them and one is due (`Trainer`).
        seed: of the order of the windows.
        key: how the user names these settings, for messages.
        scale: what the rate is multiplied by, where it is meant for a model of another size.
        size: root mean square of trained weights that the rate is meant for: a weight's (a matrix's) own rate is the
            rate times its root mean square over this, so that steps are relative to it. None: one rate for all.
    """

    rate: float
    steps: int
    batch: int = 4
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.0
    clip: float | None = None
    warmup: float = 0.0
    schedule: str = "cosine"
    precision: str = "auto"
    state: str = "float32"
    judged: int = 4
    patience: int = 2
    back: float | None = None
    minutes: float | None = None
    micro: int | None = None
    saved: int = 100
    seed: int = 0
    key: str = "training"
    scale: float = 1.0
    size: float | None = None

    def __post_init__(self) -> None:
        above = {"open_low": True}
        require(f"{self.key}.rate", self.rate, float, 0, 1, **above)
        for name in ("steps", "batch", "judged", "patience", "saved"):
            require(f"{self.key}.{name}", getattr(self, name), int, 1, float("inf"))
        require(f"{self.key}.decay", self.decay, float, 0, 1)
        require(f"{self.key}.warmup", self.warmup, float, 0, 1)
        for beta in self.betas:
            require(f"{self.key}.betas", beta, float, 0, 0.999999)
        one_of(f"{self.key}.schedule", self.schedule, SCHEDULES)
        one_of(f"{self.key}.precision", self.precision, PRECISIONS)
        one_of(f"{self.key}.state", self.state, STATES)
        if self.back is not None:
            require(f"{self.key}.back", self.back, float, 0, 1, **above)
        for name in ("clip", "minutes", "size"):
            if (value := getattr(self, name)) is not None:
                require(f"{self.key}.{name}", value, float, 0, float("inf"), **above)
        if self.micro is not None:
            require(f"{self.key}.micro", self.micro, int, 1, self.batch)

    def rate_at(self, step: int, seconds: float) -> float:
        """The learning rate of a step, from 0.

        Args:
            step: number of the step.
            seconds: that the training has taken so far; they count where `minutes` bounds it.
        """
        gone = step / self.steps
        if self.minutes is not None:
            gone = min(1.0, max(gone, seconds / (60 * self.minutes)))
        rising = min(1.0, (step + 1) / (self.warmup * self.steps)) if self.warmup else 1.0
        falling = {"cosine": 0.5 * (1 + math.cos(math.pi * gone)), "linear": 1 - gone, "constant": 1.0}
        return self.rate * self.scale * rising * falling[self.schedule]

    def compute(self, device: torch.device) -> torch.dtype:
        """In what products are made on this device."""
        chosen = ("bfloat16" if device.type == "cuda" else "float32") if self.precision == "auto" else self.precision
        return torch.bfloat16 if chosen == "bfloat16" else torch.float32

    def looks(self) -> list[int]:
        """After which steps, counted from 1, the held-out windows are looked at."""
        return sorted({-(-self.steps * look // self.judged) for look in range(1, self.judged + 1)})
