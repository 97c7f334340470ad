"""From command-line words to a configuration, where `sparsity` is a group of choices and also takes values.

Hydra refuses a number as the choice of a group. So before Hydra sees them, overrides such as `sparsity=0.7,2:4` are
read with Hydra's own parser, each value becomes a choice registered in the ConfigStore, and the override is rewritten
with the values quoted: `sparsity='0.7','2:4'`. Launchers ship the ConfigStore to their workers: it holds there too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType, QuotedString, RangeSweep
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..base.errors import UserError
from ..patterns import Pattern, parse_sparsity
from ..patterns.written import inconsistent, node_of, read
from ..runs import naming

# Hydra 1.3 falls back to the behaviour of 1.1 unless told; 1.4 warns when told.
_BEHAVIOUR = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}


def prepare(words: Sequence[str]) -> list[str]:
    """The overrides as Hydra can take them: values of `sparsity` registered as choices and quoted.

    Raises:
        UserError: a sparsity that is not allowed, or one given twice in different terms.
        OverrideParseException: not in Hydra's syntax.
    """
    words = _with_local_model(_with_saving_by_format([_with_plain_keys(word) for word in words]))
    overrides = OverridesParser.create().parse_overrides(words)
    values = [override for override in overrides if _names_values(override)]
    for override in overrides:
        if values and override.key_or_group.startswith("sparsity."):
            raise inconsistent(values[0].input_line, override.input_line)
    return [_quoted(override) if override in values else _open(override) for override in overrides]


def prepared(words: Sequence[str]) -> list[str]:
    """`prepare`, with Hydra's errors in the project's form. Needs Hydra to be `initialized`."""
    words = _explained(prepare, list(words))
    _refuse_lists_and_deletions(words)
    return words


def expand(words: Sequence[str], config_name: str = "config") -> tuple[list[str], list[list[str]]]:
    """A sweep's prepared overrides with those of its file, and the overrides of each job in the order of the sweep.

    Levels of sparsity that only a sweep file names (`hydra.sweeper.params`) are prepared like those of the command
    line, which replace them. Another sweeper than Hydra's own decides about its jobs as it goes: no job is known then.
    """
    return _explained(_expand, list(words), config_name)


def _expand(words: list[str], config_name: str) -> tuple[list[str], list[list[str]]]:
    app: Any = GlobalHydra.instance().hydra
    cfg = app.compose_config(config_name, words, run_mode=RunMode.MULTIRUN)
    _refuse_ignored_sweep(cfg)
    sweeper = cfg.hydra.sweeper
    if not str(sweeper._target_).endswith(".BasicSweeper"):
        return words, []
    parameters = dict(sweeper.params or {})
    if "sparsity" in parameters:
        value = parameters.pop("sparsity")
        text = ",".join(map(str, value)) if OmegaConf.is_list(value) else str(value)
        words = _merged(prepare([f"sparsity={text}"]), words)
    parser = OverridesParser.create(app.config_loader)
    shared, choices = [], {}
    for override in parser.parse_overrides([f"{key}={value}" for key, value in parameters.items()] + words):
        key = override.get_key_element()
        if override.is_hydra_override():
            shared.append(str(override.input_line))
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        elif override.is_sweep_override():
            raise UserError(f"{override.input_line}: an interval has no list of values; give one, as in {key}=0.1,0.2")
        else:
            choices[key] = [str(override.input_line)]
        if not choices.get(key, ["hydra"]):
            raise UserError(f"{override.input_line} names no value, so that nothing would run: {_remedy(override)}")
    return words, [shared + list(job) for job in itertools.product(*choices.values())]


def _remedy(override: Override) -> str:
    from .explain import options

    if isinstance(override._value, Glob):
        return f"known: {', '.join(options(override.key_or_group))}"
    return f"give its values, as in {override.get_key_element()}=0,1,2"


def _refuse_ignored_sweep(cfg: DictConfig) -> None:
    """A sweep's file means the whole configuration; without its first line Hydra puts it where nothing reads it."""
    if "sweeps" in cfg:
        name = OmegaConf.select(cfg, "hydra.runtime.choices.sweeps") or "NAME"
        raise UserError(
            f"sweeps/{name}.yaml needs '# @package _global_' as its first line: without it, it says nothing"
        )


