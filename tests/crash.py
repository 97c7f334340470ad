"""Kills runs of a tiny model with SIGKILL, lets the same command go on, and compares the end with an undisturbed run.

    python tests/crash.py --kills 36 --sweep-kills 24 --seed 0          (make crash)
    python tests/crash.py --more "target=stream sensitivity=outputs allocation=sensitivity"

A kill is aimed at a phase: at a random moment within a random call of that phase's function. Every run is killed twice
before it may end, the second time while it resumes. Recovered means: bit-identical weights, losses, perplexity and
sample; and no layer of a finished block was solved again, which shows in the seconds of its row.

Sweeps are killed likewise, four times each, at moments of their whole length. Recovered means the same records.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch
from safetensors.torch import load_file

# What every phase spends its time in. "any" is no function: some time after the start.
PHASES = {
    "load": "alps_exp.runs.workspace.Workspace.model",
    "calibrate": "alps_exp.pruning.stages.capture",
    "solve": "alps_exp.pruning.stages.solve_layers",
    "propagate": "alps_exp.calibration.streams.Streams.advance",
    "shard write": "alps_exp.pruning.store.write_tensors",
    "journal write": "alps_exp.pruning.store.write_json",
    "evaluate": "alps_exp.evaluation.perplexity.perplexity",
    "save": "alps_exp.runs.run.save",
    "record write": "alps_exp.runs.record.RunRecord.write",
    "clean-up": "alps_exp.pruning.store.ProgressStore.clear",
    "restore": "alps_exp.pruning.loop._replay",
    "any": "alps_exp.cli.command.main",
    # Where the words of --more ask for them.
    "weigh": "alps_exp.procedure.weighing._found",
    "strength": "alps_exp.procedure.strength._tried",
}
# Those that a sweep which saves nothing goes through, and moments of its whole length most of all.
SWEPT = ["any"] * 6 + [phase for phase in PHASES if phase not in ("any", "save", "restore", "weigh", "strength")]
BLOCKS = 4


@dataclass(frozen=True)
class Kill:
    """A signal, `delay` seconds into call number `call` of a phase's function."""

    phase: str
    call: int
    delay: float
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Trial:
    """One kill and what became of it: whether the process was killed, and what differed in the end."""

    kill: Kill
    fired: bool
    differences: tuple[str, ...]


class Bench:
    """A tiny model, a text, and the outcome of an undisturbed run.

    Args:
        folder: everything is written below it.
        more: words of the command beside the usual ones.
    """

    more: tuple[str, ...] = ()

    def __init__(self, folder: Path, more: Sequence[str] = ()) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        model = tiny_models.build("llama", folder / "model", blocks=BLOCKS)
        text = folder / "text.txt"
        text.write_text("\n".join(tiny_models.documents(60, seed=3)) + "\n", encoding="utf-8")
        data = ["model=local", f"model.path={model}", "data=local", f"data.path={text}", "nsamples=8", "seqlen=48"]
        self.words = [*data, "eval.windows=6", "eval.sample_tokens=4", "device=cpu", "save=true", "batch_size=2"]
        self.words += [*self.more, *more]
        for phase in PHASES.values():
            importlib.import_module(_owner(phase)[0])
        self._number = 0
        self.calls: dict[str, list[float]] = {}
        reference = self.fresh()
        killed = self.run(reference, watch=True)
        assert not killed, self.output(reference)
        self.calls = json.loads((reference / "calls.json").read_text())
        self.outcome = self.read(reference)

    def read(self, place: Path) -> dict:
        """What must be the same in the end."""
        return outcome(place)

    def start(self, place: Path, *more: str, kill: Kill | None = None, watch: bool = False) -> int:
        """Start the command in a process of its own; its id."""
        child = os.fork()
        if child == 0:
            _child(place, [*self.words, *more], kill, watch)
        return child

    def fresh(self) -> Path:
        """A folder for a run."""
        self._number += 1
        place = self.folder / f"run{self._number}"
        place.mkdir()
        return place

    @property
    def phases(self) -> list[str]:
        """Those that an undisturbed run goes through."""
        return [phase for phase, function in PHASES.items() if self.calls.get(function)]

    def draw(self, generator: random.Random, phase: str) -> Kill:
        """A kill at a random moment of a phase."""
        lasting = self.calls.get(PHASES[phase]) or [0.01]  # an undisturbed run restores nothing
        call = generator.randrange(len(lasting))
        return Kill(phase, call + 1, generator.choice([0.0, generator.uniform(0, lasting[call])]))

    def trial(self, kills: Sequence[Kill], *more: str) -> list[Trial]:
        """One run, killed so many times, and then left to its end.

        Args:
            kills: in this order; one that comes too late for its run is not counted.
            more: further overrides.
        """
        place, fired, finished, complete = self.fresh(), [], {}, False
        for kill in kills:
            fired.append(not complete and self.run(place, *more, kill=kill))
            complete = _complete(place)
            finished |= {} if complete else _finished(place)
        if not complete:
            self.run(place, *more)
        result = outcome(place)
        if complete:  # killed after its last word: nothing is left to do, and nobody has tidied up
            result["files"] = []
        different = [name for name, value in self.outcome.items() if not _same(value, result.get(name))]
        if result:
            rows = {row["name"]: row for row in result["rows"]}
            different += [f"{name} solved again" for name, row in finished.items() if rows[name] != row]
        shutil.rmtree(place)
        return [Trial(kill, hit, tuple(different)) for kill, hit in zip(kills, fired, strict=True)]

    def run(self, place: Path, *more: str, kill: Kill | None = None, watch: bool = False) -> bool:
        """Run the command in a process of its own; whether it was killed, or interrupted by a kill's other signal."""
        _, status = os.waitpid(self.start(place, *more, kill=kill, watch=watch), 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL, 130 if kill and kill.signal == signal.SIGINT else 0), self.output(place)
        return code != 0

    def output(self, place: Path) -> str:
        """What the runs in a folder printed."""
        return (place / "output.txt").read_text()


