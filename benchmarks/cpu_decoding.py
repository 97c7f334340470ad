"""What decoding costs on a CPU: the demo model dense and packed, and dense in CTranslate2 where it is installed.

    nice python benchmarks/cpu_decoding.py --threads 2                   # SmolLM2-135M, float32
    pip install ctranslate2                                              # for the other runtime

The model is pruned by magnitude, layer by layer. Prints one JSON line per figure: tokens/s of greedy decoding of 32
tokens after 128 and of a prefill of 256, medians over repetitions, and MiB (`eval=speed`), with the machine's load.
CTranslate2 takes the dense model in float32, as many tokens before and as many steps; what a single step after the same
prompt takes is taken off.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from alps_exp.cli.overrides import compose
from alps_exp.evaluation.speed import Speed
from alps_exp.model.blocks import BlockModel
from alps_exp.model.loading import load_model, load_tokenizer, resolve

CACHED, STEPS = 128, 32


def say(**row) -> None:
    """A JSON line, with the load of the machine."""
    print(json.dumps({"torch": torch.__version__, "load": round(os.getloadavg()[0], 1), **row}), flush=True)


def in_ctranslate2(network, tokenizer, threads: int, repeats: int) -> None:
    """Decoding by CTranslate2."""
    if importlib.util.find_spec("ctranslate2") is None:
        say(runtime="CTranslate2", failed="not installed")
        return
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(f"{folder}/dense")
        tokenizer.save_pretrained(f"{folder}/dense")
        TransformersConverter(f"{folder}/dense").convert(f"{folder}/converted")
        found = ctranslate2.Generator(f"{folder}/converted", compute_type="float32", intra_threads=threads)
    prompt = tokenizer.convert_ids_to_tokens(range(1000, 1000 + CACHED))
    options = {"beam_size": 1, "include_prompt_in_result": False}

    def seconds(steps: int) -> float:
        begin = time.perf_counter()
        found.generate_batch([prompt], max_length=steps, min_length=steps, **options)
        return time.perf_counter() - begin

    seconds(STEPS)
    rates = [STEPS / (seconds(STEPS + 1) - seconds(1)) for _ in range(repeats)]
    about = {"lowest": min(rates), "highest": max(rates), "repeats": repeats}
    say(runtime=f"CTranslate2 {ctranslate2.__version__}", metric="decode at batch 1", value=median(rates), **about)


def main() -> None:
    """Print what is measured."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sparsities", default="0.7,0.9")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cfg = compose(["model=demo"])
    source = resolve(cfg.model)
    network = load_model(source, torch.float32)
    in_ctranslate2(network, load_tokenizer(source.source), options.threads, options.repeats)
    speed = Speed(("dense", "packed"), (1,), prefill=256, cached=CACHED, steps=STEPS, repeats=options.repeats)
    for sparsity in map(float, options.sparsities.split(",")):
        for name, parameter in network.named_parameters():
            if "proj" in name:
                size = parameter.abs()
                parameter.masked_fill_(size <= size.flatten().kthvalue(int(sparsity * size.numel())).values, 0)
        for figure in speed.measure(BlockModel(network, torch.device("cpu")), (), None):
            row = {"form": figure.subject, "sparsity": sparsity, "metric": figure.metric, "value": figure.value}
            say(**row, unit=figure.unit, **figure.more)


if __name__ == "__main__":
    with torch.no_grad():
        main()
