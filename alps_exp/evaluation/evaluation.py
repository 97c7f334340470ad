"""What an evaluation of one's own is: a measurement of the model, whose figures become rows of the record."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ..base.checks import one_of
from ..base.resources import built, choice_file, class_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.blocks import BlockModel
    from ..model.loading import ModelSettings


@dataclass(frozen=True)
class Text:
    """A text as windows of tokens.

    Attributes:
        name: of the data set.
        windows: (windows, seqlen) token ids, on the CPU.
        description: where they came from, for the record: `windows`, `total_windows`, `seqlen`, `partial`, `source`, …
    """

    name: str
    windows: Tensor
    description: Mapping


@dataclass(frozen=True)
class Figure:
    """A number that was measured: a row of the record, a column of tables.

    Attributes:
        subject: what it was measured on, the row's `dataset`: the name of a text, or of what is measured ("decode").
        metric: what was measured, as a table's head shall say it ("batch 4").
        value: may be infinite or NaN.
        better: "lower" or "higher"; None where neither is.
        unit: such as "tokens/s"; None for a mere number.
        stderr: standard error; None where it has none.
        shown: in tables, unless they name their metrics.
        more: further keys of the row; where they have `windows` and `seqlen`, these stand in the table's head.
    """

    subject: str
    metric: str
    value: float
    better: str | None
    unit: str | None = None
    stderr: float | None = None
    shown: bool = True
    more: Mapping = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("better", self.better, ("lower", "higher", None))

    @classmethod
    def on(cls, text: Text, metric: str, value: float, better: str | None, **options) -> Figure:
        """One that was measured on a text, whose description becomes part of the row."""
        return cls(text.name, metric, value, better, more=text.description, **options)

    def row(self, protocol: str) -> dict:
        """The row of the record; `protocol` is the name of the `eval` choice."""
        fixed = {"dataset": self.subject, "metric": self.metric, "value": float(self.value), "stderr": self.stderr}
        fixed |= {"better": self.better, "unit": self.unit, "shown": self.shown, "protocol": protocol}
        return {"partial": False, **self.more, **fixed}


class Evaluation(ABC):
    """A measurement of the model as it is after pruning. Derive a frozen dataclass whose fields are its options.

    The yaml in conf/eval that names the class as `_target_` gives the fields, which are then keys `eval.FIELD`. A field
    of the name of a key that all evaluations have, such as `seqlen` or `batch_size`, gets that key's value. The network
    must be left as it was.
    """

    # What is read beforehand: "nothing", the "tokenizer", or "texts", those of eval.datasets (and the tokenizer).
    reads: ClassVar[str] = "nothing"

    def check(self, model: ModelSettings) -> None:  # noqa: B027  nothing to refuse, for most
        """Raise UserError, before anything runs, for a model that this cannot be measured of."""

    @abstractmethod
    def measure(self, model: BlockModel, texts: Sequence[Text], tokenizer) -> Sequence[Figure]:
        """The figures.

        Args:
            model: `model.model` is the network and `model.device` where it computes. The network lies on the host, or
                even in its files: `perplexity.whole_model` readies it for its own forward.
            texts: those of eval.datasets.
            tokenizer: of the model; None where neither this nor anything else reads text.
        """


def build_evaluation(node: Mapping) -> Evaluation | None:
    """The evaluation that a composed `eval` node names as `_target_`; None where it names none.

    Raises:
        UserError: a class that is no evaluation, an unknown field, or a value that is not allowed.
    """
    if "_target_" not in node:
        return None
    known = {item.name for item in dataclasses.fields(class_of(node, f"eval {node['name']}", Evaluation, "evaluation"))}
    common = choice_file("eval", "none").keys() - known - {"name"}
    return built({key: value for key, value in node.items() if key not in common}, Evaluation, "eval")
