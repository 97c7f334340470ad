"""Keys whose values are names that users have given, and how such a value is pasted into a shell."""

from __future__ import annotations

import shlex

from hydra.core.override_parser.types import Quote, QuotedString

# Keys whose values are names that somebody has given, of files, folders, branches and the like. They are taken as they
# are written, also where Hydra would read a number or a list, or nothing at all.
NAMES = ("model.path", "model.name", "model.revision", "model.gguf_file", "data.path", "data.eval_path", "data.column")
NAMES += ("eval.path", "eval.task_source", "resume", "logger.project", "logger.entity", "logger.group", "push")
NAMES += ("hydra.run.dir", "hydra.sweep.dir")


def pasteable(key: str, text: str) -> str:
    """The word that gives a key this text, for the shell."""
    return shlex.quote(f"{key}={QuotedString(text=text, quote=Quote.double).with_quotes()}")
