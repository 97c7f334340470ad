"""What `make demo` runs: every method at one sparsity on the bundled model.

The model (SmolLM2-135M-Instruct, 4-bit, dequantised) and the web text come from pip packages and are loaded once.
"""

from __future__ import annotations

from .base import terminal

if __name__ == "__main__":  # before the imports that take seconds
    terminal.settle()

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
    from .cli import command

    sizes = [f"nsamples={CALIBRATION_WINDOWS}", f"eval.windows={EVALUATION_WINDOWS}", f"sparsity={SPARSITY}"]
    words = ["-m", f"method={','.join(METHODS)}", *sizes, "complete=again", *overrides]
    status = command.guarded(lambda: command.command(words))
    if status == 0:
        print(f"The demo took {time.perf_counter() - start:.0f} s after installation.")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
