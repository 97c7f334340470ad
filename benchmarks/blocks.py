"""SparseLLM and OSSCAR beside plain implementations in the same process: one JSON line per measurement.

    python benchmarks/blocks.py sparsellm --pseudo-inverse normal     # Llama-7B's block, 32 windows of 2048 tokens
    python benchmarks/blocks.py osscar                                  # fc2 of OPT-13B, 30 % of its inputs
    python benchmarks/blocks.py sparsellm --hidden 64 --channels 160 --windows 4 --seqlen 64

Weights and inputs are random. The plain SparseLLM is written as the paper is: it keeps all activations of the
feed-forward part in float32, prunes column by column, inverts βW₂ᵀW₂ + γI, and makes pseudo-inverses by singular values
(`svd`, the released code's way) or by the inverse of the Gram matrix in float64 (`normal`). `error` is ‖Y - Ŷ‖² / ‖Y‖²
of the part's output on the calibration's inputs; `seconds` are those of the feed-forward part, of ours without the
first capture's Gram matrices, which the plain one makes. The plain OSSCAR makes one inverse in float64, updates it by
copies, and solves at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from layer import generated

import alps_exp
from alps_exp.baselines.osscar import remove
from alps_exp.numerics.precision import full_precision


def seconds_of(work, device: torch.device) -> tuple[float, object]:
    """How long it takes, and what it gives."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    made = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, made


def plain_sparsegpt(weight: Tensor, gram: Tensor, sparsity: float, block: int = 128) -> Tensor:
    """Column by column, masks by blocks of columns (METHODS of SparseGPT: damping 0.01)."""
    weight, width = weight.clone(), gram.shape[0]
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, device=gram.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, width, block):
        end = min(start + block, width)
        part, upper = weight[:, start:end], factor[start:end, start:end]
        score = (part / upper.diagonal()).square()
        gone = torch.zeros(score.numel(), dtype=torch.bool, device=gram.device)
        gone[score.flatten().argsort()[: round(sparsity * score.numel())]] = True
        gone, errors = gone.view_as(score), torch.zeros_like(part)
        for column in range(end - start):
            errors[:, column] = torch.where(gone[:, column], part[:, column], 0) / upper[column, column]
            part[:, column:] -= errors[:, column, None] * upper[column, column:]
        part[gone] = 0
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def plain_sparsellm(
    x: Tensor, up: Tensor, gate: Tensor, down: Tensor, sparsity: float, rounds: int, by: str
) -> list[Tensor]:
    """Up, gate and down after so many rounds; α = β = γ = 5, two gradient steps of s of at most 0.01."""

    def right_inverse(a: Tensor, b: Tensor) -> Tensor:  # bᵀ a⁺ᵀ
        if by == "svd":
            return b.T @ torch.linalg.pinv(a).T
        gram = a.double().T @ a.double()
        gram.diagonal().mul_(1 + 1e-6)
        return ((b.T @ a).double() @ torch.linalg.inv(gram)).float()

    z, s, weight = x @ up.T, x @ gate.T, 5.0
    p = silu(s) * z
    y, inputs = p @ down.T, x.T @ x
    for number in range(rounds):
        if number:
            up, gate, down = right_inverse(x, z), right_inverse(x, s), right_inverse(p, y)
        up, gate = plain_sparsegpt(up, inputs, sparsity), plain_sparsegpt(gate, inputs, sparsity)
        down = plain_sparsegpt(down, p.T @ p, sparsity)
        if number == rounds - 1:
            break
        matrix = weight * down.T @ down
        matrix.diagonal().add_(weight)
        p = (weight * y @ down + weight * silu(s) * z) @ torch.linalg.inv(matrix)
        m, aim, act = x @ up.T, x @ gate.T, silu(s)
        z = (m + act * p) / (1 + act.square())
        for _ in range(2):
            sigmoid = s.sigmoid()
            missed, slope = s * sigmoid * z - p, sigmoid * (1 + s * (1 - sigmoid))
            bound = 2 * weight * (1 + 1.21 * z.square() + 0.5 * (missed * z).abs())
            s = s - bound.reciprocal().clamp_max(0.01) * 2 * weight * (s - aim + missed * slope * z)
    return [up, gate, down]


