"""Rate of the Gram matrix's accumulation beside the device's matrix rate, and its error: one JSON line per shape.

    python benchmarks/gram.py --device cuda --widths 2048,5120,20480 --tokens 2048 --dtype float16

Rates are in 10¹² floating-point operations per second. The accumulation's counts 2 · tokens · width², all of the
symmetric matrix, although little more than half of it is computed. `matrix_rate` is that of a product of two square
matrices of 8192 (2048 on a CPU) in the same dtype with float32 sums. The error is the largest entry's, against float64,
relative to the largest entry; `float32_error` is that of a product in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from alps_exp.calibration.capture import Accumulator
from alps_exp.layer.problem import Statistics


def seconds(call: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Mean wall time of a call, after one to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    wait()
    return (time.perf_counter() - start) / repeat


def matrix_rate(dtype: torch.dtype, device: torch.device, repeat: int) -> float:
    """The device's rate in products with float32 sums."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if device.type == "cuda" and dtype != torch.float32:
        spent = seconds(lambda: torch.mm(a, b, out_dtype=torch.float32), device, repeat)
    else:
        spent = seconds(lambda: a @ b, device, repeat)
    return 2 * size**3 / spent / 1e12


def errors(x: torch.Tensor) -> tuple[float, float]:
    """Largest relative errors of the accumulated Gram matrix and of the plain float32 product."""
    accumulator = Accumulator(x.shape[-1], Statistics.GRAM, x.device)
    accumulator.add(x)
    flat = x.reshape(-1, x.shape[-1])
    exact = flat.double().T @ flat.double()
    found = (accumulator.problem_fields()["gram"], flat.float().T @ flat.float())
    return tuple(float((gram - exact).abs().max() / exact.abs().max()) for gram in found)


def main() -> None:
    """Print a line per width."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", default="576,1536")
    parser.add_argument("--tokens", type=int, default=2048, help="per accumulation")
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rate = matrix_rate(dtype, device, options.repeat)
    for width in map(int, options.widths.split(",")):
        x = torch.randn(1, options.tokens, width, device=device).to(dtype)
        accumulator = Accumulator(width, Statistics.GRAM, device)
        spent = seconds(lambda x=x, a=accumulator: a.add(x), device, options.repeat)
        own = 2 * options.tokens * width**2 / spent / 1e12
        error, float32_error = errors(x) if width <= 8192 else (None, None)
        line = {
            "width": width,
            "tokens": options.tokens,
            "dtype": options.dtype,
            "seconds": spent,
            "rate": own,
            "matrix_rate": rate,
            "share": own / rate,
            "error": error,
            "float32_error": float32_error,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
