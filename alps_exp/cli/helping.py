"""alps-exp --help and help KEY: what keys, groups and choices mean, from the comments of the yaml files.

Needs neither Hydra nor torch. What the hyperparameters of a class mean is in its docstring, and what they take is asked
of the class itself, without the packages that it computes with.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..base import standins
from ..base.errors import UserError, nearest
from ..base.resources import resource_root
from ..runs.values import ROOT

_WIDTH = 100
_USE = "python -m alps_exp "
# Choices whose file explains the keys that all choices of their group have.
_REFERENCE = {"data": ("local", "generated"), "model": ("local",), "eval": ("perplexity",), "logger": ("wandb",)}
# Where keys are fields of a class that no `_target_` names: group or node → class.
_CLASSES = {
    "sensitivity": "alps_exp.calibration.sensitivity.SensitivityChoice",
    "finish": "alps_exp.training.finish.Finish",
    "finish.block": "alps_exp.training.finish.BlockFinish",
    "finish.distil": "alps_exp.training.finish.Distillation",
}
_NEEDED = {"finish": "data.holdout=8 "}  # what choices of a group cannot do without, for examples
_MANY = 20  # choices of a group that --help names

_COMMANDS = {
    "quick": """ [KEY=VALUE ...]
  The demo model with half of its weights, by SparseGPT: perplexity and a sample before and after, in a
  minute. Keys and choices are those of a run.
example: alps-exp quick sparsity=0.6""",
    "list": """ [KEY=GLOB ...] [--sort COLUMN] [--runs RUNS] [--json]
  The runs below results/runs, one a line, perhaps those alone whose configuration has these values.
example: alps-exp list method=alps --sort seconds""",
    "show": """ RUN [--runs RUNS] [--json]
  One run: what it measured, its losses by block, its worst layers. The beginning of a name is enough.
example: alps-exp show demo-alps""",
    "diff": """ RUN RUN [--runs RUNS] [--json]
  Two runs side by side: where their configurations differ, and what they measured.
example: alps-exp diff demo-alps demo-wanda""",
    "report": """ [RUNS] [--to FILE]
  All runs, and the committed ones, as one HTML file: tables to sort, plots to point at.
example: alps-exp report --to report.html""",
    "help": """ KEY | GROUP | CHOICE | COMMAND
  What it means, what it takes, its default; without a word, one screen of all.
example: alps-exp help method.rho""",
}

_OVERVIEW = """\
alps_exp prunes language models and records what each method cost in quality and time.

  alps-exp quick                               a first result: a real model, before and after
  alps-exp [GROUP=CHOICE ...] [KEY=VALUE ...]  one run; with plan=true only what it would take
  alps-exp -m method=alps,wanda sparsity=0.5,2:4   a sweep; the same command goes on where it ended
  alps-exp list | show RUN | diff RUN RUN | report   the runs so far (results/runs/RUN/record.json)
  alps-exp help KEY | GROUP | CHOICE           what it means, what it takes, its default

Groups (group=choice)
{groups}

Keys (key=value)
{keys}

Examples
  alps-exp method=sparsegpt sparsity=2:4 nsamples=64
  alps-exp model.path=DIR data.path=FILE save=true          a model and a text of your own
  alps-exp +preset=residual 'layers.exclude=["k_proj"]'     several choices by one name; some layers