class SweepBench(Bench):
    """Likewise for a sweep of five runs."""

    more = ("-m", "method=dense,magnitude,sparsegpt", "sparsity=0.5,2:4", "save=false", "eval.sample_tokens=0")

    def read(self, place: Path) -> dict:
        """By run: status, evaluations, rows without seconds, and files that a complete run has no use for; and the
        table without seconds."""
        from alps_exp.tables import make

        found, records = {}, []
        for path in place.glob("results/runs/*/record.json"):
            record = json.loads(path.read_text())
            rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in record["layers"]]
            rest = [file.name for file in path.parent.iterdir() if file.name.startswith((".progress", ".record"))]
            found[path.parent.name] = (record["status"], record["evaluations"], rows, rest)
            records.append({**record, "phases": {}})
        return {**found, "table": make.report(records, width=200)}

    def trial(self, kills: Sequence[Kill], *more: str) -> list[Trial]:
        """One sweep, killed so many times, and then left to its end."""
        place = self.fresh()
        fired = [self.run(place, *more, kill=kill) for kill in kills]
        self.run(place, *more)
        result = self.read(place)
        different = sorted(name for name in {*result, *self.outcome} if result.get(name) != self.outcome.get(name))
        shutil.rmtree(place)
        return [Trial(kill, hit, tuple(different)) for kill, hit in zip(kills, fired, strict=True)]


def _child(place: Path, words: list[str], kill: Kill | None, watch: bool) -> None:
    """Never returns."""
    code = 1
    try:
        os.chdir(place)
        output = open("output.txt", "a", buffering=1)  # noqa: SIM115 (as long as the process)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output  # pytest has put its own in their place
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore it
        torch.set_num_threads(1)
        calls: dict[str, list[float]] = {}
        if watch:
            for target in PHASES.values():
                _patch(target, functools.partial(_timed, calls.setdefault(target, [])))
        # Where the tests run in the background of a shell, processes are started with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if kill is not None:
            _patch(PHASES[kill.phase], functools.partial(_deadly, kill, [0]))
        from alps_exp.cli import command

        with contextlib.suppress(SystemExit):
            try:
                command.main(words)
            except SystemExit as end:
                code = end.code
        if watch:
            Path("calls.json").write_text(json.dumps(calls))
    finally:
        sys.stdout.flush()
        os._exit(code)


def _owner(target: str) -> tuple[str, list[str]]:
    """Module, and the attributes from there, of a dotted name."""
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
            return module, parts[end:]
    raise ValueError(target)


def _patch(target: str, wrapper) -> None:
    module, attributes = _owner(target)
    owner = functools.reduce(getattr, attributes[:-1], importlib.import_module(module))
    original = getattr(owner, attributes[-1])
    setattr(owner, attributes[-1], functools.wraps(original)(functools.partial(_call, wrapper, original)))
    if isinstance(owner, type):  # a partial does not bind to its instance

        def method(self, *arguments, **options):
            return wrapper(functools.partial(original, self), *arguments, **options)

        setattr(owner, attributes[-1], method)


def _call(wrapper, original, *arguments, **options):
    return wrapper(original, *arguments, **options)


