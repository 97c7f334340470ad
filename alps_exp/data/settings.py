"""What a configuration says about a data set and about calibration windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import yaml

from ..base.checks import one_of, require
from ..base.errors import UserError, nearest
from ..base.resources import resource_root

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SAMPLINGS = ("auto", "documents", "concatenated")
EVALUATION_SAMPLINGS = ("consecutive", "documents")
BOS_RULES = ("auto", "window", "true", "false")


@dataclass(frozen=True)
class DataSettings:
    """A data set, as conf/data/*.yaml describe it key by key: where its texts are, and how windows are drawn."""

    name: str
    hub: str | None = None
    revision: str | None = None
    package: str | None = None
    calibration_file: str | None = None
    evaluation_file: str | None = None
    column: str | None = None
    lines: str | None = None
    join: str | None = None
    sampling: str | None = None
    holdout: int = 0
    disjoint_seeds: int | None = None
    held_out: float | None = None
    evaluation_documents: int | None = None
    evaluation_windows: int | None = None
    evaluation_sampling: str | None = None
    path: str | None = None
    eval_path: str | None = None

    @classmethod
    def parse(cls, node: Mapping) -> DataSettings:
        """Those of a `data` node."""
        kind = GeneratedSettings if "temperature" in node else DataSettings
        return kind(**{field.name: node[field.name] for field in dataclasses.fields(kind) if field.name in node})

    @classmethod
    def named(cls, name: str) -> DataSettings:
        """Those of conf/data/NAME.yaml, for evaluation on another data set than the calibrating one.

        Raises:
            UserError: no such data set.
        """
        folder = resource_root() / "conf" / "data"
        known = [path.stem for path in folder.glob("*.yaml")]
        if name not in known:
            raise UserError(f"unknown data set {name!r}; {nearest(name, known)}")
        return cls.parse(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))

    def check(self, seed: int = 0) -> None:
        """Raise UserError for a value that is not allowed, before any text is read.

        Args:
            seed: of the windows; `disjoint_seeds` must have a part for it.
        """
        one_of("data.sampling", str(self.sampling or "auto"), SAMPLINGS)
        one_of("data.evaluation_sampling", self.evaluation_sampling or "consecutive", EVALUATION_SAMPLINGS)
        for key in ("join", "column"):
            if not isinstance(value := getattr(self, key), (str, type(None))):
                raise UserError(f"data.{key}={value} is not allowed: give a text, quoted where it is a number")
        if self.held_out is not None:
            require("data.held_out", self.held_out, float, 0, 0.99)
        if (parts := self.disjoint_seeds) is None:
            return
        require("data.disjoint_seeds", parts, int, 2, float("inf"))
        if self.sampling != "concatenated":
            raise UserError(
                f"data.disjoint_seeds={parts} deals out pieces of a joined text: give data.sampling=concatenated"
            )
        if seed >= parts:
            raise UserError(
                f"seed={seed} has no part of data.disjoint_seeds={parts}: give a seed from 0 to {parts - 1}"
            )


@dataclass(frozen=True)
class GeneratedSettings(DataSettings):
    """Text that the dense model writes; nothing is evaluated on it.

    Attributes:
        prompts: texts that windows begin with, in turn.
        temperature: of the sampling.
        top_k: sample from so many of the likeliest tokens; 0: from all.
        top_p: and from those that make up this share of the probability.
        batch_size: windows written at a time.
    """

    prompts: Sequence[str] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.prompts, list):
            object.__setattr__(self, "prompts", tuple(self.prompts))

    def check(self, seed: int = 0) -> None:
        """As of other data sets."""
        given = self.prompts
        if not isinstance(given, tuple) or not all(isinstance(text, str) and text for text in given):
            shown = list(given) if isinstance(given, tuple) else given
            raise UserError(
                f"data.prompts={shown} is not allowed: give a list of texts, as in 'data.prompts=[\"Once upon\"]'"
            )
        require("data.temperature", self.temperature, float, 0, 100, open_low=True)
        require("data.top_k", self.top_k, int, 0, float("inf"))
        require("data.top_p", self.top_p, float, 0, 1, open_low=True)
        require("data.batch_size", self.batch_size, int, 1, float("inf"))


@dataclass(frozen=True)
class CalibrationSettings:
    """The windows to calibrate on, as `windows.calibration_tokens` takes them; `data.holdout` more are held out,
    `fresh` more are for a distillation that wants more text, and `training` more for a method that trains."""

    data: DataSettings
    nsamples: int
    seqlen: int
    seed: int
    bos: str | bool
    fresh: int = 0
    training: int = 0

    def divided(self, tokens: Tensor) -> Windows:
        """What is drawn in one go and in this order, taken apart.

        Args:
            tokens: (nsamples + data.holdout + fresh + training, seqlen).
        """
        return Windows(*tokens.split([self.nsamples, self.data.holdout, self.fresh, self.training]))


class Windows(NamedTuple):
    """(windows, seqlen) each: to calibrate on, to hold out, of fresh text to distil on, and of a method that trains."""

    calibration: Tensor
    held_out: Tensor
    fresh: Tensor
    training: Tensor


def check_bos(key: str, rule: str | bool, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise UserError for a rule for BOS that is not allowed, or that the tokenizer has no token for."""
    one_of(key, str(rule).lower(), BOS_RULES)
    if tokenizer is not None and str(rule).lower() in ("true", "window") and tokenizer.bos_token_id is None:
        raise UserError(
            f"{key}={str(rule).lower()} needs a tokenizer with a BOS token, and the model's has none: give {key}=auto"
        )