Options: --cfg job (the composed configuration), --info defaults, --config-dir DIR, --version,
-sc install=SHELL (completion), --hydra-help. HYDRA_FULL_ERROR=1 shows the trace of a mistake.
python -m alps_exp is the same command."""


def main(words: Sequence[str]) -> int:
    """Explain what the words name, everything in one screen without any; returns the exit status."""
    valued = ("--config-dir", "-cd", "--config-name", "-cn", "--package", "-p")
    pairs = zip(["", *words], words, strict=False)
    named = [word for before, word in pairs if word[:1] != "-" and before not in valued]
    try:
        if not named:
            print(overview())
        for word in named:
            told = standins.answered(lambda word=word: "\n".join(explained(word)))
            print("\n".join(explained(word)) if told is None else told, flush=True)
    except UserError as error:
        print(f"alps_exp: {error}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """One screen: what can be typed, all groups, all keys."""
    lines = []
    for group in groups_known():
        names = ["0.7", "2:4", *choices(group)] if group == "sparsity" else choices(group)
        text = ", ".join(names if len(names) <= _MANY else [*names[:5], f"{len(names) - 5} others"])
        lines += textwrap.wrap(text, _WIDTH, initial_indent=f"  {group:<13}", subsequent_indent=" " * 15)
    keys = ", ".join(key for key in _root() if "." not in key)
    shown = textwrap.wrap(keys, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    return _OVERVIEW.format(groups="\n".join(lines), keys="\n".join(shown))


def explained(word: str) -> Iterator[str]:
    """The lines that explain a key, a group, GROUP=CHOICE, a choice or the last part of a key.

    Raises:
        UserError: nothing has this name; the nearest ones are told.
    """
    if word in _COMMANDS:
        yield f"alps-exp {word}{_COMMANDS[word]}"
        return
    word = word.lstrip("+")
    group, equals, choice = word.partition("=")
    if equals and group in groups_known():
        if group == "sparsity" and choice not in choices(group):  # a value
            choice = ""
        if choice and choice not in choices(group):
            raise UserError(f"unknown {group} {choice!r}; {nearest(choice, choices(group))}")
        yield from _of_choice(group, choice) if choice else _of_group(group)
        return
    word = group
    if word in groups_known():
        yield from _of_group(word)
    elif word in _root():
        yield from _of_root(word)
    elif (parts := word.partition("."))[0] in groups_known() and parts[2] in choices(parts[0]):  # finish.block
        yield from _of_choice(parts[0], parts[2])
    elif "." in word:
        yield from _of_key(word)
    elif found := [f"{g}={word}" for g in groups_known() if word in choices(g)]:
        for place, one in enumerate(found):
            yield from [""] * (place > 0)
            yield from explained(one)
    elif found := sorted({key for key in _all_keys() if key.rpartition(".")[2] == word}):
        for place, one in enumerate(found):
            yield from [""] * (place > 0)
            yield from _of_key(one)
    else:
        raise UserError(f"nothing is called {word!r}; {_near(word, names())} (--help shows all)")


def names() -> list[str]:
    """All that can be explained."""
    groups = groups_known()
    return sorted({*groups, *_root(), *_all_keys(), *(choice for group in groups for choice in choices(group))})


def groups_known() -> list[str]:
    """Groups of choices, the most used first."""
    first = ["method", "sparsity", "model", "data", "eval", "preset", "target", "sensitivity", "allocation", "finish"]
    return [*first, "logger", "sweeps"]


def choices(group: str) -> list[str]:
    """Names of a group's choices."""
    return sorted(path.stem for path in _folder(group).glob("*.yaml"))


def _folder(group: str) -> Path:
    return resource_root() / "sweeps" if group == "sweeps" else resource_root() / "conf" / group


def _near(word: str, known: Iterable[str]) -> str:
    close = nearest(word, known)
    return close if close.startswith("did") else "give a group, a key or a choice"


def page() -> str:
    """docs/keys.md: every key in a table of its group."""
    lines = [_PAGE, "", "## At the root", "", *_HEAD]
    for name, key in _root().items():
        takes = str(ROOT.get(name, ""))
        lines.append(_row(name, "", key.comment, takes, key.default))
    known = _all_keys()
    for group in groups_known():
        rows = [
            _row(word, ", ".join(one.choices), one.text, one.takes, one.default)
            for word, having in known.items()
            if word.startswith(f"{group}.")
            for one in _meanings(word, having)
        ]
        lines += ["", f"## {group}", "", *_HEAD, *rows] if rows else []
    return "\n".join(lines) + "\n"


_PAGE = """\
# Keys

Every key that a configuration has, as `alps-exp help KEY` explains it; `help GROUP` has the choices of a group.
A key without named choices means the same for all that have it. The page is written by
`python -m alps_exp.cli.helping > docs/keys.md`."""
_HEAD = ("| key | with | meaning | takes | default |", "|---|---|---|---|---|")


def _row(*cells: str) -> str:
    key, choices, text, takes, default = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| `{key}` | {choices} | {text} | {takes} | {f'`{default}`' if default else ''} |"


# What lies in the files


@dataclass(frozen=True)
class Key:
    """A key of a file: its default, as it is written, and the comment above or beside it."""

    default: str
    comment: str


@dataclass(frozen=True)
class File:
    """A yaml file: the lines to type and the text at its head, and its keys with those below them."""

    commands: tuple[str, ...]
    text: str
    keys: Mapping[str, Key]