def _merged(from_file: list[str], words: list[str]) -> list[str]:
    given = {override.get_key_element() for override in OverridesParser.create().parse_overrides(words)}
    return words if "sparsity" in given else from_file + words


@contextmanager
def initialized() -> Iterator[None]:
    """Hydra set up for this project's configuration; another use of Hydra around it is put aside meanwhile."""
    naming.register()
    _register_sweeps()
    instance = GlobalHydra.instance()
    outer, instance.hydra = instance.hydra, None
    try:
        hydra.initialize_config_module("alps_exp.conf", job_name="alps_exp", **_BEHAVIOUR)
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def compose(overrides: Sequence[str] = (), config_name: str = "config") -> DictConfig:
    """The configuration of one run, from the words that the command line takes.

    Raises:
        UserError: whatever the command line would refuse while composing.
    """
    with initialized():
        return compose_prepared(prepared(overrides), config_name)


def compose_prepared(
    words: Sequence[str], config_name: str = "config", with_hydra: bool = False, complete: bool = True
) -> DictConfig:
    """The configuration of prepared overrides. Needs Hydra to be `initialized`.

    Args:
        words: what `prepare` returned.
        config_name: the root file.
        with_hydra: with Hydra's own node.
        complete: refuse a configuration with missing keys, or with references that lead nowhere.

    Raises:
        UserError: an unknown name, a value that is not allowed, a missing one.
    """
    return _explained(_composed, list(words), config_name, with_hydra, complete)


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The project's own part of a configuration."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def _composed(words: list[str], config_name: str, with_hydra: bool, complete: bool) -> DictConfig:
    cfg = hydra.compose(config_name, overrides=words, return_hydra_config=with_hydra)
    _refuse_ignored_sweep(cfg)
    _refuse_additions(words, config_name)
    if not complete:
        return cfg
    if missing := sorted(OmegaConf.missing_keys(without_hydra(cfg))):
        raise UserError(f"{missing[0]} is not set: add {missing[0]}=VALUE")
    for group in ("model", "data", "method", "sparsity", "eval", "logger"):
        if not isinstance(cfg.get(group), DictConfig):
            raise UserError(f"{group} is not set: choose one, as in {group}=NAME (--help lists them)")
    for key in cfg:
        value = cfg[key]  # raises where an interpolation leads nowhere
        if key != "hydra" and OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)
    return cfg


def _refuse_additions(words: list[str], config_name: str) -> None:
    """Hydra takes any new key after a +; one that nothing reads would only hide a typing mistake."""
    from .explain import is_choice, unknown_key

    overrides = OverridesParser.create().parse_overrides(words)
    added = [o for o in overrides if o.is_add() or o.is_force_add()]
    added = [o for o in added if not (o.is_hydra_override() or is_choice(o) or _is_layer_sparsity(o))]
    if added:
        rest = [str(override.input_line) for override in overrides if override not in added]
        known = hydra.compose(config_name, overrides=rest)
        for override in added:
            parent, _, name = override.key_or_group.rpartition(".")
            node = OmegaConf.select(known, parent) if parent else known
            if not isinstance(node, DictConfig) or name not in node:
                raise UserError(unknown_key(override.key_or_group, rest, config_name))


def _refuse_lists_and_deletions(words: list[str]) -> None:
    """Hydra merges several choices of a group into one, and lets a key go that every run needs."""
    from .explain import is_choice, is_group

    for override in OverridesParser.create().parse_overrides(words):
        key, line = override.key_or_group, override.input_line
        if override.is_hydra_override() or key == "sweeps":
            continue
        if override.is_delete() and not is_group(override):
            raise UserError(f"{line} is not allowed: every run needs {key}; give {key}=VALUE, or leave it out")
        if not override.is_sweep_override() and is_choice(override) and isinstance(override.value(), list):
            values = ",".join(map(str, override.value()))
            raise UserError(f"{line} is a list, and a run has one {key}: -m {key}={values} runs each of them")


