"""What each part of going beyond the layers' own targets brings, on a small model: a Markdown table, row by row.

    python benchmarks/ablation.py --model DIR --calibration FILE --texts FILE FILE > ablation.md
    python benchmarks/ablation.py --model DIR --calibration FILE --texts FILE --only "strength *" --seeds 0,1,2

The model is any folder of transformers. Calibration windows are drawn from the calibration text without its last tenth;
perplexity is on consecutive windows from the start of that tenth and of the other texts. Choose texts that you report
nothing else on: what is chosen by such a table has seen them. Needs alps_exp and its dependencies.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from unittest import mock

import torch

from alps_exp import generate_tokens, prune_model
from alps_exp.allocation.allocations import ByLoss, ByOutliers, BySensitivity, BySpectrum, Progression
from alps_exp.calibration.capture import Collector
from alps_exp.calibration.sensitivity import SensitivityChoice
from alps_exp.data.settings import DataSettings
from alps_exp.data.windows import calibration_tokens, evaluation_tokens
from alps_exp.evaluation.perplexity import perplexity
from alps_exp.layer.problem import LayerProblem
from alps_exp.methods.target import StreamTarget
from alps_exp.model import loading
from alps_exp.model.blocks import BlockModel
from alps_exp.model.residual import Addition
from alps_exp.patterns import NM, parse_sparsity
from alps_exp.pruning import capture
from alps_exp.pruning.block import BlockProblem


def outputs(rows: float, windows: int = 8) -> SensitivityChoice:
    """One backward pass."""
    return SensitivityChoice("outputs", windows, rows)


STREAM = {"target": StreamTarget()}
ALL = STREAM | {"sensitivity": outputs(0.5), "allocation": BySensitivity(0.15)}
VARIANTS: dict[str, dict] = {
    "plain": {},
    "strength 0.25": {"target": StreamTarget(strength=0.25)},
    "strength 0.5 (stream)": STREAM,
    "strength 0.75": {"target": StreamTarget(strength=0.75)},
    "strength 1": {"target": StreamTarget(strength=1.0)},
    "order: stream, a block at once": STREAM | {"capture": "block"},
    "order: plain, group by group": {"capture": "groups"},
    "ridge 0.001": {"target": StreamTarget(ridge=0.001)},
    "ridge 0.1": {"target": StreamTarget(ridge=0.1)},
    "the stream's error left out": STREAM | {"without_error": True},
    "the stream's error left out, strength 1": {"target": StreamTarget(strength=1.0), "without_error": True},
    "readers fitted, too": {"target": StreamTarget(), "readers": True},
    "rows 0.5, plain": {"sensitivity": outputs(0.5)},
    "rows 1, plain": {"sensitivity": outputs(1.0)},
    "rows 0.5, stream": STREAM | {"sensitivity": outputs(0.5)},
    "rows 1, stream": STREAM | {"sensitivity": outputs(1.0)},
    "cap 0.15, plain, rows 0": {"sensitivity": outputs(0.0), "allocation": BySensitivity(0.15)},
    "cap 0.05, all": ALL | {"allocation": BySensitivity(0.05)},
    "cap 0.15, all": ALL,
    "cap 0.3, all": ALL | {"allocation": BySensitivity(0.3)},
    "windows 2, all": ALL | {"sensitivity": outputs(0.5, 2)},
    "windows 32, all": ALL | {"sensitivity": outputs(0.5, 32)},
    "allocation atp, stream": STREAM | {"allocation": Progression()},
    "allocation owl, stream": STREAM | {"allocation": ByOutliers()},
    "allocation spectral, stream": STREAM | {"allocation": BySpectrum()},
    "allocation loss, stream": STREAM | {"allocation": ByLoss()},
    "generated text, plain": {"text": "generated"},
    "generated text, stream": STREAM | {"text": "generated"},
}


def divided(sparsity: str) -> dict[str, dict]:
    """What N that differs among layers brings, where the sparsity is N:M: the neighbours of N, and those of these."""
    pattern, found = parse_sparsity(sparsity), {}
    if type(pattern) is not NM:
        return found
    for reach in (1, 2):
        choices = [n for n in range(pattern.kept - reach, pattern.kept + reach + 1) if 0 < n < pattern.width]
        if len(choices) == 2 * reach + 1:
            loss, gradients = ByLoss(choices=choices), BySensitivity(choices=choices)
            among = f"N in {choices}"
            found |= {
                f"{among}, loss, plain": {"allocation": loss},
                f"{among}, sensitivity, plain": {"sensitivity": outputs(0.0), "allocation": gradients},
                f"{among}, loss, stream": STREAM | {"allocation": loss},
                f"{among}, sensitivity, stream": STREAM | {"sensitivity": outputs(0.0), "allocation": gradients},
            }
    return found


def _none(dense: Addition, pruned: Addition) -> torch.Tensor:
    """In place of h_d - h_p: of r only W(x_d - x_p) is left."""
    return torch.zeros_like(pruned.stream)


class Readers:
    """While it lasts, readers are fitted, too, to the dense model's outputs: T = W + α W(Σ (x_d - x_p) x_pᵀ)(G + λI)⁻¹
    stands in place of W. Every batch goes through the block twice more for that."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._forward, self._posed = capture._forward, StreamTarget.posed
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(mock.patch.object(capture, "_forward", self._both))
        own = self  # a function of the class is handed the target
        self._stack.enter_context(
            mock.patch.object(StreamTarget, "posed", lambda target, problem: own._fitted(target, problem))
        )

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _both(self, block: BlockProblem, collector: Collector, first: int, last: int) -> None:
        self._forward(block, collector, first, last)
        readers = [name for name in collector.names if name not in block.writers]
        if not readers:
            return
        collector.resting = True
        pruned = self._inputs(block, readers, block.streams.calibration.at(first, last))
        with block.dense():
            dense = self._inputs(block, readers, block.streams.beside.at(first, last))
        collector.resting = False
        for name in readers:
            product = (dense[name] - pruned[name]).T @ pruned[name]
            self._sums[name] = self._sums[name] + product if first else product

    @staticmethod
    def _inputs(block: BlockProblem, names: list[str], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """(tokens, in) of each layer."""
        found: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for name in names:

                def keep(module: torch.nn.Module, args: tuple, name: str = name) -> None:
                    found[name] = args[0].flatten(0, -2)

                stack.callback(block.layers[name].module.register_forward_pre_hook(keep).remove)
            block.forward(hidden)
        return found

    def _fitted(self, target: StreamTarget, problem: LayerProblem) -> LayerProblem:
        if problem.inputs.correction is not None:
            return self._posed(target, problem)
        correction = problem.weight @ self._sums[problem.name]
        fitted = self._posed(target, replace(problem, inputs=problem.inputs.replaced(correction=correction)))
        return replace(problem, weight=fitted.weight)


def main() -> None:
    """Prune by every variant and print a row of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", default=[])
    parser.add_argument("--method", default="alps")
    parser.add_argument("--sparsity", default="0.7")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--evaluated", type=int, default=40, help="windows of each text")
    parser.add_argument("--seeds", default="0", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--only", nargs="+", default=["*"], help="globs on the variants' names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    settings = loading.resolve({"name": "local", "path": options.model})
    tokenizer, device = loading.load_tokenizer(settings.source), torch.device(options.device)
    model = loading.load_model(settings, torch.float32).to(device)
    dense, drawn = copy.deepcopy(model.state_dict()), {"nsamples": options.windows, "seqlen": options.seqlen}
    web = DataSettings("local", path=options.calibration, column="text", sampling="concatenated", held_out=0.1)
    others = [DataSettings("local", eval_path=text, column="text") for text in options.texts]
    texts = {f"held-out {Path(options.calibration).name}": web}
    texts |= {Path(data.eval_path).name: data for data in others}
    evaluated = {
        name: evaluation_tokens(data, tokenizer, seqlen=options.seqlen, windows=options.evaluated)[0]
        for name, data in texts.items()
    }

    def perplexities() -> list[float]:
        return [perplexity(BlockModel(model, device), tokens, 8, quiet=True) for tokens in evaluated.values()]

    print(f"| | {' | '.join(texts)} | seconds |\n|---{'|---' * (len(texts) + 1)}|")
    print(f"| dense | {' | '.join(f'{value:.4g}' for value in perplexities())} | |", flush=True)
    for name, variant in (VARIANTS | divided(options.sparsity)).items():
        if not any(fnmatchcase(name, glob) for glob in options.only):
            continue
        found, seconds = [], []
        for seed in options.seeds:
            model.load_state_dict(dense)
            rest = {key: value for key, value in variant.items() if key not in ("text", "without_error", "readers")}
            if "text" in variant:
                tokens = generate_tokens(model, tokenizer, **drawn, seed=seed)
            else:
                tokens = calibration_tokens(web, tokenizer, **drawn, seed=seed)[0]
            begin = time.perf_counter()
            changed = mock.patch.object(capture, "_error", _none) if "without_error" in variant else nullcontext()
            with Readers() if "readers" in variant else changed:
                prune_model(model, tokens, options.method, options.sparsity, batch_size=8, **rest)
            seconds.append(time.perf_counter() - begin)
            found.append(perplexities())
        cells = [f"{statistics.fmean(values):.4g}" for values in zip(*found, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {statistics.fmean(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