def read(path: Path) -> File:
    """A yaml file of the project with its comments. A comment belongs to the keys below it, up to a blank line or the
    next comment."""
    head, keys, comment, fresh, parents = [], {}, [], False, []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if not text:
            comment = []
        elif text.startswith("#"):
            if not keys and not text.startswith("# @"):
                head.append(text.removeprefix("#").strip())
            comment = [*comment, text.removeprefix("#").strip()] if fresh else [text.removeprefix("#").strip()]
            fresh = True
        elif match := re.match(r"( *)([\w-]+):(?:\s+(.*))?$", line):
            depth, value = len(match[1]) // 2, match[3] or ""
            bare = re.match(r"""((?:"[^"]*"|'[^']*'|[^#"'])*?)(?:\s+#\s*(.*))?$""", value)
            value, beside = (bare[1].strip(), bare[2] or "") if bare else (value, "")
            parents = [*parents[:depth], match[2]]
            if not keys:
                comment = []  # the head is not the first key's
            keys[".".join(parents)] = Key(value, beside or " ".join(comment))
            fresh = False
    used = [line for line in head if line.startswith(_USE)]
    commands = [part.strip() for line in used for part in re.split(r"\s{2,}(?=python)", line)]
    text = " ".join(line for line in head if line and line not in used)
    return File(tuple(re.sub(r"\s{2,}.*", "", command) for command in commands), text, keys)


def _root() -> dict[str, Key]:
    """Keys of conf/config.yaml that are no group, and not Hydra's."""
    path = resource_root() / "conf" / "config.yaml"
    return {key: found for key, found in read(path).keys.items() if key.split(".")[0] not in ("defaults", "hydra")}


def _keys(group: str, choice: str) -> dict[str, Key]:
    """Keys of a choice that can be set."""
    found = read(_folder(group) / f"{choice}.yaml").keys
    hidden = ("name", "kind", "defaults")
    parents = {key.rpartition(".")[0] for key in found}
    return {
        key: one
        for key, one in found.items()
        if not key.startswith("_") and key.split(".")[0] not in hidden and key not in parents
    }


def _all_keys() -> dict[str, list[str]]:
    """Every key of a group → the choices that have it."""
    found: dict[str, list[str]] = {}
    for group in groups_known():
        if group in ("sweeps", "preset"):
            continue
        for choice in choices(group):
            for key in _keys(group, choice):
                found.setdefault(f"{group}.{key}", []).append(choice)
    return found


# What is told of them


def _of_group(group: str) -> Iterator[str]:
    names = choices(group)
    add = "+" if group in ("sweeps", "preset") else ""
    yield f"{add}{group}=CHOICE" + (" or a value: alps-exp sparsity=0.7" if group == "sparsity" else "")
    default = yaml.safe_load((resource_root() / "conf" / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    set_by = next((part[group] for part in default if isinstance(part, dict) and group in part), None)
    if group == "data":
        set_by = "the model's"
    width = max(map(len, names)) + 2
    for name in names:
        file = read(_folder(group) / f"{name}.yaml")
        value = ""
        if group == "sparsity" and file.commands:
            values = [word for word in file.commands[0].removeprefix(_USE).split() if word.startswith("sparsity=")]
            value = f"{values[0]:<22}"
        text = file.text or (f"{_default(group, name)}" if group == "model" else "")
        said = textwrap.wrap(_first_sentence(text), _WIDTH - width - 4 - len(value)) or [""]
        yield f"  {name:<{width}}{value}{said[0]}".rstrip()
        yield from (" " * (width + 2 + len(value)) + line for line in said[1:])
    yield f"default: {set_by}" if set_by else f"left out by default: give {add}{group}=CHOICE"
    yield f"more: alps-exp help {group}=CHOICE"


def _default(group: str, name: str) -> str:
    return read(_folder(group) / f"{name}.yaml").keys["path"].default


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[\w)%])\. (?=[A-Z])", text)[0].removesuffix(".")


