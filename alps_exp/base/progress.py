"""Progress with time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Iterates over long work, showing how far it is and how long it will take.

    Args:
        items: the work.
        label: what it is.
        lines: at most this many plain lines when standard error is not a terminal.
        quiet: show nothing.
    """

    def __init__(self, items: Collection[T], label: str, lines: int = 10, quiet: bool = False) -> None:
        self._items = items
        self._label = label
        self._total = len(items)
        self._every = max(1, -(-self._total // max(lines, 1)))
        self._quiet = quiet
        self._bar = None
        self._note = ""

    def note(self, text: str) -> None:
        """What to show beside the count, such as the last loss."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __iter__(self) -> Iterator[T]:
        if self._quiet:
            yield from self._items
        elif sys.stderr.isatty():
            self._bar = tqdm(self._items, desc=self._label, total=self._total, dynamic_ncols=True, leave=False)
            yield from self._bar
        else:
            yield from self._with_lines()

    def _with_lines(self) -> Iterator[T]:
        start = time.perf_counter()
        for done, item in enumerate(self._items, 1):
            yield item
            if done % self._every == 0 or done == self._total:
                spent = time.perf_counter() - start
                left = spent / done * (self._total - done)
                note = f", {self._note}" if self._note else ""
                print(
                    f"{self._label}: {done}/{self._total}, {spent:.0f} s, {left:.0f} s left{note}",
                    file=sys.stderr,
                    flush=True,
                )
