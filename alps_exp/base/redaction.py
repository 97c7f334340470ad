"""Keys of online services stay out of configurations, records, logs and the terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from .errors import UserError

VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8  # a shorter value is no key, and would be found in ordinary words
_KEY_NAME = re.compile(r"(^|_)(api_?key|token|secret|password)$", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text with the values of the environment's keys replaced by the variables' names."""
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            text = text.replace(value, f"<{name}>")
    return text


def refuse_keys(cfg: Mapping) -> None:
    """Raise UserError if a configuration carries a key: it is copied to the run's directory, the record and W&B."""
    for path, value in _leaves(cfg, ""):
        named = _KEY_NAME.search(path.rpartition(".")[2]) and value is not None
        if named or (isinstance(value, str) and redacted(value) != value):
            raise UserError(
                f"{path} holds a key, which the run would write into its record: leave it out, and set "
                f"{' or '.join(VARIABLES[:2])} in the environment, or log in (wandb login, hf auth login)"
            )


def _leaves(value, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{path}.{key}" if path else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value


class RedactingFormatter(logging.Formatter):
    """The standard formatter of log files, traces included, without keys; conf/hydra/job_logging names it."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class LogFile(logging.FileHandler):
    """A log whose own failure (a full disk) is told in one line and stops nothing; conf/hydra/job_logging names it."""

    _told = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._told:
            self._told = True
            print(f"alps_exp: warning: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
