"""Plots from run records; the same records give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

# Okabe and Ito's colours, which the colour-blind can tell apart; the same for a method everywhere.
COLOURS = {
    "alps": "#0072B2",
    "alps-simple": "#56B4E9",
    "alps-paper": "#E69F00",
    "sparsegpt": "#D55E00",
    "wanda": "#009E73",
    "dsnot": "#CC79A7",
    "magnitude": "#000000",
}
_OTHER = "#888888"
_COLUMNS = 3


def losses_by_depth(records: Iterable[Mapping], folder: Path) -> list[Path]:
    """Mean relative loss of each block's layers, a panel per model and sparsity, a line per method; dashed: the same on
    held-out windows. Records of one method in one panel (seeds) are averaged.

    Args:
        records: run records as plain values; those without losses are left out.
        folder: where losses.svg and losses.png are written.

    Returns:
        The files written, none without losses.
    """
    panels: dict[tuple[str, str], dict[str, dict[str, dict[int, list[float]]]]] = {}
    for record in records:
        for row in record.get("layers", ()):
            for kind in ("relative_loss", "held_out_loss"):
                if row.get(kind) is not None:
                    methods = panels.setdefault((record["model"], record["sparsity"]), {})
                    blocks = methods.setdefault(record["method"], {}).setdefault(kind, {})
                    blocks.setdefault(row["block"], []).append(row[kind])
    if not panels:
        return []
    return _drawn(panels, folder)


def _drawn(panels: Mapping, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context({"svg.hashsalt": "alps_exp", "font.size": 9}):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(1 + 3.6 * columns, 0.4 + 2.8 * rows), layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        handles = {}
        for axis, ((model, sparsity), methods) in zip(axes.flat, sorted(panels.items()), strict=False):
            for method in sorted(
                methods, key=lambda name: (list(COLOURS).index(name) if name in COLOURS else 99, name)
            ):
                for kind, blocks in methods[method].items():
                    label = method + (", held out" if kind == "held_out_loss" else "")
                    means = [sum(blocks[block]) / len(blocks[block]) for block in sorted(blocks)]
                    (line,) = axis.plot(
                        sorted(blocks),
                        means,
                        "--" if kind == "held_out_loss" else "-",
                        color=COLOURS.get(method, _OTHER),
                        linewidth=1.3,
                        marker="o" if len(blocks) < 8 else None,
                        markersize=3,
                    )
                    handles.setdefault(label, line)
            axis.set(title=f"{model}, sparsity {sparsity}", xlabel="block", ylabel="mean relative loss", yscale="log")
            axis.grid(alpha=0.3)
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "losses.svg", folder / "losses.png"]
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=150, metadata={"Software": None})
        pyplot.close(figure)
    return paths
