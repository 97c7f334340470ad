"""What was done in a plainer and slower way than usual, for the record of the run that did it."""

from __future__ import annotations

import warnings

_lines: dict[str, None] = {}
_warned: set[str] = set()


def fell_back(line: str) -> None:
    """Remember a line for the record, and warn of it once per process."""
    _lines[line] = None
    if line not in _warned:
        _warned.add(line)
        warnings.warn(line, stacklevel=3)


def taken() -> list[str]:
    """The lines since the last call, each once."""
    lines = list(_lines)
    _lines.clear()
    return lines


def told() -> list[str]:
    """All lines of this process, each once."""
    return sorted(_warned)
