"""2:4 weights as torch's semi-structured tensors: do they convert and multiply to the same result, and how fast.

    python benchmarks/semi_structured.py                                      # OPT-13B's shapes, float16 and bfloat16
    python benchmarks/semi_structured.py --shapes 4096x4096 --tokens 1,64 --dtypes bfloat16 --repeat 50
    python benchmarks/semi_structured.py --folder results/runs/…/model        # the 2:4 layers of a saved packed model

Needs CUDA, torch, numpy, PyYAML and this checkout (safetensors for --folder). Prints one JSON line per weight (is it
the same after conversion and back) and one per product Y = XWᵀ, X (tokens, in), W (out, in) 2:4, by both of torch's
backends:

    dense_us, sparse_us    median time of one product, microseconds; the two are measured in turns
    speedup                dense_us / sparse_us
    dense_error            ‖Y - Y₆₄‖ / ‖Y₆₄‖ against the product in float64, for torch's dense product
    sparse_error           the same for the sparse one
    same                   whether sparse_error is at most 1.5 dense_error, or within the dtype's rounding of a result

The exit status is 1 if a weight was not the same after conversion or a product was not; a backend that cannot run here
gives a line with its `error` and no failure, unless none can.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

sys.path.insert(0, str(Path(__file__).parents[1]))

from alps_exp.checkpoints.packed import pack, read_folder, unpack
from alps_exp.patterns import NM

SHAPES = "5120x5120,20480x5120,5120x20480"
BACKENDS = {"cusparselt": False, "cutlass": True}  # value of torch's switch


def generated(shapes: str, dtypes: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Random weights pruned to 2:4 by magnitude, through the packed form and back."""
    for shape in shapes.split(","):
        for dtype in dtypes.split(","):
            rows, width = map(int, shape.split("x"))
            generator = torch.Generator(device).manual_seed(0)
            weight = torch.randn(rows, width, generator=generator, device=device) / width**0.5
            weight = weight.masked_fill(~NM(2, 4).keep(weight.abs()), 0).to(getattr(torch, dtype)).cpu()
            stored, entries = pack({"weight": weight})
            if entries["weight"]["scheme"] != "2:4" or not unpack(stored, entries)["weight"].equal(weight):
                raise RuntimeError(f"{shape}, {dtype}: not the same weight after packing")
            yield shape, weight


def saved(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The 2:4 weights of a packed model."""
    entries = json.loads((folder / "packed.json").read_text(encoding="utf-8"))["tensors"]
    tensors = read_folder(folder)
    for name, entry in entries.items():
        if entry["scheme"] == "2:4":
            yield name, tensors[name]


def timed(*functions, repeat: int) -> list[float]:
    """Median microseconds of each function, measured in turns on the device's own clock."""
    for function in functions:
        for _ in range(3):
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeat):
        for own, function in zip(times, functions, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            own.append(start.elapsed_time(end) * 1000)
    return [median(own) for own in times]


def distance(product: Tensor, exact: Tensor) -> float:
    """Relative error of a product."""
    return float((product.double() - exact).norm() / exact.norm())


def measure(weight: Tensor, tokens: int, backend: str, repeat: int) -> dict:
    """One product, dense and sparse."""
    SparseSemiStructuredTensor._FORCE_CUTLASS = BACKENDS[backend]
    generator = torch.Generator(weight.device).manual_seed(1)
    inputs = torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    sparse = to_sparse_semi_structured(weight)
    exact = inputs.double() @ weight.double().T
    errors = [distance(linear(inputs, kind), exact) for kind in (weight, sparse)]
    del exact
    dense_us, sparse_us = timed(lambda: linear(inputs, weight), lambda: linear(inputs, sparse), repeat=repeat)
    return {
        "dense_us": round(dense_us, 2),
        "sparse_us": round(sparse_us, 2),
        "speedup": round(dense_us / sparse_us, 3),
        "dense_error": errors[0],
        "sparse_error": errors[1],
        "same": errors[1] <= max(1.5 * errors[0], torch.finfo(weight.dtype).eps),
    }


def convert(weight: Tensor, backend: str) -> dict:
    """One weight there and back."""
    SparseSemiStructuredTensor._FORCE_CUTLASS = BACKENDS[backend]
    sparse = to_sparse_semi_structured(weight)
    return {"tensor": type(sparse).__name__, "same": bool(torch.equal(sparse.to_dense(), weight))}


def attempt(function, *arguments) -> dict:
    """The function's result, or why this device or torch cannot do it."""
    try:
        return function(*arguments)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def main() -> int:
    """Print a line per weight and product; the exit status says whether all were the same."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help=f"OUTxIN,… ({SHAPES})")
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--tokens", default="1,16,64,256,2048,8192")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="a packed model, in place of generated weights")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs CUDA")
    device = torch.device("cuda")
    weights = saved(options.folder) if options.folder else generated(options.shapes, options.dtypes, device)
    about = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    verdicts = []
    for name, weight in weights:
        weight = weight.to(device)
        label = {"weight": name, "dtype": str(weight.dtype).removeprefix("torch.")}
        for backend in options.backends.split(","):
            result = attempt(convert, weight, backend)
            print(json.dumps({**about, **label, "backend": backend, "conversion": True, **result}), flush=True)
            if "error" in result:
                continue
            verdicts.append(result["same"])
            for tokens in map(int, options.tokens.split(",")):
                result = attempt(measure, weight, tokens, backend, options.repeat)
                print(json.dumps({**about, **label, "backend": backend, "tokens": tokens, **result}), flush=True)
                if "error" not in result:
                    verdicts.append(result["same"])
    return 0 if verdicts and all(verdicts) else 1


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
