"""Hydra's and OmegaConf's errors in the project's form: one line with what was given, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Sequence


def explain(error: Exception, words: Sequence[str]) -> str:
    return " ".join(str(error).split())
