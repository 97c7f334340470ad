"""Does a mixture of experts keep the order of the methods? A Markdown table, a row for each seed and sparsity.

    python benchmarks/mixture.py --model DIR > mixture.md

The mixture is made of a trained dense model of the Llama family (sparse upcycling): its experts begin as copies of the
MLP, its router at random, and both train for some steps on text that the dense model writes. Calibration and evaluation
are on other windows of such text. A seed draws the router, the batches, and which windows calibrate and evaluate.
Cells have perplexity and the mean relative loss of the experts. Needs alps_exp.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from alps_exp import generate_tokens, prune_model
from alps_exp.evaluation.perplexity import perplexity
from alps_exp.model import loading
from alps_exp.model.blocks import BlockModel

METHODS = ("alps", "sparsegpt", "wanda", "magnitude")


@torch.no_grad()
def upcycled(dense: PreTrainedModel, experts: int, top: int) -> MixtralForCausalLM:
    """A Mixtral that computes what a Llama does: every expert is its MLP, whose routing weights sum to one."""
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    fields += ("rope_parameters", "bos_token_id", "eos_token_id")
    shared = {key: getattr(dense.config, key) for key in fields}
    config = MixtralConfig(**shared, num_local_experts=experts, num_experts_per_tok=top, sliding_window=None)
    made, own = MixtralForCausalLM(config).eval(), dense.state_dict()
    for name, weight in made.state_dict().items():
        mlp = name.partition(".mlp.")[0] + ".mlp."
        if name.endswith("experts.gate_up_proj"):
            weight.copy_(torch.cat([own[f"{mlp}gate_proj.weight"], own[f"{mlp}up_proj.weight"]]).expand_as(weight))
        elif name.endswith("experts.down_proj"):
            weight.copy_(own[f"{mlp}down_proj.weight"].expand_as(weight))
        elif name.endswith("mlp.gate.weight"):
            weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
        else:
            weight.copy_(own[name])
    return made


def train(model: nn.Module, windows: Tensor, steps: int, rate: float = 3e-4, batch: int = 8) -> None:
    """AdamW with the router's balancing loss, the rate rising over a tenth of the steps and falling to zero.

    Args:
        windows: (windows, seqlen).
        steps: of `batch` windows each.
        rate: the highest.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        drawn = windows[torch.randint(len(windows), (batch,))]
        loss = model(input_ids=drawn, labels=drawn, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def mixture_of(
    dense: PreTrainedModel, text: Tensor, seed: int, experts: int = 4, top: int = 2, steps: int = 40, windows: int = 48
) -> tuple[MixtralForCausalLM, Tensor, Tensor]:
    """A trained mixture, its calibration windows, and windows to evaluate on; it trained on neither.

    Args:
        text: (windows, seqlen), of which `windows` calibrate and as many evaluate.
        seed: of the router, the batches, and what is drawn of the text.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = text[torch.randperm(len(text))]
        made = upcycled(dense, experts, top)
        if steps:
            train(made, order[2 * windows :], steps)
    return made, order[:windows], order[windows : 2 * windows]


def measured(model: PreTrainedModel, method: str, sparsity: str, tokens: Tensor, held: Tensor) -> tuple[float, float]:
    """Perplexity of a pruned copy, and the mean relative loss of its experts."""
    pruned = copy.deepcopy(model)
    record = prune_model(pruned, tokens, method, sparsity, batch_size=16)
    losses = [row["relative_loss"] for row in record["layers"] if ".experts." in row["name"]]
    return perplexity_of(pruned, held), sum(losses) / len(losses)


def perplexity_of(model: PreTrainedModel, held: Tensor) -> float:
    """Perplexity on windows (windows, seqlen)."""
    return perplexity(BlockModel(model, torch.device("cpu")), held, 16, quiet=True)


def main() -> None:
    """Make a mixture for each seed, prune it by each method to each sparsity, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sparsities", default="0.5,0.6,0.7,2:4")
    parser.add_argument("--steps", type=int, default=40, help="of training; 0: none")
    parser.add_argument("--text", type=int, default=384, help="windows that the dense model writes")
    parser.add_argument("--seqlen", type=int, default=256)
    options = parser.parse_args()
    settings = loading.resolve({"name": "local", "path": options.model})
    dense = loading.load_model(settings, torch.float32).eval()
    text = generate_tokens(dense, loading.load_tokenizer(settings.source), options.text, options.seqlen, batch_size=128)
    print(f"| seed, sparsity | dense | {' | '.join(METHODS)} |\n|---|---|{'---|' * len(METHODS)}")
    for seed in map(int, options.seeds.split(",")):
        model, tokens, held = mixture_of(dense, text, seed, steps=options.steps)
        whole = perplexity_of(model, held)
        for sparsity in options.sparsities.split(","):
            cells = [measured(model, method, sparsity, tokens, held) for method in METHODS]
            row = " | ".join(f"{value:.2f}, {loss:.4f}" for value, loss in cells)
            print(f"| {seed}, {sparsity} | {whole:.3f} | {row} |", flush=True)


if __name__ == "__main__":
    main()
