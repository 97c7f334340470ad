"""Seconds of ALPS on one layer under several patterns, and their ratio to plain 2:4: one line per pattern.

    python benchmarks/patterns.py --device cuda                             (a layer of OPT-13B's fc2 shape)
    python benchmarks/patterns.py --rows 64 --width 128 --patterns 2:4,2:4T

Inputs are generated: correlated, of unequal scale. Needs torch and alps_exp.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.layer.registry import solver
from alps_exp.numerics.precision import full_precision
from alps_exp.patterns import parse_sparsity

PATTERNS = "2:4,0.7,block=32@0.7,2:4T,64:2:8,4:8>2:4"


def generated(rows: int, width: int, device: torch.device) -> LayerProblem:
    """A layer with 32768 tokens' Gram matrix."""
    torch.manual_seed(0)
    weight = torch.randn(rows, width, device=device) * 0.02
    gram = torch.zeros(width, width, device=device)
    scale = torch.exp(0.7 * torch.randn(width, device=device))
    factors = max(width // 8, 1)
    mix = torch.randn(factors, width, device=device) / factors**0.5
    for _ in range(16):
        x = torch.randn(2048, factors, device=device) @ mix + 0.5 * torch.randn(2048, width, device=device)
        gram.addmm_((x * scale).T, x * scale)
    return LayerProblem(weight, Inputs(gram=gram, tokens=32768, name="fc2"), "fc2")


def main() -> None:
    """Print a line per pattern; plain 2:4 comes first, and once before to warm up."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=5120)
    parser.add_argument("--width", type=int, default=20480)
    parser.add_argument("--patterns", default=PATTERNS)
    options = parser.parse_args()
    device, plain = torch.device(options.device), 0.0
    problem = generated(options.rows, options.width, device)
    others = [text for text in options.patterns.split(",") if text != "2:4"]
    for text in ["2:4", "2:4", *others]:
        start = time.perf_counter()
        with full_precision():
            solution = solver("alps").solve(problem, parse_sparsity(text))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        plain = seconds if text == "2:4" else plain
        phases = " ".join(f"{name} {value:.2f}" for name, value in solution.seconds.items())
        loss = problem.relative_loss(solution.weight)
        print(f"{text:14} {seconds:7.2f} s {seconds / plain:6.2f} x 2:4  loss {loss:.5f}  {phases}", flush=True)


if __name__ == "__main__":
    main()
