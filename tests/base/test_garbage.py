"""The collector of garbage waits in a command of the project's own, and is left alone in other processes."""

from __future__ import annotations

import gc

import pytest

from alps_exp.base import garbage


@pytest.mark.slow
def test_it_waits_until_libraries_are_there_and_then_leaves_them_alone():
    before = gc.get_freeze_count()
    garbage.settle()
    assert gc.isenabled() and gc.get_freeze_count() == before, "nothing was begun: the process belongs to others"
    try:
        garbage.begin()
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
        garbage.settle()
        assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)
        count = gc.get_freeze_count()
        garbage.settle()
        assert gc.get_freeze_count() == count, "once"
    finally:
        gc.enable()
