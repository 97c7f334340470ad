"""The evaluation of a run: what is checked beforehand, perplexities block by block, tasks through lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..base.checks import one_of, require
from ..base.errors import UserError
from ..data import texts
from ..data.settings import DataSettings
from ..model.blocks import BlockModel
from ..model.loading import ModelSettings
from . import perplexity
from .evaluation import Text, build_evaluation
from .settings import EvaluationSettings, EvaluationText, TaskSettings, check_values


@dataclass(frozen=True)
class Prepared:
    """What an evaluation reads.

    Attributes:
        texts: to measure perplexity on.
        passes: of tasks; empty without tasks.
    """

    texts: list[Text]
    passes: tuple


def resolve(options: Mapping, data: DataSettings, model: ModelSettings) -> EvaluationSettings:
    """What an `eval` node asks for, checked against the model.

    The data of tasks are read, since a prompt's length tells whether the model can be asked at all.

    Args:
        options: the node.
        data: the data set that the run calibrates on, which the node may name, too.
        model: to evaluate.

    Raises:
        UserError: the first mistake found.
    """
    asked, names = check_texts(options, data), options["datasets"]
    lengths, seqlen = {"eval.sample_tokens": options["sample_tokens"]}, options["seqlen"]
    if names:
        seqlen = model.context if seqlen == "context" else seqlen
        if seqlen is None:
            raise UserError("eval.seqlen=context: the model's configuration names no context length; give a number")
        require("eval.seqlen", seqlen, int, 2, float("inf"))
        lengths["eval.seqlen"] = seqlen
    for key, length in lengths.items():
        if (context := model.context) is not None and length > context:
            raise UserError(f"{key}={length} is beyond the model's context of {context} tokens: give at most that")
    tasks = TaskSettings()
    if options["tasks"]:
        from .tasks import prepare

        tasks = _tasks(options)
        prepare(model, tasks)
    if (own := build_evaluation(options)) is not None:
        if own.reads == "texts" and not names:
            raise UserError(f"eval={options['name']} measures on texts: name some, as in 'eval.datasets=[wikitext2]'")
        own.check(model)
    return EvaluationSettings(
        protocol=options["name"],
        texts=asked,
        windows=options["windows"],
        seqlen=seqlen,
        bos=options["bos"],
        batch_size=options["batch_size"],
        sample_tokens=options["sample_tokens"],
        prompt=options["prompt"],
        tasks=tasks,
        own=own,
    )


def check_texts(options: Mapping, data: DataSettings) -> tuple[EvaluationText, ...]:
    """The texts that an `eval` node names, which are there, as far as that is known without reading them.

    Args:
        options, data: as in `resolve`.

    Raises:
        UserError: a value that is not allowed, no such data set, or no such file.
    """
    check_values(options)
    asked = []
    for name in options["datasets"]:
        found = data if name == data.name else DataSettings.named(name)
        asked.append(EvaluationText(found, _path(options, name)))
        if asked[-1].path is None:
            texts.check_source(found, evaluates=True)
    for key, path in _paths(options).items():
        texts.local_file(path, f"{key}={path}")
    return tuple(asked)


def _paths(options: Mapping) -> dict[str, str]:
    """The local files that `eval.path` names, by the key that names them."""
    path, names = options["path"], options["datasets"]
    if path is None:
        return {}
    if isinstance(path, Mapping):
        if unknown := [name for name in path if name not in names]:
            raise UserError(f"eval.path names {unknown[0]!r}, which is not among eval.datasets={list(names)}")
        return {f"eval.path.{name}": str(file) for name, file in path.items()}
    if len(names) != 1:
        raise UserError("eval.path stands in for one data set: name that one alone, or eval.path={NAME:FILE,NAME:FILE}")
    return {"eval.path": str(path)}


def _path(options: Mapping, name: str) -> str | None:
    """The local file that stands in for a data set's evaluation text."""
    return _paths(options).get(f"eval.path.{name}" if isinstance(options["path"], Mapping) else "eval.path")


def _tasks(options: Mapping) -> TaskSettings:
    names, limit = options["tasks"], options["limit"]
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError(f"eval.tasks={names} is not allowed: give a list, as in 'eval.tasks=[arc_easy,mmlu@5]'")
    if options["task_batch_size"] != "auto":
        require("eval.task_batch_size", options["task_batch_size"], int, 1, float("inf"))
    for key in ("truncate", "run_code"):
        one_of(f"eval.{key}", options.get(key, False), (True, False))
    by_name = limit if isinstance(limit, Mapping) else {}
    for value in by_name.values() if isinstance(limit, Mapping) else [limit]:
        if value is not None:
            require("eval.limit", value, int, 1, float("inf"))
    if options["limit_seed"] is not None:
        require("eval.limit_seed", options["limit_seed"], int, 0, float("inf"))
    return TaskSettings(
        names=tuple(map(str, names)),
        source=options["task_source"],
        batch_size=options["task_batch_size"],
        limit=None if isinstance(limit, Mapping) else limit,
        limits=tuple(by_name.items()),
        limit_seed=options["limit_seed"],
        truncate=options["truncate"],
        bos=options["bos"],
        run_code=options.get("run_code", False),
    )


def measure(prepared: Prepared, options: EvaluationSettings, model: BlockModel, tokenizer) -> list[dict]:
    """Perplexities, task scores, and what the choice measures besides, as rows of the record, one number each.

    All rows have `dataset`, `metric`, `value`, `stderr`, `better` ("lower", "higher", None where lm-eval does not say),
    `shown` (in tables, unless all are asked for), `protocol`, `partial`, `source`, `split` and `bos`. Perplexities
    also have `windows`, `total_windows`, `seqlen`, `join` and `reading`; tasks have `samples`, `total_samples`,
    `sampling`, `shots` and `truncated`; figures of an `Evaluation` have a `unit`.
    """
    rows = []
    for text in prepared.texts:
        value = perplexity.perplexity(model, text.windows, options.batch_size, text.name)
        fixed = {"metric": "perplexity", "value": value, "stderr": None, "better": "lower", "shown": True}
        rows.append({**text.description, "dataset": text.name, **fixed, "protocol": options.protocol})
    if prepared.passes:
        from . import tasks

        rows += tasks.measure(prepared.passes, options.tasks, model, tokenizer)
    if options.own is not None:
        figures = options.own.measure(model, prepared.texts, tokenizer)
        rows += [figure.row(options.protocol) for figure in figures]
    return rows


def describe(rows: Sequence[Mapping]) -> list[str]:
    """The shown rows as lines for the terminal."""
    lines = []
    for row in rows:
        if not row["shown"]:
            continue
        size = ""
        if "windows" in row:
            partial = f" of {row['total_windows']}, partial" if row["partial"] else ""
            size = f" ({row['windows']}{partial} windows of {row['seqlen']} tokens)"
        elif "samples" in row:
            partial = f"of {row['total_samples']} examples, partial" if row["partial"] else "examples"
            size = f" ({row['samples']} {partial})"
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.2g}"
        unit = f" {row['unit']}" if row.get("unit") else ""
        lines.append(f"{row['metric']} {row['value']:.4g}{error}{unit} on {row['dataset']}{size}")
    return lines
