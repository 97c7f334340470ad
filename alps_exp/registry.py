"""Methods by name: conf/method/NAME.yaml names the class and its hyperparameters.

Needs torch and a yaml reader only, so that solvers run where Hydra is not installed; the command line composes the same
files through Hydra and builds the solver with the same `build`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from .errors import UserError, nearest
from .solver import Solver

_PACKAGE = Path(__file__).parent


def resource_root() -> Path:
    """The folder that holds conf/, sweeps/ and baselines/: the package itself in a wheel, its parent in a checkout."""
    return _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent


def methods() -> list[str]:
    """Names of the methods that conf/method offers."""
    return sorted(path.stem for path in (resource_root() / "conf" / "method").glob("*.yaml"))


@cache
def _method_file(name: str) -> str:
    path = resource_root() / "conf" / "method" / f"{name}.yaml"
    if name not in methods():
        raise UserError(f"unknown method {name!r}; {nearest(name, methods())}")
    return path.read_text(encoding="utf-8")


def solver(method: str | Solver, **hyperparameters) -> Solver:
    """The solver named `method` with its yaml's hyperparameters, some of them replaced.

    Raises:
        UserError: unknown method or hyperparameter (with the nearest names), or a value that is not allowed.
    """
    if isinstance(method, Solver):
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


def build(node: Mapping) -> Solver:
    """The solver that a composed `method` node describes (`_target_`, `name`, one key per hyperparameter)."""
    fields = {key: value for key, value in node.items() if key not in ("_target_", "name")}
    method, path = f"method {node.get('name')}", node.get("_target_")
    if not isinstance(path, str):
        raise UserError(f"{method} names no class: its yaml needs _target_: MODULE.CLASS")
    module, _, attribute = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of the user's raises
        raise UserError(f"{method}: cannot import {path} ({type(error).__name__}: {error})") from None
    if not isinstance(target, type) or not issubclass(target, Solver) or target is Solver:
        raise UserError(f"{method}: {path} is no method: name a class that derives from alps_exp.solver.Solver")
    known = {field.name for field in dataclasses.fields(target)}
    for name in fields:
        if name not in known:
            hint = nearest(name, known) if known else "it has none"
            raise UserError(f"{method} has no hyperparameter {name!r}; {hint}")
    required = {field.name for field in dataclasses.fields(target) if _is_required(field)}
    if lacking := sorted(required - set(fields)):
        raise UserError(f"{method} needs {lacking[0]}: add it to its file, or give method.{lacking[0]}=VALUE")
    return target(**fields)


def _is_required(field: dataclasses.Field) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
