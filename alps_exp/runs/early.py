"""Mistakes in a configuration, told before torch and transformers are imported, which takes seconds.

`settings.resolve` makes the same checks, and those that need the packages, the device or the model's files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..allocation.selection import Selection
from ..base import standins
from ..base.checks import check_built, check_device
from ..base.errors import UserError
from ..checkpoints import upload
from ..data.settings import DataSettings
from ..evaluation.settings import check_values
from .naming import plain
from .values import check_among, check_root

_CHOSEN = ("target", "sensitivity", "allocation", "finish")


def check(cfg: Mapping) -> Mapping:
    """Raise UserError for a value that is not allowed, of those that no class need be asked about.

    Returns:
        The configuration as plain values.
    """
    check_root(cfg)
    content = plain(cfg)
    check_device(content["device"])
    check_built(content["device"])
    DataSettings.parse(content["data"]).check(content["seed"])
    check_values(content["eval"])
    Selection.parse(*(content["layers"][key] for key in ("include", "exclude", "sparsity")))
    check_among(content)
    if content.get("push") is not None:
        upload.check_form(str(content["push"]))
    return content


def first_mistake(contents: Sequence[Mapping]) -> tuple[int, str] | None:
    """A configuration in which something is not allowed, and what.

    What is wrong most often comes first, of whichever configuration, then what else `settings.check_words` refuses.

    Args:
        contents: what `check` has returned for each configuration.
    """
    number, _, message = (standins.answered(lambda: _first(contents)) or "").partition(" ")
    return (int(number), message) if message else None


def _first(contents: Sequence[Mapping]) -> str:
    return _refused(contents, _glance()) or _refused(contents, _whole(contents))


def _refused(contents: Sequence[Mapping], check: Callable[[Mapping], object]) -> str:
    for number, content in enumerate(contents):
        try:
            check(content)
        except UserError as error:
            return f"{number} {error}"
    return ""


def _glance() -> Callable[[Mapping], object]:
    """What is wrong most often, and needs few modules: the method's hyperparameters, the names of texts."""
    registry, texts = (standins.imported(f"alps_exp.{name}") for name in ("layer.registry", "data.texts"))

    def check(content: Mapping) -> None:
        standins.imported(content["method"]["_target_"].rpartition(".")[0])
        registry.build(content["method"])
        data = DataSettings.parse(content["data"])
        for key in ("path", "eval_path"):
            if (path := getattr(data, key)) is not None:
                texts.local_file(path, f"data.{key}={path}")

    return check


def _whole(contents: Sequence[Mapping]) -> Callable[[Mapping], object]:
    for content in contents:  # whose modules would import what stands in for others
        for node in _CHOSEN:
            if named := content[node].get("_target_"):
                standins.imported(named.rpartition(".")[0])
    return standins.imported("alps_exp.runs.settings").check_words
