"""Seconds of pruning a whole model of SmolLM2-135M's shape, twice per method (the first time kernels are compiled).

    python benchmarks/small.py --methods alps,sparsegpt
    python benchmarks/small.py --methods alps --blocks 1 --windows 2 --seqlen 64

Random weights of decaying spectrum and norms of unequal scale, so that the layers' inputs are correlated; one JSON line
per run, with the seconds of solving by phase. Needs torch, transformers and alps_exp.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

import alps_exp


def build(blocks: int, device: torch.device) -> torch.nn.Module:
    """The model, in bfloat16."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                rows, width = parameter.shape
                low = normal(rows, width // 6) @ normal(width // 6, width)
                parameter.copy_(0.6 * low / low.std() * parameter.std() + 0.6 * parameter)
            elif "norm" in name:
                parameter.copy_(torch.exp(0.5 * normal(*parameter.shape)))
    return model


def main() -> None:
    """Print a line per run; every run starts from the same weights."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", default="alps,sparsegpt")
    parser.add_argument("--sparsity", default="0.7")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--windows", type=int, default=72)
    parser.add_argument("--seqlen", type=int, default=2048)
    options = parser.parse_args()
    model = build(options.blocks, torch.device(options.device))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (options.windows, options.seqlen), generator=generator)
    for trial in range(2):
        for method in options.methods.split(","):
            model.load_state_dict(state)
            start = time.perf_counter()
            record = alps_exp.prune_model(model, tokens, method=method, sparsity=options.sparsity, batch_size=8)
            seconds = time.perf_counter() - start
            solving: dict[str, float] = {}
            for row in record["layers"]:
                for phase, spent in (row["seconds_by_phase"] | {"all": row["seconds"]}).items():
                    solving[phase] = solving.get(phase, 0.0) + spent
            line = {"method": method, "trial": trial, "seconds": seconds, "solving": solving}
            print(json.dumps(line | {"mean_relative_loss": record["summary"]["mean_relative_loss"]}), flush=True)


if __name__ == "__main__":
    main()
