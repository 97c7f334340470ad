"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: one line saying what was given, what is allowed, what to do.

    The command line prints the message alone and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or what kind of error it is where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase naming the known names nearest to `name`, or all of them when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.55)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}"
