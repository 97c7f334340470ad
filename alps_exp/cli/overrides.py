"""From command-line words to a configuration, where `sparsity` is a group of choices and also takes values.

Hydra refuses a number as the choice of a group. So before Hydra sees them, overrides such as `sparsity=0.7,2:4` are
read with Hydra's own parser, each value becomes a choice registered in the ConfigStore, and the override is rewritten
with the values quoted: `sparsity='0.7','2:4'`. Launchers ship the ConfigStore to their workers: it holds there too.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.conf import HydraConf
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from ..base.errors import UserError, nearest
from ..base.redaction import refuse_keys, refuse_keys_in
from ..patterns import Pattern, parse_sparsity
from ..patterns.written import inconsistent, node_of, pattern_of, read
from ..runs import naming
from .names import NAMES
from .repository import Repository, lean

# Hydra 1.3 falls back to the behaviour of 1.1 unless told; 1.4 warns when told.
_BEHAVIOUR = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}

# Parts of Hydra's own configuration that this project chooses otherwise. They replace Hydra's defaults instead of being
# named by conf/config.yaml, so that a root file of one's own can begin with `- config`.
_HYDRA = {"job_logging": "file", "hydra_logging": "quiet"}


def prepare(words: Sequence[str], config_name: str = "config") -> list[str]:
    """The overrides as Hydra can take them: names quoted, values of `sparsity` registered as choices and quoted.

    Raises:
        UserError: a sparsity that is not allowed, or one given twice in different terms.
        OverrideParseException: not in Hydra's syntax.
    """
    words = [_readable(_with_plain_keys(word)) for word in words]
    words = _with_local_choices(_with_pushing(_with_saving_by_format(words)), config_name)
    overrides = _parsed_all(words)
    values = [override for override in overrides if _names_values(override)]
    for override in overrides:
        if values and override.key_or_group.startswith("sparsity."):
            raise inconsistent(values[0].input_line, override.input_line)
    return [_quoted(override) if override in values else _open(override) for override in overrides]


def prepared(words: Sequence[str], config_name: str = "config") -> list[str]:
    """`prepare`, with Hydra's errors in the project's form, and no keys. Needs Hydra to be `initialized`."""
    refuse_keys_in(words)
    words = _explained(prepare, list(words), config_name)
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

    def composed(words: list[str]) -> DictConfig:
        cfg: DictConfig = app.compose_config(config_name, words, run_mode=RunMode.MULTIRUN)
        return cfg

    try:
        cfg = composed(words)
    except HydraException:
        words, cfg = _left_to_jobs(words, composed)
    _refuse_ignored_sweep(cfg)
    refuse_keys(OmegaConf.to_container(cfg, resolve=False))
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
    for override in parser.parse_overrides([_readable(f"{key}={value}") for key, value in parameters.items()] + words):
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


def _left_to_jobs(words: list[str], composed: Callable[[list[str]], DictConfig]) -> tuple[list[str], DictConfig]:
    """Hydra composes a sweep without the choices that differ among its jobs or that its file makes; there
    `target.strength=auto` names no key, though every job has `target: stream`. So a value for a group that such a
    choice, or a preset among them, sets becomes a list of one, which only jobs are given.
    """
    overrides = _parsed_all(words)
    values = {
        str(override.input_line): override.get_key_element().split(".")[0]
        for override in overrides
        if "." in override.key_or_group
        and override.type == OverrideType.CHANGE
        and not (override.is_sweep_override() or override.is_hydra_override())
    }
    cfg = composed([word for word in words if word not in values])
    chosen = [
        *(cfg.hydra.sweeper.get("params") or {}),
        *(o.get_key_element() for o in overrides if o.is_sweep_override()),
    ]
    groups = {str(key).lstrip("+") for key in chosen}
    left = {word for word, group in values.items() if group in groups or "preset" in groups}
    words = [_list_of_one(word) if word in left else word for word in words]
    return words, composed(words)


def _list_of_one(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}=choice({value or repr('')})"


def _remedy(override: Override) -> str:
    from .explain import options

    if isinstance(override._value, Glob) and (known := options(override.key_or_group)):
        return f"known: {', '.join(known)}"
    return f"give its values, as in {override.get_key_element()}=0,1,2"


def _refuse_ignored_sweep(cfg: DictConfig) -> None:
    """A sweep's file means the whole configuration; without its first line Hydra puts it where nothing reads it."""
    if "sweeps" in cfg:
        name = OmegaConf.select(cfg, "hydra.runtime.choices.sweeps") or "NAME"
        raise UserError(
            f"sweeps/{name}.yaml needs '# @package _global_' as its first line: without it, it says nothing"
        )


