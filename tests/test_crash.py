"""Killed runs go on to the same result: five kills here, `make crash` has more."""

import signal

import crash
import pytest


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> crash.Bench:
    return crash.Bench(tmp_path_factory.mktemp("crash"))


@pytest.mark.parametrize(
    ("kills", "streamed"),
    [
        # In the middle of the third block, while that block is solved anew, and after a shard without its journal.
        ([crash.Kill("solve", 9, 0.0), crash.Kill("solve", 2, 0.005), crash.Kill("journal write", 3, 0.0)], "true"),
        # While the model is written, and while the run restores what it had finished.
        ([crash.Kill("save", 1, 0.01), crash.Kill("restore", 3, 0.0)], "false"),
    ],
)
def test_killed_runs_end_in_the_same_result(bench, kills, streamed):
    trials = bench.trial(kills, f"stream={streamed}")
    assert all(trial.fired for trial in trials)
    assert trials[0].differences == ()


def test_an_interrupted_run_says_so_in_one_line_and_goes_on(bench):
    place = bench.fresh()
    assert bench.run(place, kill=crash.Kill("solve", 6, 0.0, signal.SIGINT))
    last = bench.output(place).splitlines()[-1]
    assert last.startswith("alps_exp: interrupted: the same command goes on from ")
    assert "Traceback" not in bench.output(place)
    assert not bench.run(place)
    assert "1 of 4 blocks are finished already" in bench.output(place)
    result = crash.outcome(place)
    assert result["losses"] == bench.outcome["losses"] and result["files"] == []
