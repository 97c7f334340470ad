"""What a configuration says about evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..base.checks import require
from ..base.errors import UserError
from ..data.settings import DataSettings
from .evaluation import Evaluation


@dataclass(frozen=True)
class EvaluationText:
    """A text to measure perplexity on.

    Attributes:
        data: the data set.
        path: a local file that stands in for its text; None without one.
    """

    data: DataSettings
    path: str | None


@dataclass(frozen=True)
class TaskSettings:
    """Tasks of lm-eval, as the keys of the `eval` node of these names say.

    Attributes:
        limit: at most so many rows of every task; None is all.
        limits: the same by a task's or a group's name, in place of `limit`.
        bos: see `TaskModel`.
    """

    names: tuple[str, ...] = ()
    source: str = "hub"
    batch_size: int | str = "auto"
    limit: int | None = None
    limits: tuple[tuple[str, int], ...] = ()
    limit_seed: int | None = None
    truncate: bool = False
    bos: str | bool = "auto"
    run_code: bool = False


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured of a model, as the keys of the `eval` node of these names say.

    Attributes:
        protocol: the name of the choice.
        texts: to measure perplexity on.
        seqlen: tokens in a window, the model's context where that was asked for.
        windows: of each text; None is all.
        tasks: without names where there are none.
        own: what the choice measures besides; None for nothing.
    """

    protocol: str
    texts: tuple[EvaluationText, ...]
    windows: int | None
    seqlen: int
    bos: str | bool
    batch_size: int
    sample_tokens: int
    prompt: str
    tasks: TaskSettings
    own: Evaluation | None

    @property
    def reads_text(self) -> bool:
        """Whether anything of it needs the model's tokenizer."""
        own = self.own is not None and self.own.reads != "nothing"
        return bool(self.texts or self.tasks.names or self.sample_tokens or own)


def check_values(options: Mapping) -> None:
    """Raise UserError for the first value of an `eval` node that is not allowed, whatever the model and the texts."""
    for key in ("batch_size", "windows"):
        if not (key == "windows" and options["windows"] is None):
            require(f"eval.{key}", options[key], int, 1, float("inf"))
    require("eval.sample_tokens", options["sample_tokens"], int, 0, float("inf"))
    if not isinstance(options["prompt"], str):
        raise UserError(f"eval.prompt={options['prompt']} is not allowed: give a text, as in eval.prompt='\"Once\"'")
    names = options["datasets"]
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError(f"eval.datasets={names} is not allowed: give a list, as in 'eval.datasets=[wikitext2,c4]'")
