"""Completion in shells: Hydra's, for groups, choices and keys, and the commands that are this project's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runs.values import ROOT

COMMANDS = ("quick", "list", "show", "diff", "report", "help")
_OPTIONS = ("-m", "--multirun", "--help", "--version", "--cfg", "--info", "--config-dir", "--config-name")
_FACTS = ("model", "method", "sparsity", "seed", "status")  # what a list is asked for most
# Hydra's function is made for bash. zsh runs it once it has been told to.
ZSH = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\nautoload -Uz bashcompinit && bashcompinit"


def commands(line: str) -> list[str]:
    """The commands that the first word of a line may become, and the options that another may."""
    _, *words = line.split(" ")
    known = COMMANDS if len(words) == 1 else ()
    return [name for name in (*known, *_OPTIONS) if name.startswith(words[-1]) and (words[-1] or name in known)]


def arguments(line: str, runs: Path) -> list[str] | None:
    """What may follow `help`, `show`, `diff`, `list` and `report`, and the values of a key that takes few; None where
    Hydra is to be asked.

    Args:
        line: as it is typed, up to the cursor.
        runs: the folder of runs.
    """
    _, *words = line.split(" ")
    if len(words) > 1 and words[0] in ("help", "show", "diff", "list", "report"):
        return [name for name in _known(words[0], runs) if name.startswith(words[-1])]
    key, equals, typed = words[-1].partition("=")
    if not equals or key not in ROOT or len(allowed := ROOT[key].words) < 2:
        return None
    said = ("null" if word is None else str(word).lower() for word in allowed)
    return [f"{key}={word}" for word in said if word.startswith(typed)]


def _known(command: str, runs: Path) -> Sequence[str]:
    if command == "help":
        from .helping import names

        return names()
    if command in ("show", "diff"):
        return sorted(file.parent.name for file in runs.glob("*/record.json"))
    # A report takes files, which the shell completes by itself.
    return [*(f"{key}=" for key in _FACTS), "--sort", "--json", "--runs"] if command == "list" else []


def split(line: str) -> tuple[str, str]:
    """The line that Hydra can complete, and what goes before each of its answers.

    `quick` takes what a run takes. Of several choices of a group (`method=wanda,al`) the last is still being typed.
    """
    command, *words = line.split(" ")
    words = words[1:] if len(words) > 1 and words[0] == "quick" else words
    key, equals, typed = (words[-1] if words else "").partition("=")
    former, comma, last = typed.rpartition(",")
    if not (equals and comma) or {"[", "{"} & set(typed):
        return " ".join([command, *words]), ""
    return " ".join([command, *words[:-1], f"{key}={last}"]), f"{key}={former},"


def answered(found: str, before: str) -> list[str]:
    """Hydra's answers as they are to be offered: no keys that begin with an underscore, `+preset=` for `+preset`."""
    words = [word for word in found.split() if "._" not in word]
    words = [f"{word}=" if word[0] == "+" and "=" not in word and word[-1] != "." else word for word in words]
    return [before + word.partition("=")[2] for word in words] if before else words
