"""Completion in shells: Hydra's, for groups, choices and keys, and the commands that are this project's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("quick", "list", "show", "diff", "report", "help")
# Hydra's function is made for bash. zsh runs it once it has been told to.
ZSH = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\nautoload -Uz bashcompinit && bashcompinit"


def commands(line: str) -> list[str]:
    """The commands that the first word of a line may become."""
    _, *words = line.split(" ")
    return [name for name in COMMANDS if name.startswith(words[0])] if len(words) == 1 else []


def arguments(line: str, runs: Path) -> list[str] | None:
    """What may follow `help`, `show`, `diff` and `list`; None where the line is not of these.

    Args:
        line: as it is typed, up to the cursor.
        runs: the folder of runs.
    """
    _, *words = line.split(" ")
    if len(words) < 2 or words[0] not in ("help", "show", "diff", "list"):
        return None
    return [name for name in _known(words[0], runs) if name.startswith(words[-1])]


def _known(command: str, runs: Path) -> Sequence[str]:
    if command == "help":
        from .helping import names

        return names()
    return sorted(file.parent.name for file in runs.glob("*/record.json")) if command != "list" else []
