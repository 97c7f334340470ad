"""The evaluation of a run: what is checked beforehand, perplexities block by block, tasks through lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..base.checks import require
from ..base.errors import UserError
from ..data import texts
from ..data import windows as data
from ..model import loading
from ..model.blocks import BlockModel
from . import perplexity


@dataclass(frozen=True)
class Prepared:
    """What an evaluation reads.

    Attributes:
        texts: data set, windows (windows, seqlen), and their description.
        passes: of tasks; empty without tasks.
    """

    texts: list[tuple[str, Tensor, dict]]
    passes: tuple


def check(cfg: Mapping) -> None:
    """Check the `eval` node against the model, without its weights and without the texts of perplexities.

    The data of tasks are read, since a prompt's length tells whether the model can be asked at all.

    Raises:
        UserError: the first mistake found.
    """
    options = cfg["eval"]
    for key in ("batch_size", "windows"):
        if not (key == "windows" and options["windows"] is None):
            require(f"eval.{key}", options[key], int, 1, float("inf"))
    require("eval.sample_tokens", options["sample_tokens"], int, 0, float("inf"))
    if not isinstance(options["prompt"], str):
        raise UserError(f"eval.prompt={options['prompt']} is not allowed: give a text, as in eval.prompt='\"Once\"'")
    names = options["datasets"]
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError(f"eval.datasets={names} is not allowed: give a list, as in 'eval.datasets=[wikitext2,c4]'")
    for name in names:
        node = cfg["data"] if name == cfg["data"]["name"] else data.data_node(name)
        if local_path(options, name) is None:
            texts.check_source(node, evaluates=True)
    for key, path in _paths(options).items():
        texts.local_file(path, f"{key}={path}")
    context = loading.context_length(loading.load_config(cfg["model"]))
    lengths = {"eval.sample_tokens": options["sample_tokens"]}
    if names:
        lengths["eval.seqlen"] = seqlen(cfg)
        require("eval.seqlen", lengths["eval.seqlen"], int, 2, float("inf"))
    for key, length in lengths.items():
        if context is not None and length > context:
            raise UserError(f"{key}={length} is beyond the model's context of {context} tokens: give at most that")
    if options["tasks"]:
        from . import tasks

        tasks.check_options(options)
        tasks.prepare(cfg)


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


def local_path(options: Mapping, name: str) -> str | None:
    """The local file that stands in for a data set's evaluation text."""
    return _paths(options).get(f"eval.path.{name}" if isinstance(options["path"], Mapping) else "eval.path")


def seqlen(cfg: Mapping) -> int:
    """Tokens in an evaluation window; "context" is the model's own.

    Raises:
        UserError: "context", and the model's configuration names none.
    """
    if cfg["eval"]["seqlen"] != "context":
        return cfg["eval"]["seqlen"]
    context = loading.context_length(loading.load_config(cfg["model"]))
    if context is None:
        raise UserError("eval.seqlen=context: the model's configuration names no context length; give a number")
    return context


def measure(prepared: Prepared, cfg: Mapping, model: BlockModel, tokenizer) -> list[dict]:
    """Perplexities and task scores as rows of the record, one number each.

    All rows have `dataset`, `metric`, `value`, `stderr`, `better` ("lower", "higher", None where lm-eval does not say),
    `shown` (in tables, unless all are asked for), `protocol`, `partial`, `source`, `split` and `bos`. Perplexities
    also have `windows`, `total_windows`, `seqlen`, `join` and `reading`; tasks have `samples`, `total_samples`,
    `sampling`, `shots` and `truncated`.
    """
    options, rows = cfg["eval"], []
    for name, windows, description in prepared.texts:
        value = perplexity.perplexity(model, windows, options["batch_size"], name)
        fixed = {"metric": "perplexity", "value": value, "stderr": None, "better": "lower", "shown": True}
        rows.append({**description, "dataset": name, **fixed, "protocol": options["name"]})
    if prepared.passes:
        from . import tasks

        rows += tasks.measure(prepared.passes, cfg, model, tokenizer)
    return rows


def describe(rows: Sequence[Mapping]) -> list[str]:
    """The shown rows as lines for the terminal."""
    lines = []
    for row in rows:
        if not row["shown"]:
            continue
        if row["metric"] == "perplexity" and "windows" in row:
            partial = f" of {row['total_windows']}, partial" if row["partial"] else ""
            size = f"{row['windows']}{partial} windows of {row['seqlen']} tokens"
        else:
            partial = f"of {row['total_samples']} examples, partial" if row["partial"] else "examples"
            size = f"{row['samples']} {partial}"
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.2g}"
        lines.append(f"{row['metric']} {row['value']:.4g}{error} on {row['dataset']} ({size})")
    return lines
