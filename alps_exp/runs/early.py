"""Mistakes in single values, told before torch and transformers are imported, which takes seconds.

`settings.resolve` makes the same checks, and more; here is what needs neither the packages nor the model's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..base import standins
from ..base.checks import check_device
from ..base.errors import UserError
from ..data.settings import DataSettings
from ..evaluation.settings import check_values
from .naming import plain
from .values import check_root


def check(cfg: Mapping) -> None:
    """Raise UserError for a value that is not allowed, of those that no class need be asked about."""
    check_root(cfg)
    content = plain(cfg)
    check_device(content["device"])
    DataSettings.parse(content["data"]).check(content["seed"])
    check_values(content["eval"])


def first_mistake(configurations: Sequence[Mapping]) -> tuple[int, str] | None:
    """What the method or another choice does not take, or a text that is not there, in the first configuration that has
    such a mistake, and which that is."""
    contents = [plain(cfg) for cfg in configurations]
    number, _, message = (standins.answered(lambda: _first(contents)) or "").partition(" ")
    return (int(number), message) if message else None


def _first(contents: Sequence[Mapping]) -> str:
    registry, choices, texts = (
        standins.imported(f"alps_exp.{name}") for name in ("layer.registry", "runs.choices", "data.texts")
    )
    for number, content in enumerate(contents):
        for node in ("method", "target", "allocation"):
            if named := content[node].get("_target_"):
                standins.imported(named.rpartition(".")[0])
        try:
            prunes = registry.build(content["method"]).prunes
            choices.Choices.of(content)
            data = DataSettings.parse(content["data"])
            if prunes:
                texts.check_source(data)
            for key in ("path", "eval_path"):
                if (path := getattr(data, key)) is not None:
                    texts.local_file(path, f"data.{key}={path}")
        except UserError as error:
            return f"{number} {error}"
    return ""