def _of_choice(group: str, choice: str) -> Iterator[str]:
    file = read(_folder(group) / f"{choice}.yaml")
    add = "+" if group in ("sweeps", "preset") else ""
    yield f"{add}{group}={choice}"
    yield from textwrap.wrap(file.text, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    keys = {} if add else _keys(group, choice)
    if keys:
        yield "keys"
        width = max(map(len, keys)) + len(group) + 3
        for name, key in keys.items():
            yield f"  {f'{group}.{name}':<{width}}{key.default}"
        yield f"  more: alps-exp help {group}.{next(iter(keys))}"
    yield from _examples(list(file.commands) or [f"{_USE}{'-m ' * (group == 'sweeps')}{add}{group}={choice}"])


def _examples(commands: Sequence[str]) -> Iterator[str]:
    for place, command in enumerate(commands):
        yield f"{'example: ' if not place else '         '}{command.replace(_USE, 'alps-exp ')}"


def _of_root(name: str) -> Iterator[str]:
    key = _root()[name]
    yield name
    yield from textwrap.wrap(key.comment, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    values = ROOT.get(name)
    if values is not None:
        yield f"takes:   {values}"
    yield (
        f"default: {key.default}" if key.default else f"keys:    {', '.join(k for k in _root() if k.startswith(name))}"
    )
    example = values.example(key.default) if values is not None else None
    if example is not None:
        yield from _examples([f"{_USE}{name}={example}"])


def _of_key(word: str) -> Iterator[str]:
    """A key of a group, for every choice that has it, those with the same meaning together."""
    if word in _root():
        yield from _of_root(word)
        return
    known = _all_keys()
    if word not in known:
        raise UserError(f"unknown key {word!r}; {_near(word, {*known, *_root()})} (alps-exp help lists groups)")
    group = word.partition(".")[0]
    told = _meanings(word, known[word])
    yield word
    for one in told:
        if one.choices:
            yield from textwrap.wrap(
                f"{group}={', '.join(one.choices)}:", _WIDTH, initial_indent="  ", subsequent_indent="    "
            )
        yield from textwrap.wrap(one.text, _WIDTH, initial_indent="  ", subsequent_indent="  ")
        if one.takes:
            yield f"  takes:   {one.takes}"
        yield f"  default: {one.default}"
    commands = [line for c in known[word] for line in read(_folder(group) / f"{c}.yaml").commands if f"{word}=" in line]
    chosen = f"{group}={told[0].choices[0]} {_NEEDED.get(group, '')}" if told[0].choices else ""
    default = told[0].default.partition(" (")[0]
    value = "VALUE" if default in ("null", "{…}", "[]") or default.startswith("$") else default
    yield from _examples(commands[:2] or [f"{_USE}{chosen}{word}={value}"])


@dataclass(frozen=True)
class _Meaning:
    """What a key means, what it takes, and its default, for some choices of its group; for all where none are named."""

    choices: tuple[str, ...]
    text: str
    takes: str
    default: str


def _meanings(word: str, having: Sequence[str]) -> list[_Meaning]:
    """What a key of a group means, by the choices that have it: those with the same meaning together."""
    group, _, name = word.partition(".")
    reference = [choice for choice in _REFERENCE.get(group, ()) if choice in having]
    defaults = {choice: _keys(group, choice)[name] for choice in having}
    told: dict[tuple[str, str], list[str]] = {}
    for choice in reference[:1] or having:
        told.setdefault(_meaning(group, choice, name, defaults[choice].comment), []).append(choice)
    found = []
    for (text, takes), names in told.items():
        own = sorted({defaults[choice].default or "{…}" for choice in names})
        default = own[0] if len(own) == 1 else ", ".join(f"{defaults[name].default} ({name})" for name in names)
        found.append(_Meaning(() if reference else tuple(names), text, takes, default))
    return found


def _meaning(group: str, choice: str, name: str, comment: str) -> tuple[str, str]:
    """What a key means, and what it takes: by its comment, the class whose field it is, or its file's head."""
    target, field = _class(group, choice, name), name.rpartition(".")[2]
    kinds = target.__mro__ if target is not None else ()
    text = comment or next((text for text in (_described(kind, field) for kind in kinds) if text), "")
    if not text and f"`{field}`" in (head := read(_folder(group) / f"{choice}.yaml").text):
        text = head
    return text, _takes(target, field) if target is not None else ""


def _class(group: str, choice: str, name: str) -> type | None:
    node = yaml.safe_load((_folder(group) / f"{choice}.yaml").read_text(encoding="utf-8"))
    path = node.get("_target_") or _CLASSES.get(f"{group}.{name}".rpartition(".")[0])
    if path is None:
        return None
    module, _, attribute = path.rpartition(".")
    return getattr(standins.imported(module), attribute)


def _described(kind: type, field: str) -> str:
    """What the docstring of a class says of a field under "Attributes:"."""
    _, _, attributes = (kind.__doc__ or "").partition("Attributes:")
    match = re.search(
        rf"^ +(?:\w+, )*{field}(?:, \w+)*:\s+(.*?)(?=^ +\w+(?:, \w+)*: |^\s*$|\Z)", attributes, re.M | re.S
    )
    return " ".join(match[1].split()).removesuffix(".") if match else ""


def _takes(target: type, field: str) -> str:
    """What the class itself says when it is given something that it does not take."""
    try:
        target(**{field: "?"})
    except UserError as error:
        match = re.search(r"is not allowed[:;] (?:known: |give )?(.*)", str(error))
        return match[1] if match else ""
    except Exception:  # a class that needs other fields, too
        return ""
    return ""


if __name__ == "__main__":
    print(page(), end="")
