"""Tasks of a few rows, and the words of a run that a tiny model is asked them in."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    import tiny_tasks

    return tiny_tasks.build(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def settings(tiny_llama: Path, source: Path) -> list[str]:
    import tiny_tasks

    return tiny_tasks.settings(tiny_llama, source)