def _timed(lasting: list[float], original, *arguments, **options):
    start = time.perf_counter()
    try:
        return original(*arguments, **options)
    finally:
        lasting.append(time.perf_counter() - start)


def _deadly(kill: Kill, count: list[int], original, *arguments, **options):
    count[0] += 1
    if count[0] == kill.call:
        if kill.delay == 0:
            os.kill(os.getpid(), kill.signal)

        def later():
            time.sleep(kill.delay)
            os.kill(os.getpid(), kill.signal)

        threading.Thread(target=later, daemon=True).start()
    return original(*arguments, **options)


def _run_folder(place: Path) -> Path | None:
    return next((path.parent for path in place.glob("results/runs/*/record.json")), None)


def _complete(place: Path) -> bool:
    folder = _run_folder(place)
    return folder is not None and json.loads((folder / "record.json").read_text())["status"] == "complete"


def _finished(place: Path) -> dict[str, dict]:
    """Rows of the layers whose blocks were finished, by name; read without the code under test."""
    rows = {}
    for journal in sorted(place.glob("results/runs/*/.progress/block-*.json")):
        rows |= {row["name"]: row for row in json.loads(journal.read_text())["rows"]}
    return rows


def outcome(place: Path) -> dict:
    """What must be the same, and all rows; empty for a run that did not complete."""
    folder = _run_folder(place)
    if folder is None or not _complete(place):
        return {}
    record = json.loads((folder / "record.json").read_text())
    weights = {}
    for file in (folder / "model").glob("*.safetensors"):
        weights |= load_file(file)
    return {
        "weights": weights,
        "losses": [row["relative_loss"] for row in record["layers"]],
        "perplexity": record["evaluations"],
        "sample": record["sample"],
        "files": [path.name for path in folder.iterdir() if path.name.startswith((".progress", ".model", ".record"))],
        "rows": record["layers"],
    }


def _same(one, other) -> bool:
    if isinstance(one, dict) and all(isinstance(value, torch.Tensor) for value in one.values()):
        return other is not None and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    if isinstance(one, list) and one and isinstance(one[0], dict) and "seconds" in one[0]:  # rows hold times
        return other is not None and len(one) == len(other)
    return one == other


def plan(kills: int, generator: random.Random, phases: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of phases, all as often as possible; nothing can be restored before a first kill."""
    pairs = []
    while 2 * len(pairs) < kills:
        order = generator.sample(phases, len(phases))
        late = [
            "restore" if number % 4 == 0 else phase for number, phase in enumerate(generator.sample(phases, len(order)))
        ]
        pairs += list(zip(order, late, strict=True))
    return pairs[: -(-kills // 2)]


def main() -> int:
    """Print a line per phase; the status is 0 if every kill was recovered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=36, help="of single runs, at least so many")
    parser.add_argument("--sweep-kills", type=int, default=24, help="of sweeps, at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", default="", help="words for the command of single runs")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    start, trials, sweeps = time.perf_counter(), [], []
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        bench = Bench(Path(folder) / "runs", options.more.split())
        while (done := sum(trial.fired for trial in trials)) < options.kills:
            for first, second in plan(options.kills - done, generator, bench.phases):
                kills = [bench.draw(generator, first), bench.draw(generator, second)]
                streamed = generator.random() < 0.5 and "strength" not in bench.phases  # it needs the model in memory
                trials += bench.trial(kills, f"stream={str(streamed).lower()}")
        bench = SweepBench(Path(folder) / "sweeps")
        while sum(trial.fired for trial in sweeps) < options.sweep_kills:
            sweeps += bench.trial([bench.draw(generator, phase) for phase in generator.choices(SWEPT, k=4)])
    print(f"{'phase':<15}{'kills':>6}{'recovered':>11}")
    for phase in PHASES:
        _report(phase, [trial for trial in trials if trial.kill.phase == phase])
    good = _report("all", trials, f"    seed {options.seed}, {time.perf_counter() - start:.0f} s with sweeps")
    return 0 if _report("sweeps", sweeps) and good else 1


def _report(name: str, trials: list[Trial], more: str = "") -> bool:
    hits = [trial for trial in trials if trial.fired]
    bad = [trial for trial in hits if trial.differences]
    print(f"{name:<15}{len(hits):>6}{len(hits) - len(bad):>11}{more}")
    if name in ("all", "sweeps"):
        for trial in bad:
            print(f"{trial.kill}: {', '.join(trial.differences[:4])}")
    return not bad


if __name__ == "__main__":
    sys.exit(main())
