"""How time grows with a layer's width, with calibration tokens and with the number of blocks: one JSON line per point.

    python benchmarks/growth.py --device cuda > growth.jsonl
    python benchmarks/growth.py --plot growth.jsonl --out docs/growth.svg

Widths: the seconds of solving one square layer with generated inputs. Tokens and blocks: the seconds of pruning all
blocks of a model of that shape with random weights, windows of 2048 tokens, half precision on a GPU. The plot needs
matplotlib, the measurements torch, numpy, transformers and alps_exp.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import end_to_end
import layer

from alps_exp.tables import looks

LABELS = {"width": "width of a square layer", "tokens": "calibration tokens", "blocks": "decoder blocks"}


def widths(options: argparse.Namespace, device: torch.device) -> None:
    """Seconds of one square layer per width and method."""
    for width in options.widths:
        problems = layer.generated(width, width, 1, 2 * width, 0, device)
        for method in options.methods:
            spent = layer.measure(problems, method, options.sparsity, {}, options.repeat)[0]["seconds"]
            report("width", width, method, spent)
        del problems


def models(options: argparse.Namespace, device: torch.device, axis: str, values: list[int]) -> None:
    """Seconds of a model's blocks per number of tokens or of blocks, and method."""
    for value in values:
        blocks, windows = (value, options.windows[0]) if axis == "blocks" else (2, value)
        for method in options.methods:
            network = end_to_end.build(options.shape, blocks, dtype_on(device), device)
            line = end_to_end.measure(network, job(options, blocks, windows), method, device)
            report(axis, value * 2048 if axis == "tokens" else value, method, line["seconds"], shape=options.shape)


def job(options: argparse.Namespace, blocks: int, windows: int) -> argparse.Namespace:
    """What end_to_end.py takes."""
    return argparse.Namespace(
        **vars(options) | {"blocks": blocks, "windows": windows, "seqlen": 2048, "batch_size": 1, "dtype": ""}
    )


def dtype_on(device: torch.device) -> torch.dtype:
    """Half precision on a GPU only."""
    return torch.float16 if device.type == "cuda" else torch.float32


def report(axis: str, value: int, method: str, seconds: float, **more: str) -> None:
    """Print a point."""
    print(json.dumps({"axis": axis, "value": value, "method": method, "seconds": seconds, **more}), flush=True)


def plot(source: Path, target: Path) -> None:
    """Draw the three panels, double-logarithmic, and print the table in Markdown."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "growth"
    points = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for panel, (axis, label) in zip(panels, LABELS.items(), strict=True):
        own = [point for point in points if point["axis"] == axis]
        values = sorted({point["value"] for point in own})
        print(f"\n| {label} | " + " | ".join(map(str, values)) + " |\n|---" * 1 + "|---" * len(values) + "|")
        for method in dict.fromkeys(point["method"] for point in own):
            seconds = {point["value"]: point["seconds"] for point in own if point["method"] == method}
            colour, _, _ = looks.look(method)
            panel.plot(list(seconds), list(seconds.values()), "o-", color=colour, label=method, markersize=4)
            print(f"| {method} | " + " | ".join(f"{seconds[v]:.3g}" if v in seconds else "–" for v in values) + " |")
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
        panel.set_xticks(values, [f"{v // 1024}k" if axis == "tokens" else str(v) for v in values], minor=False)
        panel.set_xticks([], minor=True)
        panel.tick_params(axis="x", labelrotation=45)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Measure, or plot what was measured."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    numbers = lambda text: [int(part) for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", default="alps,alps-simple,sparsegpt,wanda", type=lambda text: text.split(","))
    parser.add_argument("--sparsity", default="0.7")
    parser.add_argument("--widths", default="576,1024,2048,4096,5120,8192,12288,20480", type=numbers)
    parser.add_argument("--windows", default="16,32,64,128,256", type=numbers, help="of 2048 tokens")
    parser.add_argument("--blocks", default="1,2,4,8,16", type=numbers)
    parser.add_argument("--shape", default="opt-1.3b", choices=end_to_end.SHAPES)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="draw these lines instead of measuring")
    parser.add_argument("--out", type=Path, default=Path("growth.svg"))
    options = parser.parse_args()
    if options.plot:
        plot(options.plot, options.out)
        return
    device = torch.device(options.device)
    for method in options.methods:  # libraries load, kernels compile
        layer.measure(layer.generated(2048, 2048, 1, 4096, 0, device), method, options.sparsity, {}, 1)
        network = end_to_end.build(options.shape, 1, dtype_on(device), device)
        end_to_end.measure(network, job(options, 1, 2), method, device)
    widths(options, device)
    models(options, device, "tokens", options.windows)
    models(options, device, "blocks", options.blocks)


if __name__ == "__main__":
    main()
