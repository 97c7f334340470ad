"""What runs of tiny models give, to the bit: digests of weights, losses and perplexities, kept in bits.json.

    python tests/bits.py             compare (what `make test` does)
    python tests/bits.py --renew     write bits.json anew, after a change that is meant to change results; say so in
                                     CHANGELOG.md

The models have random weights from a seeded generator. Bits depend on the processor and on torch: on another machine
than the one that bits.json names, the same figures are compared to a tolerance instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import tiny_models
import torch
from safetensors.torch import load_file

KEPT = Path(__file__).with_name("bits.json")
# Of a layer's row, all that is no time.
ROW = ("name", "relative_loss", "held_out_loss", "sparsity", "iterations", "status", "tokens", "dead_inputs")

SINGLE = {
    "alps 0.7": "method=alps sparsity=0.7",
    "alps 2:4": "method=alps sparsity=2:4",
    "alps 1:4": "method=alps sparsity=1:4",
    "alps-paper 0.7": "method=alps-paper sparsity=0.7",
    "alps-simple 0.7": "method=alps-simple sparsity=0.7",
    "sparsegpt 0.7": "method=sparsegpt sparsity=0.7",
    "sparsegpt 2:4": "method=sparsegpt sparsity=2:4",
    "wanda 0.7": "method=wanda sparsity=0.7",
    "wanda 2:4": "method=wanda sparsity=2:4",
    "dsnot 0.7": "method=dsnot sparsity=0.7",
    "dsnot 1:4": "method=dsnot sparsity=1:4",
    "magnitude 0.7": "method=magnitude sparsity=0.7",
    "dense": "method=dense",
    "alps 0.7 streamed": "method=alps sparsity=0.7 stream=true",
    "sparsegpt 2:4 streamed": "method=sparsegpt sparsity=2:4 stream=true",
    "alps 0.7 devices=2": "method=alps sparsity=0.7 devices=2",
    "sparsegpt 0.7 devices=2": "method=sparsegpt sparsity=0.7 devices=2",
    "sparsegpt 0.7 held out": "method=sparsegpt sparsity=0.7 data.holdout=4",
    "wanda 0.7 refit=pcg": "method=wanda sparsity=0.7 refit=pcg",
    "magnitude 2:4 refit=exact": "method=magnitude sparsity=2:4 refit=exact",
    "sparsegpt 0.7 dense inputs": "method=sparsegpt sparsity=0.7 propagate=dense batch_size=2",
    "some layers": """method=alps sparsity=0.5 layers.exclude=["k_proj"] layers.sparsity={"down_proj":"2:4"}""",
    "opt alps 0.7": "method=alps sparsity=0.7 model.path=opt",
    "gpt2 sparsegpt 0.5": "method=sparsegpt sparsity=0.5 model.path=gpt2",
    "gemma3 dsnot 2:4": "method=dsnot sparsity=2:4 model.path=gemma3",
    "qwen3 wanda 4:8 packed": "method=wanda sparsity=4:8 model.path=qwen3 save=packed",
}
KILLED = {
    "alps 0.7 resumed": "method=alps sparsity=0.7 seed=1",
    "sparsegpt 0.7 streamed and resumed": "method=sparsegpt sparsity=0.7 seed=1 stream=true",
}
SHARED = {"shared statistics": "-m method=wanda,sparsegpt,dsnot sparsity=0.7,2:4 propagate=dense data.holdout=2"}


def machine() -> dict[str, str]:
    """What bits depend on beside this project."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": f"{platform.machine()}, {model}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }


def prepare(folder: Path) -> None:
    """Models and a text, the same on every machine."""
    for kind in ("llama", "opt", "gpt2", "gemma3", "qwen3"):
        tiny_models.build(kind, folder / kind, steps=0)
    text = "\n".join(tiny_models.documents(120, seed=3)) + "\n"
    (folder / "text.txt").write_text(text, encoding="utf-8")


