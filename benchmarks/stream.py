"""Time and memory of pruning a model that is streamed from its files, on a checkpoint of random weights: JSON lines.

    python benchmarks/stream.py --shape opt-30b --blocks 6 --folder /tmp/stream --device-gb 40

The checkpoint is written shard by shard, so neither it nor the pruned model is ever in memory as a whole; the folder
needs room for both. One line per block, then one for the run: the first block (libraries load) and the last one
(nothing to propagate) are left out of the mean, and the whole model's figures are extrapolated from it and say so.
Needs torch, transformers, accelerate and this checkout.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from end_to_end import SHAPES, _opt, choice

from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.base.choices import PLACES
from alps_exp.checkpoints.checkpoint import INDEX
from alps_exp.evaluation.perplexity import perplexity
from alps_exp.model.blocks import BlockModel
from alps_exp.model.loading import load_streamed, resolve, skeleton
from alps_exp.model.structure import find_blocks
from alps_exp.patterns import parse_sparsity
from alps_exp.procedure.prune import prune_blocks
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.store import ProgressStore
from alps_exp.pruning.tools import Tools
from alps_exp.runs.provenance import peak_memory

SHAPES = {**SHAPES, "tiny": _opt(64, 4, 12)}


def write_checkpoint(folder: Path, shape: str, blocks: int, dtype: torch.dtype, device: torch.device) -> int:
    """Write a checkpoint of random weights, one file per block and one for the rest; its bytes."""
    config, _ = SHAPES[shape]
    config.num_hidden_layers, config.dtype = blocks, dtype
    config.architectures = ["OPTForCausalLM" if config.model_type == "opt" else "LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    network = skeleton(config, dtype)
    prefix, _ = find_blocks(network)
    files: dict[str, list[str]] = {}
    for name in network.state_dict():
        inside = name.startswith(f"{prefix}.")
        number = int(name.removeprefix(f"{prefix}.").partition(".")[0]) + 1 if inside else 0
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            files.setdefault(f"model-{number:05d}.safetensors", []).append(name)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    generator = torch.Generator(device).manual_seed(0)
    total = 0
    for file, names in files.items():
        tensors = {}
        for name in names:
            if len(shapes[name]) > 1:
                drawn = torch.randn(shapes[name], generator=generator, device=device, dtype=dtype).mul_(0.02)
            else:
                drawn = torch.full(shapes[name], float("norm" in name and name.endswith("weight")), dtype=dtype)
            tensors[name] = drawn.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += (folder / file).stat().st_size
    places = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return total


class Reporting(ProgressStore):
    """Finished blocks, each of which is told about when it is handed over."""

    device = torch.device("cpu")

    def finish(self, index, tensors, block) -> None:
        super().finish(index, tensors, block)
        line = {"block": index, "seconds": sum(block.seconds.values()), "seconds_by_phase": block.seconds}
        print(json.dumps({**line, **peak_memory(self.device)}), flush=True)


def measure(options: argparse.Namespace, checkpoint: Path, device: torch.device) -> dict:
    """Prune the streamed checkpoint and describe the cost."""
    dtype = getattr(torch, options.dtype)
    start = time.perf_counter()
    network, source = load_streamed(
        resolve({"name": "local", "path": str(checkpoint)}), dtype, pin=device.type == "cuda"
    )
    waited = _time_reading(source)
    model = BlockModel(
        network, device, source=source, hidden_states=options.hidden_states, scratch=Path(options.folder)
    )
    loading = time.perf_counter() - start
    selection = Selection()
    patterns = selection.patterns_for(linear_shapes(network, selection), parse_sparsity(options.sparsity))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, network.config.vocab_size, (options.windows, options.seqlen), generator=generator)
    chosen, target = choice(options.method)
    job = PruneJob(chosen, patterns, selection, tokens, options.batch_size, quiet=True, target=target)
    store = Reporting(Path(options.folder), {"benchmark": "stream"})
    store.device = device
    store.open()
    start = time.perf_counter()
    result = prune_blocks(model, job, Tools(store))
    total = time.perf_counter() - start
    line = {"loading_seconds": loading, "seconds": total, "seconds_by_phase": result.seconds}
    line |= {"seconds_waiting_for_reads": list(waited), "notes": result.notes}
    if options.evaluate:
        start = time.perf_counter()
        windows = tokens[: options.evaluate]
        line["perplexity"] = perplexity(model, windows, options.batch_size, quiet=True)
        line["evaluate_seconds"] = time.perf_counter() - start
    later = result.block_seconds[1:-1] or result.block_seconds
    count = SHAPES[options.shape][1]
    line |= {
        "seconds_per_block": sum(later) / len(later),
        "blocks_of_the_model": count,
        "whole_model_seconds_extrapolated": count * sum(later) / len(later),
        "shard_bytes": store.shard(0).stat().st_size,
        "whole_model_shard_bytes_extrapolated": count * store.shard(0).stat().st_size,
    }
    return {**line, **peak_memory(device)}


def _time_reading(source) -> list[float]:
    """Seconds that each block was waited for, filled as it is read; the first one cannot be read ahead."""
    waited, take = [], source.take

    def timed(*arguments):
        start = time.perf_counter()
        tensors = take(*arguments)
        waited.append(time.perf_counter() - start)
        return tensors

    source.take = timed
    return waited


def main() -> None:
    """Write the checkpoint, prune it, print a line per block and one for the run, and remove all of it."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="opt-30b", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--folder", required=True, help="an empty or new one with room for the checkpoint twice")
    parser.add_argument("--method", default="alps", help="METHOD or METHOD+stream (target=stream)")
    parser.add_argument("--sparsity", default="0.7")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--hidden-states", default="auto", choices=PLACES)
    parser.add_argument("--device-gb", type=float, help="allow PyTorch no more device memory than this (10^9 bytes)")
    parser.add_argument("--evaluate", type=int, default=0, help="windows of perplexity after pruning")
    parser.add_argument("--keep", action="store_true", help="leave the folder's content")
    options = parser.parse_args()
    device, folder = torch.device(options.device), Path(options.folder)
    if device.type == "cuda" and options.device_gb:
        share = options.device_gb * 1e9 / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device.index or 0)
    start = time.perf_counter()
    try:
        size = write_checkpoint(
            folder / "checkpoint", options.shape, options.blocks, getattr(torch, options.dtype), device
        )
        written = {"checkpoint_bytes": size, "seconds_to_write": time.perf_counter() - start}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        print(json.dumps({**vars(options), "device": name, **written}), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        print(json.dumps(measure(options, folder / "checkpoint", device)), flush=True)
    finally:
        if not options.keep:
            for place in (folder / "checkpoint", folder / ".progress"):
                shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
