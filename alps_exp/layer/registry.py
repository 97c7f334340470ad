"""Methods by name: conf/method/NAME.yaml names the class and its hyperparameters.

Needs torch and a yaml reader only, so that solvers run where Hydra is not installed; the command line composes the same
files through Hydra and builds the solver with the same `build`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache

import yaml

from ..base.errors import UserError, nearest
from ..base.resources import check_fields, class_of, resource_root
from .method import Method


def methods() -> list[str]:
    """Names of the methods that conf/method offers."""
    return sorted(path.stem for path in (resource_root() / "conf" / "method").glob("*.yaml"))


@cache
def _method_file(name: str) -> str:
    path = resource_root() / "conf" / "method" / f"{name}.yaml"
    if name not in methods():
        raise UserError(f"unknown method {name!r}; {nearest(name, methods())}")
    return path.read_text(encoding="utf-8")


def solver(method: str | Method, **hyperparameters) -> Method:
    """The method named `method` with its yaml's hyperparameters, some of them replaced.

    Raises:
        UserError: unknown method or hyperparameter (with the nearest names), or a value that is not allowed.
    """
    if isinstance(method, Method):
        known = [field.name for field in dataclasses.fields(method)]
        for name in hyperparameters:
            if name not in known:
                raise UserError(f"{type(method).__name__} has no hyperparameter {name!r}; {nearest(name, known)}")
        return dataclasses.replace(method, **hyperparameters)
    fields = yaml.safe_load(_method_file(method))
    for name in hyperparameters:
        known = [field for field in fields if not field.startswith("_") and field != "name"]
        if name not in known:
            raise UserError(f"method {method} has no hyperparameter {name!r}; {nearest(name, known)}")
    return build({**fields, **hyperparameters})


def build(node: Mapping) -> Method:
    """The method that a composed `method` node describes (`_target_`, `name`, one key per hyperparameter)."""
    fields = {key: value for key, value in node.items() if key != "name" and not str(key).startswith("_")}
    what = f"method {node.get('name')}"
    target = class_of(node, what, Method, "method")
    check_fields(target, fields, what)
    required = {field.name for field in dataclasses.fields(target) if _is_required(field)}
    if lacking := sorted(required - set(fields)):
        raise UserError(f"{what} needs {lacking[0]}: add it to its file, or give method.{lacking[0]}=VALUE")
    return target(**fields)


def _is_required(field: dataclasses.Field) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
