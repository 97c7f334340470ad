"""Records as runs write them, for tests of tables."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from alps_exp.tables import figures, layout

METRIC = "wikitext2 perplexity (2048)"


def record(
    method: str = "alps", sparsity: str = "0.7", seed: int = 0, perplexity: float = 20.0, loss: float = 0.1, **more
) -> dict:
    """A record as runs write it, as far as tables read it; `more` replaces whole entries."""
    dense = method == "dense"
    layers = [
        {
            "name": f"b.{block}.q",
            "block": block,
            "shape": [4, 8],
            "sparsity_target": 0.5,
            "relative_loss": loss * factor,
        }
        for block, factor in enumerate((0.5, 1.5))
    ]
    return {
        "status": "complete",
        "model": "tiny",
        "method": method,
        "sparsity": "0" if dense else sparsity,
        "seed": seed,
        "config": {"nsamples": 128, "seed": seed, "method": {"name": method}, "eval": {"name": "wanda"}},
        "calibration": {} if dense else {"dataset": "c4", "source": "hub", "windows": 8, "seqlen": 2048, "seed": seed},
        "layers": [] if dense else layers,
        "summary": {} if dense else {"sparsity": 0.5},
        "phases": {} if dense else {"calibrate_seconds": 1.0, "solve_seconds": 2.5, "propagate_seconds": 0.5},
        "evaluations": [
            {
                "dataset": "wikitext2",
                "metric": "perplexity",
                "value": perplexity,
                "stderr": None,
                "shown": True,
                "partial": False,
                "windows": 10,
                "total_windows": 10,
                "seqlen": 2048,
                "source": "wiki.test.raw",
            }
        ],
        "environment": {"code": "0.1 (abc)", "dtype": "float32", "device": "CPU", "versions": {"torch": "2.11"}},
        "error": None,
    } | more


def task(value: float, stderr: float | None = 0.01, metric: str = "acc", **more) -> dict:
    row = {"dataset": "piqa", "metric": metric, "value": value, "stderr": stderr, "shown": metric == "acc"}
    return row | {"partial": False, "samples": 100, "total_samples": 100} | more


def failed(kind: str, message: str = "", **more) -> dict:
    error = {"type": kind, "message": message}
    return record(**more) | {"status": "failed", "error": error, "evaluations": [], "layers": []}


def laid_out(records, missing=(), **node) -> layout.Grid:
    spec = layout.parse(node, "test")
    return layout.grid(figures.aggregate(records, missing, spec.seconds, spec.published), spec)


def cells(grid: layout.Grid) -> dict[tuple[str, ...], dict[str, str]]:
    """Labels of a row → words of a column → text, best ones between stars."""
    return {
        tuple(labels): {
            ", ".join(words): f"*{cell.text}*" if cell.best else cell.text
            for words, cell in zip(grid.header, row, strict=True)
        }
        for labels, row in grid.rows
    }


def save(records: list[dict], folder: Path, sweep: str | None = None, missing: tuple[str, ...] = ()) -> Path:
    names = []
    for item in records:
        slug = "dense" if item["method"] == "dense" else f"{item['method']}-u{item['sparsity']}-s{item['seed']}"
        names.append(f"tiny-{slug}-{len(names):08x}")
        (folder / names[-1]).mkdir(parents=True)
        (folder / names[-1] / "record.json").write_text(json.dumps(item))
    if sweep:
        (folder / f"{sweep}.sweep.json").write_text(json.dumps({"sweep": sweep, "runs": [*names, *missing]}))
    return folder


def several() -> list[dict]:
    """Two methods at two levels and 2:4 with three seeds, and the dense model."""
    values = random.Random(0)
    pruned = [
        record(method, sparsity, seed, values.uniform(20, 90), values.uniform(0.01, 0.2))
        for method, sparsity, seed in itertools.product(("alps", "wanda"), ("0.5", "0.7", "2:4"), range(3))
    ]
    return [record("dense", perplexity=15.0), *pruned]


class Logged:
    """Stands in for a run of W&B: what it is given."""

    def __init__(self) -> None:
        self.logged, self.metrics = [], []

    def define_metric(self, name, **options):
        self.metrics.append((name, options))

    def log(self, row):
        self.logged.append(row)
