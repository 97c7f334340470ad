"""Mistakes in single values, told before torch and transformers are imported, which takes seconds.

`settings.resolve` makes the same checks, and more; here is what needs neither the packages nor the model's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..allocation.selection import Selection
from ..base import standins
from ..base.checks import check_device
from ..base.errors import UserError
from ..checkpoints import upload
from ..data.settings import DataSettings
from ..evaluation.settings import check_values
from .naming import NEUTRAL, plain
from .values import check_among, check_root

# Beside the method; what says nothing in them need not be built.
_CHOSEN = ("target", "sensitivity", "allocation", "finish")


def check(cfg: Mapping) -> Mapping:
    """Raise UserError for a value that is not allowed, of those that no class need be asked about.

    Returns:
        The configuration as plain values.
    """
    check_root(cfg)
    content = plain(cfg)
    check_device(content["device"])
    DataSettings.parse(content["data"]).check(content["seed"])
    check_values(content["eval"])
    Selection.parse(*(content["layers"][key] for key in ("include", "exclude", "sparsity")))
    check_among(content)
    if content.get("push") is not None:
        upload.check_form(str(content["push"]))
    return content


def first_mistake(contents: Sequence[Mapping]) -> tuple[int, str] | None:
    """What the method or another choice does not take, or a text that is not there, in the first configuration that has
    such a mistake, and which that is.

    Args:
        contents: what `check` has returned for each configuration.
    """
    number, _, message = (standins.answered(lambda: _first(contents)) or "").partition(" ")
    return (int(number), message) if message else None


def _first(contents: Sequence[Mapping]) -> str:
    registry, texts = (standins.imported(f"alps_exp.{name}") for name in ("layer.registry", "data.texts"))
    for number, content in enumerate(contents):
        chosen = [node for node in _CHOSEN if _own(content[node]) != NEUTRAL[node]]
        for node in ("method", *chosen):
            if named := content[node].get("_target_"):
                standins.imported(named.rpartition(".")[0])
        try:
            method, data = registry.build(content["method"]), DataSettings.parse(content["data"])
            if chosen:
                finish = standins.imported("alps_exp.runs.choices").Choices.of(content).finish
                if method.prunes and not method.trains:
                    finish.check(content["propagate"], data.holdout, content["nsamples"])
            if method.prunes:
                texts.check_source(data)
            for key in ("path", "eval_path"):
                if (path := getattr(data, key)) is not None:
                    texts.local_file(path, f"data.{key}={path}")
        except UserError as error:
            return f"{number} {error}"
    return ""


def _own(node: Mapping) -> dict:
    return {key: value for key, value in node.items() if key != "_target_"}
