"""Where the project's own yaml files and methods lie, and the classes that yaml files name."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from inspect import isabstract
from pathlib import Path

import yaml

from .errors import UserError, nearest

_PACKAGE = Path(__file__).parents[1]


def resource_root() -> Path:
    """The folder that holds conf/, sweeps/ and baselines/: the package itself in a wheel, its parent in a checkout."""
    return _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent


def choice_file(group: str, name: str) -> dict:
    """The content of conf/GROUP/NAME.yaml.

    Raises:
        UserError: there is none; the nearest names are told.
    """
    folder = resource_root() / "conf" / group
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown {group} {name!r}; {nearest(name, known)}")
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


def class_of(node: Mapping, what: str, base: type, noun: str) -> type:
    """The class that a node's `_target_` names.

    Args:
        node: of a yaml file or a composed configuration.
        what: how to speak of it, as in "method alps".
        base: the class that it derives from.
        noun: what such classes are, for the message.

    Raises:
        UserError: there is none, it cannot be imported, or it derives from something else.
    """
    named = node.get("_target_")
    if not isinstance(named, str):
        raise UserError(f"{what} names no class: its yaml needs _target_: MODULE.CLASS")
    module, _, attribute = named.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of the user's raises
        raise UserError(f"{what}: cannot import {named} ({type(error).__name__}: {error})") from None
    if not isinstance(target, type) or not issubclass(target, base) or target is base or isabstract(target):
        raise UserError(f"{what}: {named} is no {noun}: name a class that derives from alps_exp.{base.__name__}")
    return target


def built(node: Mapping, base: type, noun: str):
    """The value that a composed node describes: `_target_` names its class, `name` itself, every other key a field.

    Raises:
        UserError: a class that does not derive from `base`, an unknown field, or a value that is not allowed.
    """
    what = f"{noun} {node.get('name')}"
    fields = {key: value for key, value in node.items() if key != "name" and not str(key).startswith("_")}
    target = class_of(node, what, base, noun)
    check_fields(target, fields, what)
    return target(**fields)


def check_fields(target: type, names: Mapping, what: str) -> None:
    """Raise UserError for the first name that is no field of the dataclass."""
    known = {field.name for field in dataclasses.fields(target)}
    for name in names:
        if name not in known:
            hint = nearest(name, known) if known else "it has none"
            raise UserError(f"{what} has no hyperparameter {name!r}; {hint}")
