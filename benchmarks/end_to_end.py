"""Time and memory of pruning a whole model, measured on some blocks with random weights: one JSON line per method.

    python benchmarks/end_to_end.py --shape opt-13b --blocks 4 --methods alps,alps+stream,sparsegpt
    torchrun --nproc-per-node 2 benchmarks/end_to_end.py --shape opt-13b --blocks 4      (a GPU for each process)
    python benchmarks/end_to_end.py --shape opt-13b --blocks 40 --windows 8 --methods sensitivity

With random weights the inputs of the blocks collapse onto one direction, and of OPT-13B's shape the Gram matrix of the
fortieth block's fc2 is not positive definite with SparseGPT's damping of 0.01: `--damping` gives another.

`sensitivity` is no method: it times the backward pass of `sensitivity=outputs` over the windows, all blocks and head.

Timing does not depend on the values of weights and tokens. The first block (libraries load) and the last one (nothing
to propagate) are left out of the mean; the whole model's seconds are extrapolated from it and say so. The blocks stay
in host memory and visit the device one at a time, as those of a model that does not fit do. Needs torch, transformers
and alps_exp.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.calibration.sensitivity import measure_sensitivity
from alps_exp.layer.registry import solver
from alps_exp.methods.target import LayerTarget, StreamTarget
from alps_exp.model.blocks import BlockModel
from alps_exp.patterns import parse_sparsity
from alps_exp.procedure.prune import prune_blocks
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.team import Alone, Team
from alps_exp.pruning.tools import Tools
from alps_exp.runs.provenance import peak_memory


def _opt(width: int, heads: int, blocks: int) -> tuple[OPTConfig, int]:
    shape = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "num_attention_heads": heads}
    return OPTConfig(**shape, num_hidden_layers=blocks), blocks


def _llama(width: int, inner: int, heads: int, shared: int, blocks: int) -> tuple[LlamaConfig, int]:
    shape = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
    return LlamaConfig(**shape, num_key_value_heads=shared, num_hidden_layers=blocks), blocks


# Configuration, and number of decoder blocks of the real model.
SHAPES = {
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 32, 24),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 56, 48),
    "llama-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 64, 8, 80),
}


def build(shape: str, blocks: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A model of that shape with random weights, in host memory."""
    config, _ = SHAPES[shape]
    config.num_hidden_layers = blocks
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().cpu()


def choice(method: str, damping: float | None) -> tuple:
    """The solver, perhaps with this damping, and the target of METHOD or METHOD+stream."""
    name, _, target = method.partition("+")
    chosen = solver(name) if damping is None else solver(name, damping=damping)
    return chosen, {"layer": LayerTarget, "stream": StreamTarget}[target or "layer"]()


def weigh(network: torch.nn.Module, options: argparse.Namespace, device: torch.device) -> dict:
    """Run the backward pass of `sensitivity=outputs` over all windows and describe the cost."""
    selection = Selection()
    torch.manual_seed(1)
    tokens = torch.randint(3, network.config.vocab_size, (options.windows, options.seqlen))
    shapes = linear_shapes(network, selection)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    measure_sensitivity(BlockModel(network, device, offload=True), tokens, shapes, selection.excluded, quiet=True)
    seconds = time.perf_counter() - start
    kept = {key: getattr(options, key) for key in ("shape", "blocks", "windows", "seqlen", "dtype")}
    return {"pass": "sensitivity", **kept, "seconds": seconds, **peak_memory(device)}


def measure(
    network: torch.nn.Module, options: argparse.Namespace, method: str, device: torch.device, team=None
) -> dict:
    """Prune the model in place, perhaps with a team of processes, and describe the cost."""
    selection, pattern = Selection(), parse_sparsity(options.sparsity)
    torch.manual_seed(1)  # the processes of a team draw the same tokens
    tokens = torch.randint(3, network.config.vocab_size, (options.windows, options.seqlen))
    patterns = selection.patterns_for(linear_shapes(network, selection), pattern)
    chosen, target = choice(method, options.damping)
    job = PruneJob(chosen, patterns, selection, tokens, options.batch_size, quiet=True, target=target)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = prune_blocks(BlockModel(network, device, offload=True), job, Tools(team=team or Alone()))
    total = time.perf_counter() - start
    solving = [0.0] * options.blocks
    for row in result.layers:
        solving[row.block] += row.seconds
    later = result.block_seconds[1:-1] or result.block_seconds
    mean = sum(later) / len(later)
    count = SHAPES[options.shape][1]
    return {
        "shape": options.shape,
        "processes": 1 if team is None else team.size,
        "method": method,
        "sparsity": options.sparsity,
        "blocks": options.blocks,
        "windows": options.windows,
        "seqlen": options.seqlen,
        "dtype": options.dtype,
        "seconds": total,
        "seconds_by_phase": result.seconds,
        "seconds_by_block": result.block_seconds,
        "solving_seconds_by_block": solving,
        "seconds_per_block": mean,
        "whole_model_seconds_extrapolated": mean * count,
        "relative_losses": [row.relative_loss for row in result.layers],
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def main() -> None:
    """Print a line per method; every method starts from a fresh model."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="opt-125m", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=2, help="blocks to measure")
    parser.add_argument("--methods", default="alps", help="METHOD, METHOD+stream or sensitivity, by commas")
    parser.add_argument("--sparsity", default="0.7")
    parser.add_argument("--damping", type=float, help="of the methods, in place of their own: see above")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    options = parser.parse_args()
    team, device = None, torch.device(options.device)
    if "RANK" in os.environ:
        team = Team.join(device.type)
        device = team.device
    for method in options.methods.split(","):
        network = build(options.shape, options.blocks, getattr(torch, options.dtype), device)
        weighs = method == "sensitivity"
        line = weigh(network, options, device) if weighs else measure(network, options, method, device, team)
        if team is None or team.leads:
            print(json.dumps(line), flush=True)
        del network
    if team is not None:
        team.leave()


if __name__ == "__main__":
    main()
