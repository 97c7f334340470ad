"""From command-line words to a configuration, where `sparsity` is a group of choices and also takes values.

Hydra refuses a number as the choice of a group. So before Hydra sees them, overrides such as `sparsity=0.7,2:4` are
read with Hydra's own parser, each value becomes a choice registered in the ConfigStore, and the override is rewritten
with the values quoted: `sparsity='0.7','2:4'`. Launchers ship the ConfigStore to their workers, so this holds there too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import naming
from .errors import UserError, nearest

if TYPE_CHECKING:  # patterns needs torch, whose import takes longer than everything else here
    from .patterns import Pattern

_KINDS = {"unstructured": ("level",), "nm": ("kept", "width")}


def pattern_of(node: Mapping) -> Pattern:
    """The pattern that a composed `sparsity` node describes.

    Raises:
        UserError: unknown kind, missing or foreign keys, or values that no pattern allows.
    """
    from .patterns import NM, Unstructured

    fields = {str(key): value for key, value in node.items()}
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise UserError(f"sparsity.kind={kind} is not allowed; {nearest(str(kind), _KINDS)}")
    if foreign := set(fields) - set(_KINDS[kind]):
        raise _inconsistent(f"sparsity={kind}", f"sparsity.{min(foreign)}={fields[min(foreign)]}")
    for name in _KINDS[kind]:
        if name not in fields:
            raise UserError(f"sparsity={kind} needs sparsity.{name}")
    if kind == "unstructured":
        return Unstructured(fields["level"])
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"sparsity.{name}={value!r} is not allowed: give a whole number")
    return NM(fields["kept"], fields["width"])


def prepare(words: Sequence[str]) -> list[str]:
    """The overrides as Hydra can take them: values of `sparsity` registered as choices and quoted.

    Raises:
        UserError: a sparsity that is not allowed, or one given twice in different terms.
        OverrideParseException: not in Hydra's syntax.
    """
    overrides = OverridesParser.create().parse_overrides(list(words))
    values = [override for override in overrides if _names_values(override)]
    for override in overrides:
        if values and override.key_or_group.startswith("sparsity."):
            raise _inconsistent(values[0].input_line, override.input_line)
    return [_quoted(override) if override in values else override.input_line for override in overrides]


def expand(words: Sequence[str], parameters: Mapping[str, Any] | None = None) -> list[list[str]]:
    """The overrides of each job of a sweep, in the order in which Hydra's own sweeper runs them.

    Args:
        words: prepared overrides.
        parameters: `hydra.sweeper.params`; a word with the same key replaces one.
    """
    lines = [f"{key}={value}" for key, value in (parameters or {}).items()] + list(words)
    choices: dict[str, list[str]] = {}
    for override in OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(lines):
        if override.is_hydra_override():
            continue
        key = override.get_key_element()
        if override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        elif override.is_sweep_override():
            raise UserError(f"{override.input_line}: an interval has no end of values; list them, as in {key}=0.1,0.2")
        else:
            choices[key] = [override.input_line]
    return [list(job) for job in itertools.product(*choices.values())]


@contextmanager
def initialized() -> Iterator[None]:
    """Hydra set up for this project's configuration; another use of Hydra around it is put aside meanwhile."""
    naming.register()
    _register_sweeps()
    instance = GlobalHydra.instance()
    outer, instance.hydra = instance.hydra, None
    try:
        hydra.initialize_config_module("alps_exp.conf", job_name="alps_exp", version_base="1.3")
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def compose(overrides: Sequence[str] = (), config_name: str = "config") -> DictConfig:
    """The configuration of one run, from the words that the command line takes.

    Raises:
        UserError: whatever the command line would refuse while composing.
    """
    from .explain import explain

    overrides = list(overrides)
    try:
        prepared = prepare(overrides)
        with initialized():
            return hydra.compose(config_name, overrides=prepared)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides)) from error


def _register_sweeps() -> None:
    # Registered rather than searched: the folder lies beside conf/, and Hydra's search path takes whole roots only.
    for resource in files("alps_exp.sweeps").iterdir():
        name, _, suffix = resource.name.rpartition(".")
        if suffix == "yaml":
            node = OmegaConf.create(resource.read_text(encoding="utf-8"))
            ConfigStore.instance().store(name, node, group="sweeps", package="_global_", provider="alps_exp")


def _names_values(override: Override) -> bool:
    if override.key_or_group != "sparsity" or override.is_delete():
        return False
    return any(_node(value) is not None for value in _values(override))


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    if isinstance(override._value, Glob) or not override.is_discrete_sweep():
        return []
    return [value.text if isinstance(value, QuotedString) else value for value in override.sweep_iterator()]


def _quoted(override: Override) -> str:
    names = []
    for value in _values(override):
        node = _node(value)
        name = str(value)
        if node is not None:
            name = repr(node["level"]) if "level" in node else f"{node['kept']}:{node['width']}"
            ConfigStore.instance().store(name, node, group="sparsity", provider="alps_exp")
        names.append(f"'{name}'")
    return f"{override.get_key_element()}={','.join(names)}"


def _node(value: Any) -> dict[str, Any] | None:
    """The `sparsity` node that a value stands for; None if the value is the name of a choice, or no value at all."""
    if match := re.fullmatch(r"\s*(\d+):(\d+)\s*", value) if isinstance(value, str) else None:
        kept, width = int(match[1]), int(match[2])
        if 0 < kept < width:
            return {"kind": "nm", "kept": kept, "width": width}
    elif isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    else:
        try:
            # Ten digits: a range such as range(0.5,0.8,step=0.1) otherwise yields names like 0.7000000000000001.
            level = round(float(value), 10)
        except ValueError:
            return None
        if 0 < level < 1:
            return {"kind": "unstructured", "level": level}
    from .patterns import parse_sparsity

    parse_sparsity(value)  # raises, saying what is allowed
    raise AssertionError(f"sparsity {value!r} is neither refused nor understood")


def _inconsistent(first: str, second: str) -> UserError:
    return UserError(
        f"{first} and {second} are inconsistent: give one of them, a value (sparsity=0.6, sparsity=2:4) or a kind with "
        "its own keys (sparsity=unstructured sparsity.level=0.6, sparsity=nm sparsity.kept=2 sparsity.width=4)"
    )