def _merged(from_file: list[str], words: list[str]) -> list[str]:
    given = {override.get_key_element() for override in _parsed_all(words)}
    return words if "sparsity" in given else from_file + words


@contextmanager
def initialized(folder: Path | None = None) -> Iterator[None]:
    """Hydra set up for this project's configuration; another use of Hydra around it is put aside meanwhile.

    Args:
        folder: of configuration files beside the project's own.
    """
    naming.register()
    instance, store = GlobalHydra.instance(), ConfigStore.instance()
    store.repo.setdefault("sweeps", {}).update(_sweeps())
    outer, instance.hydra = instance.hydra, None
    theirs = store.repo["hydra"]["config.yaml"]
    store.repo["hydra"]["config.yaml"] = _hydra()
    try:
        hydra.initialize_config_module("alps_exp.conf", job_name="alps_exp", **_BEHAVIOUR)
        loader: Any = GlobalHydra.instance().config_loader()
        path = loader.get_search_path()
        if folder is not None:
            path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema", path=None))
        loader.repository = Repository(path)
        with lean():
            yield
    finally:
        store.repo["hydra"]["config.yaml"] = theirs
        GlobalHydra.instance().hydra = outer


def compose(overrides: Sequence[str] = (), config_name: str = "config") -> DictConfig:
    """The configuration of one run, from the words that the command line takes.

    Raises:
        UserError: whatever the command line would refuse while composing.
    """
    with initialized():
        return compose_prepared(prepared(overrides, config_name), config_name)


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


def check_places(cfg: DictConfig) -> None:
    """Raise UserError where Hydra's own node, which names the folders to write to, has references that lead nowhere."""

    def resolved(words: list[str]) -> None:
        for key in ("run", "sweep", "job"):
            OmegaConf.to_container(cfg.hydra[key], resolve=True)

    _explained(resolved, [])


def _composed(words: list[str], config_name: str, with_hydra: bool, complete: bool) -> DictConfig:
    cfg = hydra.compose(config_name, overrides=words, return_hydra_config=True)
    _refuse_ignored_sweep(cfg)
    refuse_keys(OmegaConf.to_container(cfg, resolve=False))
    _refuse_additions(words, config_name)
    chdir = cfg.hydra.job.chdir
    if not with_hydra:
        with open_dict(cfg):
            del cfg["hydra"]
    if not complete:
        return cfg
    if chdir:
        raise UserError(
            "hydra.job.chdir=true is not allowed: relative paths are those of the folder where the command is given, "
            "and a run writes to its own directory anyway (hydra.run.dir=DIR); leave it out"
        )
    if missing := sorted(OmegaConf.missing_keys(without_hydra(cfg) if with_hydra else cfg)):
        raise UserError(f"{missing[0]} is not set: add {missing[0]}=VALUE")
    _refuse_foreign_keys(cfg, words, config_name)
    for group in (
        "model",
        "data",
        "method",
        "sparsity",
        "target",
        "sensitivity",
        "allocation",
        "finish",
        "eval",
        "logger",
    ):
        if not isinstance(cfg.get(group), DictConfig):
            raise UserError(f"{group} is not set: choose one, as in {group}=NAME (--help lists them)")
    for key in cfg:
        value = cfg[key]  # raises where an interpolation leads nowhere
        if key != "hydra" and OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)
    _refuse_another_sparsity(cfg, words)
    return cfg


def _refuse_another_sparsity(cfg: DictConfig, words: list[str]) -> None:
    """A value of the command line is a choice to Hydra, whose keys a file of the user's then sets otherwise."""
    for override in _parsed_all([word for word in words if word.startswith("sparsity=")][-1:]):  # the last one counts
        given = _pattern(override.value())
        if given is not None and (made := pattern_of(cfg.sparsity)) != given:
            raise UserError(
                f"{override.input_line} and a configuration file, which makes it {made.written}, are inconsistent: "
                "leave sparsity out of one of them"
            )


@cache
def _known(text: str) -> dict[str, set[str]]:
    """The keys of the root, under "", and those of the groups whose choices all have the same.

    Args:
        text: a choice of data; that of generated text has other keys.
    """
    conf = files("alps_exp.conf")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
    places = {"": ["config"], "model": ["model", "local"], "data": ["data", text], "eval": ["eval", "perplexity"]}
    found = {
        group: yaml.load(conf.joinpath(*folder, f"{name}.yaml").read_text(encoding="utf-8"), Loader=loader)
        for group, (*folder, name) in places.items()
    }
    groups = {key for part in found[""]["defaults"] if isinstance(part, dict) for key in part}
    return {group: set(node) - {"defaults"} for group, node in found.items()} | {"": {*found[""], *groups, "table"}}


