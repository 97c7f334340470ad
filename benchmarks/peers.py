"""Pruning time against llm-compressor on the same model, tokens and machine, taking turns: one JSON line per run.

    python3 -m venv peer && peer/bin/pip install torch llmcompressor==0.14.*
    python benchmarks/peers.py --peer peer/bin/python --model DIR --text FILE.txt --rounds 2

DIR is a folder that transformers loads. The text's first windows calibrate, its last ones give the perplexity. A round
is one fresh process for each run; seconds are those of calibration and pruning, without imports and loading. Both sides
compute in float32 with one window per forward.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

RUNS = ("llm-compressor:sparsegpt", "alps_exp:sparsegpt", "alps_exp:alps")


def tokenize(folder: str, text: Path, windows: int, eval_windows: int, seqlen: int) -> dict[str, np.ndarray]:
    """Disjoint windows (windows, seqlen) for calibration and evaluation from the two ends of the text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    needed = (windows + eval_windows) * seqlen
    if len(ids) < needed:
        sys.exit(f"{text} has {len(ids)} tokens, {needed} are needed: give a longer text or fewer windows")
    array = np.array(ids, dtype=np.int64)
    return {
        "calibration": array[: windows * seqlen].reshape(windows, seqlen),
        "evaluation": array[len(array) - eval_windows * seqlen :].reshape(eval_windows, seqlen),
    }


def prune_with_peer(model: torch.nn.Module, tokens: torch.Tensor, method: str, sparsity: float) -> None:
    """llm-compressor's method on the decoder's linear layers."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier(sparsity=sparsity, targets=["Linear"], ignore=["re:.*lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )


def prune_with_ours(model: torch.nn.Module, tokens: torch.Tensor, method: str, sparsity: float) -> None:
    """This package's method."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from alps_exp import prune_model

    prune_model(model, tokens, method=method, sparsity=sparsity)


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean loss, window by window."""
    return math.exp(sum(float(model(row[None], labels=row[None]).loss) for row in windows) / len(windows))


def child(options: argparse.Namespace) -> None:
    """One run, in a process of its own."""
    from transformers import AutoModelForCausalLM

    side, method = options.child.split(":")
    data = np.load(options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    prune = prune_with_peer if side == "llm-compressor" else prune_with_ours
    start = time.perf_counter()
    prune(model, torch.from_numpy(data["calibration"]), method, options.sparsity)
    seconds = time.perf_counter() - start
    zeros = weights = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            zeros += int((module.weight == 0).sum())
            weights += module.weight.numel()
    line = {
        "run": options.child,
        "sparsity": options.sparsity,
        "windows": list(data["calibration"].shape),
        "seconds": seconds,
        "zeros": zeros / weights,
        "perplexity": perplexity(model, torch.from_numpy(data["evaluation"])),
        "evaluation_windows": len(data["evaluation"]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    Path(options.out).write_text(json.dumps(line), encoding="utf-8")


def main() -> None:
    """Run the rounds and print the ratios of the medians to the peer's first run."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--peer", help="the python of an environment with llmcompressor")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, help="plain text, UTF-8")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--runs", default=",".join(RUNS), help="SIDE:METHOD,…; the first is what ratios refer to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    if not options.text or not options.peer:
        parser.error("--peer and --text are required")
    runs = options.runs.split(",")
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = Path(folder) / "tokens.npz", Path(folder) / "line.json"
        np.savez(tokens, **tokenize(options.model, options.text, options.windows, options.eval_windows, options.seqlen))
        for _ in range(options.rounds):
            for run in runs:
                python = options.peer if run.startswith("llm-compressor") else sys.executable
                command = [python, __file__, "--child", run, "--model", options.model, "--tokens", str(tokens)]
                command += ["--sparsity", str(options.sparsity), "--out", str(out)]
                subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"})
                line = json.loads(out.read_text(encoding="utf-8"))
                seconds[run].append(line["seconds"])
                print(json.dumps(line), flush=True)
    median = {run: float(np.median(times)) for run, times in seconds.items()}
    print(json.dumps({"median_seconds": median, "ratio": {run: t / median[runs[0]] for run, t in median.items()}}))


if __name__ == "__main__":
    main()
