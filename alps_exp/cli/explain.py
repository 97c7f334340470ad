"""Hydra's and OmegaConf's errors in the project's form: one line with what was given, what is allowed, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from yaml.error import MarkedYAMLError

from ..base.errors import UserError, nearest
from ..base.resources import resource_root
from ..checkpoints.location import of_hub
from .completion import COMMANDS
from .names import NAMES, pasteable

_EXTRAS = {"hydra/launcher/joblib": "joblib", "hydra/launcher/submitit_local": "submitit"}
_EXTRAS |= {"hydra/launcher/submitit_slurm": "submitit", "hydra/launcher/ray": "ray", "hydra/launcher/ray_aws": "ray"}
_SPARSITY = (
    'give a fraction of zeros above 0 and below 1 (0.7), a pattern such as "2:4" or "block=32@0.7" (--help lists all), '
    "or the name of a kind of pattern"
)


def explain(error: Exception, words: Sequence[str], config_name: str = "config") -> str:
    """The line for an error that Hydra raised while composing from `words`. Needs Hydra to be initialised still."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, MarkedYAMLError):
        return _broken_yaml(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        path = str(error.missing_cfg_file)
        return _unknown_choice(path, error.options or options(path.rpartition("/")[0]))  # of a list Hydra names none
    if broken := broken_file():
        return broken
    if isinstance(error, KeyError) and not isinstance(error, OmegaConfBaseException):
        return f"hydra.job.env_copy names {error.args[0]}, which is not set in the environment: set it, or leave it out"
    text = str(error)
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        key, _, value = match[1].replace("'", "").partition("=")
        text = key in (*NAMES, "eval.prompt")
        one = f"one with a comma is written {pasteable(key, value)}" if text else f"a list is written {key}=[a,b]"
        return f"{key}={value} names several values: add -m to run each of them ({one})"
    if match := re.search(r"Could not override '(.*?)'", text):
        return unknown_key(match[1], words, config_name)
    if match := re.search(r"An item is already at '(.*?)'", text):
        return f"{match[1]} exists already: write {match[1]}=VALUE, without the +"
    if match := re.search(r"Error merging override (.*)", text):
        return f"{match[1]} is not allowed: {_first_line(error.__cause__ or error)}"
    if "group override must be a string" in text:
        return _not_a_name(words) or _first_line(error)
    return _of_omegaconf(error) if isinstance(error, OmegaConfBaseException) else _first_line(error)


def _unreadable(error: OverrideParseException) -> str:
    if re.fullmatch(r"[\w./-]+", word := str(error.override)):
        as_key = f", as {word}=VALUE would be," if re.fullmatch(r"[A-Za-z_][\w.-]*", word) else ""
        return f"cannot read {word!r}: it is no KEY=VALUE{as_key} and none of the commands {', '.join(COMMANDS)}"
    reason = re.sub(r"^Error parsing override '.*'\s*", "", str(error).split("See https://")[0].strip())
    key, equals, value = str(error.override).partition("=")
    hint = f"; as a text it is {pasteable(key, value)}" if equals and value[:1] not in ("[", "{") else ""
    return (
        f"cannot read {str(error.override)!r} ({' '.join(reason.split())}): write key=value; quote lists and "
        "dictionaries for the shell, as in 'key=[a,b]'" + hint
    )


def _broken_yaml(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
    return f"{place}, cannot be read as yaml ({error.problem or error.context}): mend it"


def broken_file() -> str | None:
    """What is wrong with a file below the folders that the user has named, if anything is."""
    for source in GlobalHydra.instance().config_loader().get_sources():
        if source.scheme() != "file":
            continue
        folder = Path(source.path)
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
            try:
                with file.open(encoding="utf-8") as stream:
                    content = yaml.safe_load(stream)
            except MarkedYAMLError as error:
                return _broken_yaml(error)
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                return f"{file} cannot be read ({_first_line(error)}): give a YAML file in UTF-8"
            if content is not None and not isinstance(content, dict):
                return f"{file} holds no keys: write it as key: value, line by line"
    return None


def _unknown_choice(path: str, options: Sequence[str]) -> str:
    group, _, name = path.rpartition("/")
    if not group:
        return f"there is no configuration {name!r}; leave out --config-name, or name its folder with --config-dir"
    if path in _EXTRAS:
        return f"{group}={name} needs its launcher: pip install 'alps-exp[{_EXTRAS[path]}]'"
    if group == "sparsity":
        return f"sparsity={name} is not allowed: {_SPARSITY}"
    if group.partition("/")[0] == "model":
        path = path.partition("/")[2]
        hint = nearest(path, options).removesuffix("?")
        return f"unknown model {path!r}; {hint}; another of the hub: {of_hub(path if '/' in path else 'OWNER/NAME')}"
    what = "sweep" if group == "sweeps" else group
    return f"unknown {what} {name!r}; {nearest(name, options)}"


def unknown_key(key: str, words: Sequence[str], config_name: str) -> str:
    """The line for a key that the configuration composed from `words` does not have."""
    group = key.split("@")[0]
    if "/" in group:
        parent = group.rpartition("/")[0]
        return f"unknown group {group!r}; {nearest(group, [f'{parent}/{option}' for option in _groups(parent)])}"
    cfg = _without_keys(words, config_name)
    node, known, path = cfg, "", key.split(".")
    # Down to the first part of the key that does not exist: only its siblings can be meant.
    while len(path) > 1 and isinstance(node, DictConfig) and isinstance(node.get(path[0]), DictConfig):
        node, known = node[path[0]], f"{known}{path[0]}."
        path = path[1:]
    names = [str(name) for name in node if str(name) not in ("name", "hydra") and not str(name).startswith("_")]
    if not known and group in _groups(""):  # one that is in no run unless it is added
        return f"{group} is added, not set: give +{group}=NAME"
    if known == "method.":
        hint = nearest(path[0], names) if names else "it has none"
        return f"method {node.get('name')} has no hyperparameter {path[0]!r}; {hint}"
    if known == "sparsity.":
        keys = ", ".join(name for name in names if name != "kind")
        return (
            f"{key} is inconsistent with sparsity={node.get('kind')}, whose keys are {keys}: "
            "give a value (sparsity=0.6, sparsity=2:4), or sparsity=unstructured sparsity.level=0.6, "
            "or sparsity=nm sparsity.kept=2 sparsity.width=4"
        )
    if path[0] in names:
        return f"unknown key {key!r}: {known}{path[0]} is a value and has no keys of its own"
    if others := _with_key(where := known.removesuffix("."), path[0]):
        named = f"{where}={node.get('name')}"
        return f"unknown key {key!r}: {named} has none, but {' or '.join(others)}: give such a choice, or leave it out"
    own = f" (and configuration {config_name!r} begins its defaults with - config)" if config_name != "config" else ""
    return f"unknown key {key!r}; {nearest(known + path[0], [known + name for name in names])}{own}"


def _with_key(group: str, key: str) -> list[str]:
    """The choices of a group of this project that have a key, as they are given: target=stream."""
    files = sorted((resource_root() / "conf" / group).glob("*.yaml")) if group else []
    nodes = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    return [f"{group}={name}" for name, node in nodes.items() if isinstance(node, dict) and key in node]


def _without_keys(words: Sequence[str], config_name: str) -> DictConfig:
    """The configuration that the choices of groups alone describe."""
    choices = [override for override in _parsed(words) if is_choice(override)]
    paths = [override for override in _parsed(words) if override.key_or_group == "hydra.searchpath"]
    for attempt in (paths + choices, paths):
        try:
            return hydra.compose(
                config_name, [str(override.input_line) for override in attempt], return_hydra_config=True
            )
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
    return DictConfig({})


def _not_a_name(words: Sequence[str]) -> str | None:
    for override in _parsed(words):
        group = override.key_or_group
        if is_choice(override) and not isinstance(override.value(), (str, list)):
            if group == "sparsity":
                return f"{override.input_line} is not allowed: {_SPARSITY}"
            return f"unknown {group} {override.value()!r}; {nearest(str(override.value()), options(group))}"
    return None


def _of_omegaconf(error: OmegaConfBaseException) -> str:
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: add {error.full_key}=VALUE"
    cause: BaseException | None = error
    while isinstance(error, InterpolationResolutionError) and cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    where = f"{error.full_key}: " if error.full_key else ""
    hint = "; a ${ that belongs to a name is written \\${" if isinstance(error, InterpolationResolutionError) else ""
    return where + _first_line(error) + hint


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _parsed(words: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(words))
    except HydraException:
        return []


def is_choice(override: Override) -> bool:
    """Whether the override chooses from a group, rather than sets a key."""
    return is_group(override) and not override.is_delete()


def is_group(override: Override) -> bool:
    """Whether the override names a group of choices."""
    group = override.key_or_group
    return bool(group) and "." not in group and bool(options(group))


def options(group: str) -> list[str]:
    """The choices of a group."""
    return GlobalHydra.instance().config_loader().get_group_options(group, results_filter=ObjectType.CONFIG)


def _groups(parent: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(parent, results_filter=ObjectType.GROUP)