def measure(folder: Path, names: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Name and figures of every run, each in a folder of its own below `folder`, which `prepare` has filled."""
    every: dict[str, tuple[Callable, str]] = {name: (_single, words) for name, words in SINGLE.items()}
    every |= {name: (_killed, words) for name, words in KILLED.items()}
    every |= {name: (_single, words) for name, words in SHARED.items()}
    for name in names or every:
        action, words = every[name]
        # Sums depend on the number of threads, also those of the processes that a run starts.
        with _inside(folder), mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            runs = Path("runs", hashlib.sha256(name.encode()).hexdigest()[:8])
            yield name, action(words.split(), runs)


def _words(words: list[str], runs: Path) -> list[str]:
    sweep = words[:1] == ["-m"]
    place = f"hydra.sweep.dir={runs}" if sweep else f"hydra.run.dir={runs}/run"
    common = ["model=local", "model.path=llama", "data=local", "data.path=text.txt", "nsamples=8", "seqlen=64"]
    common += ["eval.windows=4", "eval.sample_tokens=4", "device=cpu", "save=true", place]
    chosen = {word.partition("=")[0] for word in words}
    common = [word for word in common if word.partition("=")[0] not in chosen]
    return [*words, *common, *(["statistics_cache=1"] if sweep else [])]


def _single(words: list[str], runs: Path) -> dict:
    from alps_exp.cli import command as cli

    if (status := cli.guarded(lambda: cli.command(_words(words, runs)))) != 0:
        raise RuntimeError(f"{' '.join(words)}: exit status {status}")
    return _figures(runs)


def _killed(words: list[str], runs: Path) -> dict:
    """Killed as soon as its first block is on the disk, and run again."""
    child = os.fork()  # which has imported all that this process has
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
            _single(words, runs)
        finally:
            os._exit(0)
    journal = runs / "run" / ".progress" / "block-00000.json"
    while (ended := os.waitpid(child, os.WNOHANG)[0]) == 0 and not journal.is_file():
        time.sleep(0.002)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return _single(words, runs)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _figures(runs: Path) -> dict:
    """Of all records below a folder: digests of weights and rows, and the figures that another machine can compare."""
    weights, rows, plain, cached = hashlib.sha256(), hashlib.sha256(), {}, 0
    for path in sorted(runs.glob("*/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        name = f"{record['method']} {record['sparsity']}"
        saved = {
            key: value
            for file in (path.parent / "model").glob("*.safetensors")
            for key, value in load_file(file).items()
        }
        for key, tensor in sorted(saved.items()):
            weights.update(key.encode() + str(tensor.dtype).encode())
            weights.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        rows.update(json.dumps([{key: row[key] for key in ROW} for row in record["layers"]]).encode())
        rows.update(json.dumps([[row["value"] for row in record["evaluations"]], record["sample"]]).encode())
        plain[name] = {
            "loss": record["summary"].get("mean_relative_loss"),
            "held out": record["summary"].get("mean_held_out_loss"),
            "values": [row["value"] for row in record["evaluations"]],
        }
        cached += len(record["cached_blocks"])
    if not plain:
        raise RuntimeError(f"no record below {runs}")
    return {"weights": weights.hexdigest()[:16], "rows": rows.hexdigest()[:16], "cached blocks": cached, "plain": plain}


def differences(name: str, found: dict, kept: dict) -> list[str]:
    """What one run has different from bits.json, in words."""
    wanted = kept["runs"].get(name)
    if wanted is None:
        return [f"{name}: not in {KEPT.name}"]
    if kept["machine"] == machine():
        return [f"{name}: {key} {wanted[key]} → {found[key]}" for key in wanted if wanted[key] != found[key]]
    return [
        f"{name}, {run}: {key} {value} → {found['plain'][run][key]}, on another machine"
        for run, figures in wanted["plain"].items()
        for key, value in figures.items()
        if not _close(value, found["plain"][run][key])
    ]


def _close(one, other) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_close, one, other))
    return one == other or (None not in (one, other) and abs(one - other) <= 0.02 * abs(one))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--renew", action="store_true", help="write bits.json anew")
    parser.add_argument("names", nargs="*", help="these runs only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {"machine": {}, "runs": {}}
    found, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name, figures in measure(Path(folder), args.names):
            found[name] = figures
            wrong += [] if args.renew else differences(name, figures, kept)
    if args.renew:
        value = {"machine": machine(), "runs": {**(kept["runs"] if args.names else {}), **found}}
        KEPT.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(wrong) or f"{len(found)} runs {'written' if args.renew else 'as before'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