def _refuse_foreign_keys(cfg: DictConfig, words: list[str], config_name: str) -> None:
    """Keys that a file of the user's sets and nothing reads, and those that a root file of the user's leaves out."""
    known = _known("generated" if "temperature" in (cfg.get("data") or {}) else "local")
    for group, allowed in known.items():
        node = cfg.get(group) if group else cfg
        if group == "eval" and isinstance(node, DictConfig) and "_target_" in node:  # whose class knows its own keys
            if lacking := sorted(allowed - set(node)):
                raise UserError(f"eval={node.get('name')} has no {lacking[0]}: begin its defaults with - none")
            continue
        for key in sorted(map(str, set(node) - allowed)) if isinstance(node, DictConfig) else ():
            path = f"{group}.{key}" if group else key
            if not group and any(word.lstrip("+").startswith(f"{key}=") for word in words):
                raise UserError(f"{key}: its file sets nothing that a run reads: begin it with # @package _global_")
            raise UserError(f"unknown key {path!r} in a configuration file; {nearest(key, allowed)}")
    lacking = sorted(known[""] - {"hydra", "defaults", "table"} - set(cfg))
    if lacking and config_name != "config":
        raise UserError(f"configuration {config_name!r} has no {lacking[0]}: begin its defaults with - config")


def _refuse_additions(words: list[str], config_name: str) -> None:
    """Hydra takes any new key after a +; one that nothing reads would only hide a typing mistake."""
    from .explain import is_choice, unknown_key

    overrides = _parsed_all(words)
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
    """Hydra merges several choices of a group into one, which only those of finish mean, and lets a key go that every
    run needs."""
    from .explain import is_choice, is_group

    for override in _parsed_all(words):
        key, line = override.key_or_group, override.input_line
        if override.is_hydra_override() or key == "sweeps":
            continue
        if override.is_delete() and not is_group(override):
            raise UserError(f"{line} is not allowed: every run needs {key}; give {key}=VALUE, or leave it out")
        if not override.is_sweep_override() and isinstance(override.value(), list) and is_choice(override):
            if key == "finish" and override.value() and all(isinstance(value, str) for value in override.value()):
                continue
            values = ",".join(map(str, override.value()))
            raise UserError(f"{line} is a list, and a run has one {key}: -m {key}={values} runs each of them")


def _explained(function, words: list[str], *rest):
    from .explain import broken_file, explain

    try:
        return function(words, *rest)
    except UserError as error:
        raise UserError(broken_file() or str(error)) from error
    except Exception as error:
        # Whatever fails here follows from what was given: nothing has been run yet.
        raise UserError(explain(error, words, *rest[:1])) from error


@cache
def _sweeps() -> dict[str, ConfigNode]:
    # Registered rather than searched: the folder lies beside conf/, and Hydra's search path takes whole roots only.
    resources = [resource for resource in files("alps_exp.sweeps").iterdir() if resource.name.endswith(".yaml")]
    return {resource.name: _Sweep(resource.name, resource.read_text(encoding="utf-8")) for resource in resources}


