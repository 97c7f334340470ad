"""A sweep in one process: the model and the texts are loaded once, finished runs are skipped.

    python -m alps_exp.sweep method=dense,wanda,alps sparsity=0.5,2:4 eval=zeroshot
    python -m alps_exp.sweep --minutes 9 +sweeps=zeroshot

The words are those of `python -m alps_exp -m`, and so are the runs' directories. A method that prunes nothing runs
once, whatever the sparsities. With --minutes the sweep stops before a run that would probably take longer; the same
command goes on where it stopped, also after an interruption. A run that failed does not stop the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from . import cli, naming, overrides
from .errors import UserError
from .redaction import redacted

RUNS = Path("results/runs")


def configurations(words: Sequence[str]) -> list[DictConfig]:
    """The configurations of a sweep's words, in its order; one of several that differ in an unused sparsity only.

    Raises:
        UserError: as `python -m alps_exp -m` refuses them.
    """
    from .registry import build

    with overrides.initialized():
        words = overrides.prepared(words)
        if foreign := [word for word in words if word.lstrip("+~").startswith("hydra")]:
            raise UserError(f"{foreign[0]}: Hydra takes no part here; give that to python -m alps_exp -m")
        _, lines = overrides.expand(words)
        found = [overrides.without_hydra(overrides.compose_prepared(line, with_hydra=True)) for line in lines]
    kept: dict[str, DictConfig] = {}
    for cfg in found:
        same = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "sparsity"])
        prunes = build(OmegaConf.to_container(cfg.method, resolve=True)).prunes
        kept.setdefault(naming.config_hash(cfg if prunes else same), cfg)
    return list(kept.values())


def execute(configs: Sequence[DictConfig], again: bool = False, minutes: float | None = None) -> tuple[list[dict], int]:
    """Run configurations one after the other, sharing what they load.

    Args:
        configs: what to run; all are checked before the first starts.
        again: also run what has a complete record.
        minutes: start no run that would end later, judged by the longest so far.

    Returns:
        The records of all that is complete, and how many runs failed.

    Raises:
        UserError: a mistake found beforehand.
    """
    from . import run as runs
    from .record import FILE, is_complete
    from .workspace import Workspace

    start, longest, failed = time.perf_counter(), 0.0, 0
    for cfg in configs:
        runs.validate(cfg)
    workspace, records = Workspace(keep=True), []
    for number, cfg in enumerate(configs, 1):
        directory = RUNS / naming.run_name(cfg)
        if is_complete(directory / FILE) and not again:
            records.append(json.loads((directory / FILE).read_text(encoding="utf-8")))
            continue
        begin = time.perf_counter()
        if minutes is not None and longest and begin - start + longest > 60 * minutes:
            print(f"stopped before run {number} of {len(configs)}: the same command goes on here", flush=True)
            break
        try:
            records.append(runs.run(cfg, directory, workspace))
        except Exception as error:
            failed += 1
            if not isinstance(error, UserError):
                print(redacted(traceback.format_exc()), file=sys.stderr)
            print(redacted(f"alps_exp: {directory.name}: {error}"), file=sys.stderr, flush=True)
        gc.collect()  # the network of the run before refers to itself
        longest = max(longest, time.perf_counter() - begin)
    return records, failed


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep and print its table, or the plans with plan=true; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m alps_exp.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="start no run that would end later than this")
    parser.add_argument("words", nargs="*", help="as for python -m alps_exp -m")
    options = parser.parse_intermixed_args(arguments)
    return cli.guarded(lambda: _sweep(options.words, options.minutes))


def _sweep(words: Sequence[str], minutes: float | None) -> int:
    from . import tables
    from .plan import plan

    configs = configurations(words)
    if all(cfg.plan for cfg in configs):
        print("\n\n".join(map(plan, configs)))
        return 0
    records, failed = execute(configs, minutes=minutes)
    if records:
        print(f"\n{tables.report(records)}")
    return cli.FAILURE if failed else 0


if __name__ == "__main__":
    sys.exit(main())
