"""What a step of training costs in the shape of a model, with random weights: one JSON line.

    python benchmarks/training.py block --shape opt-13b --blocks 2          (finish=block of two blocks)
    python benchmarks/training.py distil --shape llama-7b --windows 16      (finish=distil)
    python benchmarks/training.py elsa --shape llama-1b --batch 8           (method=elsa)
    torchrun --nproc-per-node 2 benchmarks/training.py elsa --batch 8       (by two processes, as devices=2)

Seconds of a step are a median, with the device waited for. `share` counts 6 floating-point operations per token and
weight, without the table of embeddings, the attention's own products, the dense head of a distillation and whatever is
made again, over those of a bfloat16 product of 8192 × 8192 matrices, measured at the start; `share_of_nominal` over
`--nominal`. `with_attention` counts the attention's causal products and the dense head, too. --profile N prints the N
kernels that took most of one step. Of several processes the largest peak is told. Needs torch, transformers, alps_exp.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from end_to_end import SHAPES, _llama

from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.layer.registry import solver
from alps_exp.model.blocks import BlockModel
from alps_exp.patterns import parse_sparsity
from alps_exp.procedure.prune import prune_blocks
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.team import Alone, Team
from alps_exp.pruning.tools import Tools
from alps_exp.training.finish import BlockFinish, Distillation, Finish
from alps_exp.training.trainer import Trainer

_SHAPES = {**SHAPES, "llama-1b": _llama(2048, 5632, 32, 4, 22), "tiny": _llama(64, 160, 4, 2, 2)}
_STEPS = 8  # of ELSA


def main() -> None:
    """Time a training, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("block", "distil", "elsa"))
    parser.add_argument("--shape", choices=_SHAPES, default="llama-1b")
    parser.add_argument("--blocks", type=int, help="decoder blocks; all of the real model's by default")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sparsity", default="0.7")
    parser.add_argument("--gigabytes", type=float, help="device memory to do with")
    parser.add_argument("--micro", type=int, help="windows per backward pass; as many as fit by default")
    parser.add_argument("--nominal", type=float, default=989.0, help="TFLOP/s that the device has by its data sheet")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N longest kernels of a step")
    cuda = torch.cuda.is_available()
    team = Team.join("cuda" if cuda else "cpu") if "RANK" in os.environ else Alone()
    line = measured(parser.parse_args(), team)
    if team.leads:
        print(json.dumps(line), flush=True)
    if team.size > 1:
        team.leave()


def measured(options: argparse.Namespace, team: Team | Alone) -> dict:
    """A line of the output."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", team.rank) if cuda else torch.device("cpu")
    if options.gigabytes:
        torch.cuda.set_per_process_memory_fraction(1e9 * options.gigabytes / torch.cuda.mem_get_info()[1])
    rate = _product_rate(device)
    config, blocks = _SHAPES[options.shape]
    config.num_hidden_layers, config.vocab_size = options.blocks or blocks, min(config.vocab_size, 32000)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.randint(5, config.vocab_size, (options.windows + options.held_out, options.seqlen))
    patterns = Selection().patterns_for(linear_shapes(model, Selection()), parse_sparsity(options.sparsity))
    method, finish = solver("magnitude"), Finish()
    if options.what == "elsa":
        seen = options.windows * options.seqlen
        method = solver("elsa", steps=_STEPS, batch=options.batch, tokens=seen, interval=4, micro=options.micro)
    elif options.what == "block":
        finish = Finish(block=BlockFinish(batch=options.batch))
    else:
        finish = Finish(distil=Distillation(batch=options.batch, epochs=1))
    job = PruneJob(
        method,
        patterns,
        Selection(),
        tokens[: options.windows],
        losses=False,
        held_out=tokens[options.windows :] if finish.name != "none" else None,
        finish=finish,
    )
    steps, looks = _timed_steps(device, options.profile), _timed_looks(device)
    network, tools = BlockModel(model, device), Tools(team=team)
    tools.ladder.micro = options.micro
    result = prune_blocks(network, job, tools)
    done = result.training or result.finish.get("distil") or result.finish["blocks"][-1]
    part = network.blocks[0] if options.what == "block" else model
    weights = sum(p.numel() for p in part.parameters())
    weights -= model.get_input_embeddings().weight.numel() * (part is model)
    step = statistics.median(steps)
    tokens = options.batch * options.seqlen
    flops = 6 * weights * tokens / step
    blocks = 1 if options.what == "block" else len(network)
    more = 6 * options.seqlen * config.num_attention_heads * _head_width(config) * blocks
    more += 2 * model.get_output_embeddings().weight.numel() * (options.what == "distil")
    return vars(options) | {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "weights": weights,
        "steps": len(steps),
        "step_seconds": step,
        "step_seconds_of_all": [round(seconds, 4) for seconds in steps],
        "look_seconds": [round(seconds, 3) for seconds in looks],
        "tokens_per_second": tokens / step,
        "tflops": flops / 1e12,
        "rate": rate / 1e12,
        "share": flops / rate,
        "share_of_nominal": flops / options.nominal / 1e12,
        "with_attention": (flops + more * tokens / step) / options.nominal / 1e12,
        "micro": done["micro"],
        "block_seconds": [row["seconds"] for row in result.finish.get("blocks", [])],
        "phases": result.seconds,
        "processes": team.size,
        "peak_device_bytes": max(team.gather([torch.cuda.max_memory_allocated(device)])) if cuda else None,
        "notes": result.notes,
    }


def _head_width(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _timed_steps(device: torch.device, longest: int) -> list[float]:
    """Seconds of every step that trainers make from now on, but for one that is profiled."""
    found, inner, profiled = [], Trainer._step, [False]

    def step(self, number: int) -> None:
        _wait(device)
        if longest and number == 3 and not profiled[0]:
            profiled[0] = True
            with torch.profiler.profile() as profile:
                inner(self, number)
                _wait(device)
            key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=key, row_limit=longest, max_name_column_width=90), flush=True)
            return
        start = time.perf_counter()
        inner(self, number)
        _wait(device)
        found.append(time.perf_counter() - start)

    Trainer._step = step
    return found


def _timed_looks(device: torch.device) -> list[float]:
    """Seconds of every look at the held-out windows that trainers make from now on."""
    found, inner = [], Trainer._look

    def look(self, number: int) -> None:
        start = time.perf_counter()
        inner(self, number)
        _wait(device)
        found.append(time.perf_counter() - start)

    Trainer._look = look
    return found


def _product_rate(device: torch.device) -> float:
    size, repeats = (8192, 20) if device.type == "cuda" else (256, 3)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    _wait(device)
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