class _Sweep(ConfigNode):
    """A sweep's file, parsed when it is chosen: all of them take longer than all else that a command needs."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.group, self.package, self.provider = name, "sweeps", "_global_", "alps_exp"
        self._text = text

    def __getattr__(self, name: str) -> DictConfig:
        if name != "node":
            raise AttributeError(name)
        self.node = OmegaConf.create(self._text)
        self.node.pop("table", None)  # how its table looks: docs/tables.md
        return self.node


@cache
def _hydra() -> ConfigNode:
    defaults = [{key: _HYDRA.get(key, value) for key, value in part.items()} for part in HydraConf().defaults]
    node = copy.deepcopy(ConfigStore.instance().repo["hydra"]["config.yaml"].node)
    node.defaults = defaults
    return ConfigNode("config.yaml", node, "hydra", None, "hydra")


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
    given = [(key.lstrip("+"), value, word) for word in words for key, _, value in [word.partition("=")]]
    forms = [(value, word) for key, value, word in given if key == "save.format"]
    if not forms:
        return words
    form, first = forms[0]
    for key, value, word in given:
        if (key == "save" and value not in (form, "true")) or (key == "save.format" and value != form):
            raise UserError(f"{word} and {first} are inconsistent: give one of them, as in save=packed")
    return [word for key, _, word in given if key not in ("save", "save.format")] + [f"save={form}"]


def _with_pushing(words: list[str]) -> list[str]:
    """save.push=NAME is push=NAME, and save=true where nothing is said of how to save."""
    pushes = [word for word in words if word.lstrip("+").startswith("save.push=")]
    if not pushes:
        return words
    rest = [word for word in words if word not in pushes]
    saved = any(word.partition("=")[0].lstrip("+") == "save" for word in rest)
    return [*rest, *([] if saved else ["save=true"]), f"push={pushes[-1].partition('=')[2]}"]


def _with_local_choices(words: list[str], config_name: str) -> list[str]:
    """A model.path without a choice of model means model=local, since the default model takes no path; so do texts.

    A choice that a file of the user's makes stays.
    """
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    for group in ("data", "model"):
        if f"{group}.path" in keys and group not in keys and not _is_chosen(group, words, config_name):
            words = [f"{group}=local", *words]
    return words


def _is_chosen(group: str, words: list[str], config_name: str) -> bool:
    added = [word for word in words if re.match(r"\+[\w/-]+=", word)]
    if not added and config_name == "config":
        return False
    app: Any = GlobalHydra.instance().hydra
    mine = app.compose_config(config_name, added, run_mode=RunMode.MULTIRUN).hydra
    default = app.compose_config("config", [], run_mode=RunMode.MULTIRUN).hydra
    return mine.runtime.choices[group] != default.runtime.choices[group] or group in (mine.sweeper.get("params") or {})


def _readable(word: str) -> str:
    """The word with names quoted that Hydra's grammar would not read, or not as they are written."""
    head, equals, value = word.partition("=")
    key = head.lstrip("+")
    if not equals or word.startswith("~"):
        return word
    if key in ("hydra.run.dir", "hydra.sweep.dir") and value.startswith("~"):  # Hydra would make a folder called ~
        value = os.path.expanduser(value)
        word = f"{head}={value}"
    override, parts = _parsed(f"{key}={value}"), _split(value)
    whole = override is not None and (key not in NAMES or (override.is_sweep_override() and len(parts) == 1))
    return word if whole else f"{head}={','.join(_readable_part(key, part) for part in parts)}"


def _readable_part(key: str, text: str) -> str:
    override = _parsed(f"x={text}")
    if override is not None:
        kinds = (int, float, list) if key == "eval.path" else (int, float, list, dict)
        kept = isinstance(override._value, bool) and key == "resume"
        return quote(text) if key in NAMES and isinstance(override._value, kinds) and not kept else text
    for opening, closing in ["{}"] if key == "eval.path" else [] if key in NAMES else ["[]", "{}"]:
        if text.startswith(opening) and text.endswith(closing):
            items = ",".join(_readable_item(part) for part in _split(text[1:-1]))
            if _parsed(f"x={opening}{items}{closing}") is not None:
                return f"{opening}{items}{closing}"
    # Brackets and quotes outside of names are rather a list or a text that was cut.
    return quote(text) if key in NAMES or not re.search(r"[][{}()\"']", text) else text


def _readable_item(text: str) -> str:
    """One of a list's items or a dictionary's pairs."""
    if _parsed(f"x=[{text}]") is not None or _parsed(f"x={{{text}}}") is not None:
        return text
    name, colon, value = text.partition(":")
    return f"{name}:{quote(value.strip())}" if colon and _parsed(f"x={{{name}:1}}") is not None else quote(text.strip())


def quote(text: str) -> str:
    """A text in the quotes of Hydra's grammar."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _parsed(word: str) -> Override | None:
    try:
        return _parse(word)
    except HydraException:
        return None


def _parsed_all(words: Sequence[str]) -> list[Override]:
    return [_parse(word) for word in words]


@lru_cache(1024)
def _parse(word: str) -> Override:
    return OverridesParser.create().parse_overrides([word])[0]


def _split(text: str) -> list[str]:
    """The parts of a text between the commas that lie outside of brackets and quotes."""
    parts, depth, quoted = [""], 0, ""
    for sign in text:
        if quoted:
            quoted = "" if sign == quoted and not parts[-1].endswith("\\") else quoted
        elif sign in "'\"" and (not parts[-1].strip() or parts[-1][-1] in "[{(:"):
            quoted = sign
        elif sign == "," and depth == 0:
            parts.append("")
            continue
        else:
            depth = max(0, depth + (sign in "([{") - (sign in ")]}"))
        parts[-1] += sign
    return parts


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
        if pattern is not None and f"{name}.yaml" not in ConfigStore.instance().repo.get("sparsity", ()):
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
