"""Keys of online services stay out of configurations, records, logs and the terminal; folders, of what is published."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from .errors import UserError

VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8  # a shorter value is no key, and would be found in ordinary words
_SHORTEST_OF_OTHERS = 16  # of variables that only their name makes a key
_NAMES = r"(?:api_?key|access_?key|secret_?key|token|secret|passw(?:or)?d)"
_KEY_NAME = re.compile(rf"(^|[_-]){_NAMES}$", re.IGNORECASE)
# Tokens of the hub, W&B and GitHub by their form, and user and password in an address.
_KEY = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bwandb_v\d_\w{20,}|\b(?:gh[pousr]|github_pat)_\w{30,}"
    r"|(?<=://)(?:[^\s/@:]*:[^\s/@]+|[^\s/@]{20,})(?=@)"
)
# HF_TOKEN=value and "api_key": "value" within a longer text, such as a line of shell; not HF_TOKEN=$VARIABLE.
_ASSIGNED = re.compile(rf"{_NAMES}(?:=|[\"']\s*:\s*)[\"']?(?![$<])[^\s\"']{{{_SHORTEST},}}", re.IGNORECASE)
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*['\"]?(\w+)")


def redacted(text: str) -> str:
    """The text with the values of the environment's keys replaced by the variables' names, and other keys left out."""
    return redaction()(text)


def redaction() -> Callable[[str], str]:
    """`redacted` for many texts: the environment's keys are looked up once."""
    return partial(_without, _keys())


def _keys() -> list[tuple[str, str]]:
    """Name and value of the environment's variables that are keys."""
    found = [(name, value) for name, value in os.environ.items() if _KEY_NAME.search(name)]
    return [(n, v) for n, v in found if len(v) >= (_SHORTEST if n in VARIABLES else _SHORTEST_OF_OTHERS)]


def _without(keys: list[tuple[str, str]], text: str) -> str:
    for name, value in keys:
        text = text.replace(value, f"<{name}>")
    return _KEY.sub("<key>", text)


# A slash that begins a word, and all folders up to the last name. Neither URLs nor relative paths begin so.
_ABSOLUTE = re.compile(r"""(?<![\w.~:/\\-])/(?:[^/\s'"()\[\],;:]+/)+(?=[^/\s'"()\[\],;:])""")


def without_paths(value):
    """The value with absolute paths cut to their last name: folders of one machine mean nothing on another."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return _ABSOLUTE.sub("", value) if isinstance(value, str) else value


def refuse_keys(cfg: Mapping) -> None:
    """Raise UserError if a configuration carries a key: it is copied to the run's directory, the record and W&B.

    Args:
        cfg: a configuration, also of Hydra; references in it may be unresolved.
    """
    keys = _keys()
    for path, value in _leaves(cfg, ""):
        if _holds_key(path, value, keys):
            raise _refused(path)


def refuse_keys_in(words: Sequence[str]) -> None:
    """Raise UserError if overrides carry a key, which Hydra and a sweep's list of runs would keep as they are given."""
    keys = _keys()
    for word in words:
        path, _, value = word.lstrip("+~").partition("=")
        if _holds_key(path, value, keys) or _holds_key("", path, keys):
            raise _refused(redacted(path))


def _refused(path: str) -> UserError:
    return UserError(
        f"{path} holds a key, which the run would write into its record: leave it out, and set "
        f"{' or '.join(VARIABLES[:2])} in the environment, or log in (wandb login, hf auth login)"
    )


def _holds_key(path: str, value, keys: list[tuple[str, str]]) -> bool:
    if not isinstance(value, str):
        return value is not None and not isinstance(value, bool) and _is_key_name(path)
    if value in ("", "null", "???"):
        return False
    if any(_KEY_NAME.search(name) for name in _FROM_ENVIRONMENT.findall(value)):
        return True
    plain = _FROM_ENVIRONMENT.sub(lambda match: os.environ.get(match[1], ""), value)
    return _is_key_name(path) or _without(keys, plain) != plain or _ASSIGNED.search(value) is not None


def _is_key_name(path: str) -> bool:
    return _KEY_NAME.search(path.rpartition(".")[2]) is not None


def _leaves(value, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key in value:
            yield path, str(key)
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
