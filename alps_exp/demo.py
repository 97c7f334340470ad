"""The main job on its embedded default: `make demo`.

A real model (SmolLM2-135M-Instruct, 4-bit, dequantised) and real web text, both from pip packages, pruned by all five
methods at one sparsity; the model and the texts are loaded once.
"""

from __future__ import annotations

import sys
import time

METHODS = ("dense", "magnitude", "wanda", "dsnot", "sparsegpt", "alps")
SPARSITY = "0.7"
CALIBRATION_WINDOWS = 6
EVALUATION_WINDOWS = 5


def main(overrides: list[str]) -> int:
    """Run the demo with further overrides (`python -m alps_exp.demo nsamples=32`); returns the exit status."""
    start = time.perf_counter()
    # Imported here so that the time of importing counts: it is part of what the user waits for.
    from . import cli

    return cli.guarded(lambda: _demo(overrides, start))


def _demo(overrides: list[str], start: float) -> int:
    from . import cli, sweep, tables
    from .overrides import compose

    sizes = [f"nsamples={CALIBRATION_WINDOWS}", f"eval.windows={EVALUATION_WINDOWS}", f"sparsity={SPARSITY}"]
    configs = [compose([f"method={method}", *sizes, *overrides]) for method in METHODS]
    records, failed = sweep.execute(configs, again=True)
    if failed:
        return cli.FAILURE
    print(f"\n{tables.report(records)}\n")
    print(f"The demo took {time.perf_counter() - start:.0f} s after installation.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
