"""What `make demo` runs: every method at one sparsity on a part of the bundled model, and ALPS with its other target.

The model (SmolLM2-135M-Instruct, 4-bit, dequantised) and the web text come from pip packages and are loaded once.
"""

from __future__ import annotations

from .base import terminal, threads

if __name__ == "__main__":  # before the imports that take seconds
    terminal.settle()
    threads.begin()

import sys
import time

METHODS = ("dense", "magnitude", "wanda", "dsnot", "sparsegpt", "alps")
# What makes it a matter of minutes on two cores: the first seven of thirty blocks, and few windows of text.
REDUCED = ["sparsity=0.7", 'layers.include=["layers.[0-6].*"]', "nsamples=4", "eval.windows=3", "eval.sample_tokens=0"]
SAID = (
    "Reduced to take minutes: the first 7 of 30 blocks are pruned, calibration is on 4 windows of 1024 tokens,\n"
    "perplexity on 3. The order of the methods is that of the whole model on more text (README)."
)


def main(overrides: list[str]) -> int:
    """Run the demo with further overrides (`python -m alps_exp.demo nsamples=32`); returns the exit status."""
    start = time.perf_counter()
    # Imported here so that the time of importing counts: it is part of what the user waits for.
    from .cli import command

    def run() -> int:
        common = [*REDUCED, "complete=again", *overrides]
        lines = [[f"method={','.join(METHODS)}", *common], ["method=alps", "target=stream", *common]]
        return command.several(lines)[0]

    print(SAID, flush=True)
    status = command.guarded(run)
    if status == 0:
        print(f"{SAID}\nThe demo took {time.perf_counter() - start:.0f} s after installation.")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