@torch.no_grad()
def sparsellm(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Our block and the plain one on the same weights and inputs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=options.channels,
        num_hidden_layers=1,
        num_attention_heads=max(options.hidden // 128, 1),
        num_key_value_heads=max(options.hidden // 128, 1),
        max_position_embeddings=options.seqlen,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (options.windows, options.seqlen))
    mlp, seen = model.model.layers[0].mlp, []
    handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    for window in ids:
        model(window[None].to(device))
    handle.remove()
    x = torch.cat(seen)
    seen.clear()
    dense = [layer.weight.clone() for layer in (mlp.up_proj, mlp.gate_proj, mlp.down_proj)]

    def output(part: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
        return (silu(part @ gate.T) * (part @ up.T)) @ down.T

    def error(found: list[Tensor]) -> float:
        missed = total = 0.0
        for part in x.split(2048):
            wanted = output(part, *dense)
            missed += float((output(part, *found) - wanted).square().sum())
            total += float(wanted.square().sum())
        return missed / total

    record = alps_exp.prune_model(model, ids, method="sparsellm", sparsity=options.sparsity, rounds=options.rounds)
    own = sum(row["seconds_by_phase"].get("alternation", 0.0) for row in record["layers"])
    pruned = [layer.weight.clone() for layer in (mlp.up_proj, mlp.gate_proj, mlp.down_proj)]
    facts = {"tokens": ids.numel(), "rounds": options.rounds}
    lines = [{"what": "sparsellm", **facts, "seconds": own, "error": error(pruned), "phases": record["phases"]}]
    print(json.dumps(lines[-1]), flush=True)  # the plain one may not come to its end
    del model, mlp, pruned
    with full_precision():
        taken, found = seconds_of(
            lambda: plain_sparsellm(x, *dense, options.sparsity, options.rounds, options.pseudo_inverse), device
        )
    lines.append({"what": f"plain ({options.pseudo_inverse})", **facts, "seconds": taken, "error": error(found)})
    print(json.dumps(lines[-1]), flush=True)
    return lines


def plain_osscar(weight: Tensor, gram: Tensor, kept: int, few: int) -> Tensor:
    """Which inputs stay; the weights follow from them by a solve."""
    hessian = gram.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=torch.float64)
    inverse, w = torch.linalg.inv(hessian), weight.double().T.clone()
    start, stays = hessian @ w, torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    going = len(gram) - kept
    for part in torch.arange(going).tensor_split(max(-(-going // few), 1)):
        score = 0.5 * w.square().sum(1) / inverse.diagonal()
        out = torch.where(stays, score, torch.inf).topk(len(part), largest=False).indices
        stays[out] = False
        share = inverse[:, out] @ torch.linalg.inv(inverse[out][:, out])
        w, inverse = w - share @ w[out], inverse - share @ inverse[out]
        inverse[out], inverse[:, out] = 0, 0
        inverse[out, out] = 1  # never divided by
    torch.linalg.solve(hessian[stays][:, stays], start[stays])
    return stays


@torch.no_grad()
def osscar(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Ours, twice, and the plain one, on one layer."""
    (problem,) = generated(options.hidden, options.channels, 1, options.windows * options.seqlen, 0, device)
    kept, lines = int(options.channels * (1 - options.sparsity)), []
    with full_precision():
        for what in ("osscar, first run", "osscar"):
            taken, (stay, _) = seconds_of(lambda: remove(problem, 1, kept, 10, 0.01), device)
            lines.append({"what": what, "seconds": taken})
        taken, stays = seconds_of(lambda: plain_osscar(problem.weight, problem.inputs.gram, kept, 10), device)
    lines.append({"what": "plain", "seconds": taken, "same inputs": float((stays == stay).double().mean())})
    for line in lines:
        print(json.dumps(line), flush=True)
    return lines


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("method", choices=("sparsellm", "osscar"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, help="units of the residual stream (default: Llama-7B's, OPT-13B's)")
    parser.add_argument("--channels", type=int)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, help="default 0.7, of OSSCAR 0.3")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pseudo-inverse", choices=("svd", "normal"), default="svd")
    options = parser.parse_args()
    usual = {"sparsellm": (4096, 11008, 0.7), "osscar": (5120, 20480, 0.3)}[options.method]
    for name, value in zip(("hidden", "channels", "sparsity"), usual, strict=True):
        setattr(options, name, getattr(options, name) or value)
    device = torch.device(options.device)
    (sparsellm if options.method == "sparsellm" else osscar)(options, device)


if __name__ == "__main__":
    main()
