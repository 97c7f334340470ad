"""Killed runs go on to the same result: five kills here, `make crash` has more."""

import os
import random
import re
import signal

import crash
import pytest

pytestmark = pytest.mark.heavy  # starts processes


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


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory) -> crash.SweepBench:
    return crash.SweepBench(tmp_path_factory.mktemp("sweeps"))


def test_killed_sweeps_end_in_the_same_records(sweeps):
    assert sum(value[0] == "complete" for value in sweeps.outcome.values()) == 5
    assert sweeps.outcome["table"].count("magnitude") == 2, sweeps.outcome["table"]
    generator = random.Random(0)
    # Within the last words of the second run, in the middle of the third, and at two moments anywhere.
    kills = [crash.Kill("clean-up", 1, 0.0), crash.Kill("solve", 6, 0.0)]
    trials = sweeps.trial([*kills, sweeps.draw(generator, "any"), sweeps.draw(generator, "any")])
    assert sum(trial.fired for trial in trials) >= 2
    assert trials[0].differences == ()


def test_two_sweeps_of_one_grid_divide_it(sweeps):
    place = sweeps.fresh()
    processes = [sweeps.start(place), sweeps.start(place)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0], sweeps.output(place)
    text = sweeps.output(place)
    made = re.findall(r"^complete in \S+ s: ([^\s,]+)", text, re.MULTILINE)
    assert sorted([*made, "table"]) == sorted(sweeps.outcome), text
    assert sum(map(int, re.findall(r"before, (\d) run now", text))) == 5
    assert sweeps.read(place) == sweeps.outcome
