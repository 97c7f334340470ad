"""Time and loss of one layer, or of one block of layers, per method and sparsity: one JSON line per measurement.

    python benchmarks/layer.py --device cuda --shapes opt-13b --methods alps,sparsegpt --sparsities 0.7
    python benchmarks/layer.py --shapes 576x1536 --methods alps --set growth=1.2 --repeat 3
    python benchmarks/layer.py --npz layer.npz --methods alps,wanda --sparsities 0.5,2:4

Needs torch, numpy and alps_exp, nothing else. A shape is OUTxIN, or OUTxIN*COUNT for layers that share an input; a name
(opt-13b, llama-7b, …) stands for the linear layers of one decoder block. Inputs are generated: correlated, with unequal
scales, the same for the same seed. An .npz file holds `weight` (out, in) and `gram_triu`, the Gram matrix's upper
triangle, row by row; also `mean` and `var` (in,) for DSnoT.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.layer.registry import solver
from alps_exp.numerics.precision import full_precision
from alps_exp.patterns import parse_sparsity

# Linear layers of a decoder block, (out, in, layers that share the input).
BLOCKS = {
    "smollm2-135m": [(576, 576, 1), (192, 576, 2), (576, 576, 1), (1536, 576, 2), (576, 1536, 1)],
    "opt-1.3b": [(2048, 2048, 3), (2048, 2048, 1), (8192, 2048, 1), (2048, 8192, 1)],
    "opt-6.7b": [(4096, 4096, 3), (4096, 4096, 1), (16384, 4096, 1), (4096, 16384, 1)],
    "opt-13b": [(5120, 5120, 3), (5120, 5120, 1), (20480, 5120, 1), (5120, 20480, 1)],
    "opt-30b": [(7168, 7168, 3), (7168, 7168, 1), (28672, 7168, 1), (7168, 28672, 1)],
    "llama-7b": [(4096, 4096, 3), (4096, 4096, 1), (11008, 4096, 2), (4096, 11008, 1)],
    "llama-2-70b": [(8192, 8192, 1), (1024, 8192, 2), (8192, 8192, 1), (28672, 8192, 2), (8192, 28672, 1)],
}


def parse_shapes(text: str) -> list[tuple[int, int, int]]:
    """Layers as (out, in, count) from "5120x5120*3,20480x5120" or the name of a block."""
    if text in BLOCKS:
        return BLOCKS[text]
    shapes = []
    for part in text.split(","):
        size, _, count = part.partition("*")
        rows, width = size.split("x")
        shapes.append((int(rows), int(width), int(count or 1)))
    return shapes


def generated(rows: int, width: int, count: int, tokens: int, seed: int, device: torch.device) -> list[LayerProblem]:
    """Layers with one generated input: factors shared by the inputs, own noise, log-normal scales."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    factors = max(width // 8, 1)
    mixing = normal(factors, width) / factors**0.5
    scale = torch.exp(0.5 * normal(width))
    gram = torch.zeros(width, width, device=device)
    mean = torch.zeros(width, device=device)
    square = torch.zeros(width, device=device)
    chunk = 4096
    for start in range(0, tokens, chunk):
        size = min(chunk, tokens - start)
        x = (normal(size, factors) @ mixing + 0.5 * normal(size, width) + 0.2) * scale
        gram.addmm_(x.T, x)
        mean += x.sum(0) / tokens
        square += x.square().sum(0) / tokens
    shared = Inputs(gram=gram, mean=mean, var=square - mean**2, tokens=tokens, sequences=1)
    return [LayerProblem(normal(rows, width) / width**0.5, shared) for _ in range(count)]


def from_file(path: Path, device: torch.device) -> LayerProblem:
    """The layer of an .npz file."""
    data = np.load(path)
    weight = torch.from_numpy(data["weight"]).float().to(device)
    width = weight.shape[1]
    gram = torch.zeros(width, width)
    upper = torch.triu_indices(width, width)
    gram[upper[0], upper[1]] = torch.from_numpy(data["gram_triu"]).float()
    gram = (gram + gram.triu(1).T).to(device)
    moments = {name: torch.from_numpy(data[name]).to(device) for name in ("mean", "var") if name in data}
    counts = {name: int(data[name]) for name in ("tokens", "sequences") if name in data}
    return LayerProblem(weight, Inputs(gram=gram, **moments, **counts, name=path.stem))


def measure(problems: list[LayerProblem], method: str, sparsity: str, hyperparameters: dict, repeat: int) -> list[dict]:
    """Solve layers that share an input `repeat` times; the line of each layer has the median time of the group."""
    device = problems[0].weight.device
    chosen, pattern = solver(method, **hyperparameters), parse_sparsity(sparsity)
    times, solutions = [], []
    for _ in range(repeat):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with full_precision():
            solutions = chosen.solve_group(problems, [pattern] * len(problems))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return [
        {
            "layer": problem.name,
            "shape": list(problem.weight.shape),
            "layers_in_group": len(problems),
            "method": type(chosen).__name__,
            "preset": method,
            **({"hyperparameters": hyperparameters} if hyperparameters else {}),
            "sparsity": sparsity,
            "seconds": sorted(times)[len(times) // 2] / len(problems),
            "seconds_by_phase": solution.seconds,
            "relative_loss": problem.relative_loss(solution.weight),
            "iterations": solution.iterations,
            "peak_bytes": peak,
            "device": name,
        }
        for problem, solution in zip(problems, solutions, strict=True)
    ]


def parse_value(text: str) -> float | int | str:
    """A hyperparameter's value as YAML would read it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main() -> None:
    """Print a line per layer, method and sparsity, and a total per method and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default="smollm2-135m", help="OUTxIN[*COUNT],… or one of " + ", ".join(BLOCKS))
    parser.add_argument("--npz", nargs="*", type=Path, default=[], help="measure these layers instead")
    parser.add_argument("--methods", default="alps,sparsegpt,wanda,dsnot,magnitude")
    parser.add_argument("--sparsities", default="0.7")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="hyperparameters")
    parser.add_argument("--tokens", type=int, default=0, help="generated tokens; 0: four times the width")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--warmup", action="store_true", help="solve a small layer first (libraries, compilation)")
    options = parser.parse_args()
    device = torch.device(options.device)
    hyperparameters = {name: parse_value(value) for name, _, value in (item.partition("=") for item in options.set)}
    cells = [(m, s) for m in options.methods.split(",") for s in options.sparsities.split(",")]
    if options.warmup:
        for method, sparsity in cells:
            measure(generated(512, 512, 1, 2048, 0, device), method, sparsity, hyperparameters, 1)
    totals = dict.fromkeys(cells, 0.0)
    groups = [lambda path=path: [from_file(path, device)] for path in options.npz] or [
        lambda s=shape, seed=seed: generated(*s, options.tokens or 4 * s[1], seed, device)
        for seed, shape in enumerate(parse_shapes(options.shapes))
    ]
    for group in groups:
        problems = group()
        for method, sparsity in cells:
            lines = measure(problems, method, sparsity, hyperparameters, options.repeat)
            totals[method, sparsity] += sum(line["seconds"] for line in lines)
            for line in lines:
                print(json.dumps(line), flush=True)
    for (method, sparsity), seconds in totals.items():
        print(json.dumps({"total": True, "preset": method, "sparsity": sparsity, "seconds": seconds}))


if __name__ == "__main__":
    main()
