"""Memory that pruning takes beside the model, over model sizes: one JSON line per size, then the exponent.

    python benchmarks/working_memory.py --methods struprune,osscar --widths 128,256,512
    python benchmarks/working_memory.py --device cuda --widths 1024,2048,4096 --depth 4

Random Llama-like models of hidden size w, 4 w channels and heads of 32, with `--depth` blocks, or with w / 64 of them
(`--depth 0`). Each measurement is a process of its own. On a GPU it is the peak of allocated memory less the model's;
on a CPU the growth of the largest resident size from the loaded model on, after one forward of all windows, which is
good to some MB. The exponent is the slope of log memory over log N, N the weights of the blocks, by least squares;
STRUPRUNE's authors claim 1/2.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def measured(method: str, width: int, depth: int, tokens: int, device: str) -> dict:
    """One line."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import alps_exp

    torch.manual_seed(0)
    heads = max(width // 32, 1)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth or max(width // 64, 1),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=tokens,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)
    ids = torch.randint(0, 256, (4, tokens))
    with torch.no_grad():
        for window in ids:
            model(window[None].to(device))
    if device == "cuda":  # the model alone is what is allocated now
        torch.cuda.reset_peak_memory_stats()
    before = _peak(device)
    record = alps_exp.prune_model(model, ids, method=method, sparsity=0.3)
    return {
        "method": method,
        "width": width,
        "weights": record["summary"]["block_weights"],
        "bytes": max(_peak(device) - before, 1),
        "device": device,
        "tokens": ids.numel(),
    }


def _peak(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def exponent(sizes: list[int], memory: list[int]) -> float:
    """Slope of log memory over log size."""
    x, y = ([math.log(value) for value in values] for values in (sizes, memory))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True))
    return above / sum((one - mean_x) ** 2 for one in x)


def main() -> None:
    """Measure each method at each width, every one in a process of its own, and print lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="struprune")
    parser.add_argument("--widths", default="128,256,512")
    parser.add_argument("--depth", type=int, default=2, help="blocks; 0: a 64th of the width")
    parser.add_argument("--tokens", type=int, default=64, help="of each of 4 windows")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    widths = [int(width) for width in options.widths.split(",")]
    if options.one:
        found = measured(options.methods, widths[0], options.depth, options.tokens, options.device)
        print(json.dumps(found), flush=True)
        return
    for method in options.methods.split(","):
        lines = []
        for width in widths:
            words = ["--one", "--methods", method, "--widths", str(width), "--depth", str(options.depth)]
            words += ["--tokens", str(options.tokens), "--device", options.device]
            end = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
            lines.append(json.loads(end.stdout.splitlines()[-1]))
            print(json.dumps(lines[-1]), flush=True)
        if len(lines) > 1:
            slope = exponent([line["weights"] for line in lines], [line["bytes"] for line in lines])
            print(json.dumps({"method": method, "depth": options.depth, "exponent": round(slope, 3)}), flush=True)


if __name__ == "__main__":
    main()
