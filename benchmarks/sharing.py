"""Time that shared statistics save: the runs of a small sweep, first each for itself, then with the cache.

    python benchmarks/sharing.py --nsamples 8 --seqlen 512

One process, the model loaded once; propagate=dense, where all blocks have the same inputs in every run. Further words
(model=…, device=…, losses=false) go to every run. Seconds are those of calibration (reading included), and of all that
the block loop does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from alps_exp.cli.overrides import compose
from alps_exp.runs import run as runs
from alps_exp.runs.workspace import Workspace


def main() -> None:
    """Run the grid with and without the cache and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--methods", default="magnitude,wanda,dsnot,sparsegpt")
    parser.add_argument("--sparsities", default="0.7")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("words", nargs="*")
    options = parser.parse_intermixed_args()
    cells = [(method, level) for level in options.sparsities.split(",") for method in options.methods.split(",")]
    workspace, totals = Workspace(keep=True), {}
    with tempfile.TemporaryDirectory() as folder:
        for cached in (False, True):
            for method, level in cells:
                words = [f"method={method}", f"sparsity={level}", "propagate=dense", "eval=none", "logger=none"]
                words += [f"nsamples={options.nsamples}", f"seqlen={options.seqlen}", *options.words]
                cfg = compose([*words, f"statistics_cache={10 if cached else 0}"])
                record = runs.run(cfg, Path(folder) / f"{method}-{level}-{cached}", workspace)
                keys = ("calibrate_seconds", "solve_seconds", "propagate_seconds", "write_seconds")
                seconds = {key.removesuffix("_seconds"): record["phases"].get(key, 0.0) for key in keys}
                loop = sum(seconds.values())
                totals.setdefault(cached, []).append((seconds["calibrate"], loop))
                known = f"{len(record['cached_blocks'])} blocks known"
                print(f"{method} {level}: calibrate {seconds['calibrate']:.2f} s of {loop:.2f} s, {known}", flush=True)
        size = sum(file.stat().st_size for file in Path(folder).rglob(".statistics/*/*.safetensors"))
    for index, what in enumerate(("calibrate", "block loop")):
        alone, shared = (sum(times[index] for times in totals[cached]) for cached in (False, True))
        print(f"{what}: {alone:.1f} s alone, {shared:.1f} s shared, ratio {shared / alone:.2f}")
    print(f"cache: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