def _explained(function, words: list[str], *rest):
    from .explain import explain

    try:
        return function(words, *rest)
    except UserError:
        raise
    except Exception as error:
        # Whatever fails here follows from what was given: nothing has been run yet.
        raise UserError(explain(error, words)) from error


def _register_sweeps() -> None:
    # Registered rather than searched: the folder lies beside conf/, and Hydra's search path takes whole roots only.
    for resource in files("alps_exp.sweeps").iterdir():
        name, _, suffix = resource.name.rpartition(".")
        if suffix == "yaml":
            node = OmegaConf.create(resource.read_text(encoding="utf-8"))
            node.pop("table", None)  # how its table looks: docs/tables.md
            ConfigStore.instance().store(name, node, group="sweeps", package="_global_", provider="alps_exp")


def _with_plain_keys(word: str) -> str:
    """JSON's form of a dictionary in Hydra's grammar, which takes no quotes around keys."""
    key, equals, value = word.partition("=")
    if not value.lstrip().startswith("{"):
        return word

    def plain(match: re.Match) -> str:
        return match[1] + re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", match[3]) + ":"

    return key + equals + re.sub(r"""([{,]\s*)(["'])(.*?)\2\s*:""", plain, value)


def _with_saving_by_format(words: list[str]) -> list[str]:
    """save.format=packed is save=packed; a save=true beside it says nothing more."""
    if not any(word.startswith("save.format=") for word in words):
        return words
    if "save=false" in words:
        raise UserError("save=false and save.format are inconsistent: give one of them, as in save=packed")
    return [re.sub(r"^save\.format=", "save=", word) for word in words if word != "save=true"]


def _with_local_model(words: list[str]) -> list[str]:
    """A model.path without a choice of model means model=local: the default model takes no path."""
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    return ["model=local", *words] if "model.path" in keys and "model" not in keys else words


def _open(override: Override) -> str:
    # layers.sparsity maps patterns that only the user knows; everywhere else an unknown key is a mistake.
    if _is_layer_sparsity(override) and override.type is OverrideType.CHANGE:
        return f"++{override.input_line}"
    return str(override.input_line)


def _is_layer_sparsity(override: Override) -> bool:
    return override.key_or_group == "layers.sparsity" or override.key_or_group.startswith("layers.sparsity.")


def _names_values(override: Override) -> bool:
    if override.key_or_group != "sparsity" or override.is_delete():
        return False
    return any(_pattern(value) is not None for value in _values(override))


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    if isinstance(override._value, Glob) or not override.is_discrete_sweep():
        return []
    values = [value.text if isinstance(value, QuotedString) else value for value in override.sweep_iterator()]
    if isinstance(override._value, RangeSweep):
        # Hydra 1.3 adds steps in binary: range(0.5,0.8,step=0.1) ends in 0.7999999999999998 rather than before 0.8.
        values = [value for value in values if round(value, 10) != override._value.stop]
    return values


def _quoted(override: Override) -> str:
    names = []
    for value in _values(override):
        pattern = _pattern(value)
        name = str(value) if pattern is None else pattern.written
        if pattern is not None:
            ConfigStore.instance().store(name, node_of(pattern), group="sparsity", provider="alps_exp")
        names.append(f"'{name}'")
    return f"{override.get_key_element()}={','.join(names)}"


def _pattern(value: Any) -> Pattern | None:
    """The pattern that a value stands for; None if the value is the name of a choice, or no value at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    pattern = read(str(value).strip())
    if pattern is None:
        try:
            float(value)
        except ValueError:
            return None
        parse_sparsity(value)  # raises: no number beyond 1 is a sparsity
    return pattern
