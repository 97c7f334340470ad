"""The collector of garbage waits in a command of the project's own, and is left alone in other processes."""

from __future__ import annotations

import gc

import pytest

from alps_exp.base import garbage


@pytest.mark.slow
def test_it_waits_until_libraries_are_there_and_then_leaves_them_alone():
    # Threads of earlier tests may free some of what was frozen meanwhile, so that counts may fall.
    before = gc.get_freeze_count()
    garbage.settle()
    assert gc.isenabled() and gc.get_freeze_count() <= before, "nothing was begun: the process belongs to others"
    try:
        garbage.begin()
        assert not gc.isenabled()
        made = [[] for _ in range(10_000)]
        garbage.settle()
        count = gc.get_freeze_count()
        assert gc.isenabled() and count > before + len(made) // 2
        made += [[] for _ in range(10_000)]
        garbage.settle()
        assert gc.get_freeze_count() < count + len(made) // 4, "once"
    finally:
        gc.enable()
