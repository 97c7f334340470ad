"""From records to what the report shows of each run: labels, figures, losses along the depth, everything behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from ..base.errors import UserError
from ..checkpoints.packed import packed_size
from ..patterns import Pattern, Unstructured, written
from ..tables import archive, figures, plots
from ..tables.layout import Grid, Spec, grid, number, spec_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WORST = 10
_TIMES = ("seconds", "finishing seconds", "training seconds")


@dataclass(frozen=True)
class Run:
    """One run of one sweep.

    Attributes:
        id: unique in the report.
        sweep: whose run it is.
        record: as plain values, without this machine's paths.
        series: its method, and what else tells it from other runs of the sweep: runs of one series are drawn alike.
        figures: what it measured, by name; of those that tables show.
        megabytes: that `save=packed` would write of the pruned layers, from their shapes and zeros.
        seconds: of pruning, finishing and training; None where the sweep's table leaves times out.
        losses: (block, mean relative loss of its layers).
    """

    id: str
    sweep: str
    record: Mapping
    series: str
    figures: dict[str, figures.Measure]
    megabytes: float | None
    seconds: float | None
    losses: list[tuple[int, float]]

    @property
    def name(self) -> str:
        return str(self.record.get("run") or self.id)

    @property
    def level(self) -> float | None:
        """The fraction of zeros that its pattern asks for."""
        if figures.is_dense(self.record):
            return 0.0
        pattern = _pattern(self.record)
        return None if pattern is None else float(pattern.sparsity)

    @property
    def pattern(self) -> str:
        """What is drawn with one marker: all unstructured levels, and each other pattern."""
        return "unstructured" if isinstance(_pattern(self.record), Unstructured) else self.record["sparsity"]


@dataclass(frozen=True)
class Sweep:
    """Runs that belong together, with their table.

    Attributes:
        name: the sweep's.
        runs: those with a record, failed ones too.
        table: means over seeds; None where there is none.
        notes: what could not be read, and why there is no table.
    """

    name: str
    runs: list[Run]
    table: Grid | None
    notes: list[str]


def gather(sets: Iterable[archive.RunSet]) -> list[Sweep]:
    """What the report shows of sets of runs, in their order."""
    return [_sweep(found, number) for number, found in enumerate(sets)]


def _sweep(found: archive.RunSet, place: int) -> Sweep:
    notes = list(found.unreadable.values())
    try:
        spec = spec_of(found.name, found.table)
    except UserError as error:
        spec, notes = Spec(title=found.name), [*notes, str(error)]
    try:
        table = grid(figures.aggregate(found.records, found.absent, spec.seconds, spec.published), spec)
    except UserError as error:
        table, notes = None, [*notes, f"no table of means: {error}"]
    records = [archive.without_paths(record) for record in found.records]
    drawn = zip(records, plots.labels(records), strict=True)
    runs = [
        Run(
            f"{place}-{index}",
            found.name,
            record,
            series,
            measured := {name: value for name, value in figures.measures(record).items() if value.shown},
            _megabytes(record),
            _seconds(measured) if spec.seconds else None,
            figures.by_block(record),
        )
        for index, (record, series) in enumerate(sorted(drawn, key=_order))
    ]
    return Sweep(found.name, runs, table, archive.without_paths(notes))


def _order(drawn: tuple[Mapping, str]) -> tuple:
    record, series = drawn
    key = (record["model"], record["sparsity"], record["method"])
    return (
        figures.order(key),
        figures.natural(series),
        record["seed"],
        str(record.get("run")),
        record.get("started", ""),
    )


def _pattern(record: Mapping) -> Pattern | None:
    """None of a kind that this installation does not know."""
    try:
        return written.read(record["sparsity"])
    except UserError:
        return None


def _seconds(measured: Mapping[str, figures.Measure]) -> float | None:
    spent = [measured[name].value for name in _TIMES if name in measured]
    return math.fsum(spent) if spent else None


def _megabytes(record: Mapping) -> float | None:
    item = _BYTES.get((record.get("environment") or {}).get("dtype") or "")
    layers = record.get("layers") or []
    if item is None or not layers:
        return None
    zeros = [float(row.get("sparsity", row["sparsity_target"])) for row in layers]
    return math.fsum(packed_size(row["shape"], z, item) for row, z in zip(layers, zeros, strict=True)) / 1e6


def columns(runs: Sequence[Run]) -> list[str]:
    """The metrics of all runs, the ones that most of them have first."""
    counts: dict[str, int] = {}
    for run in runs:
        for name in run.figures:
            counts[name] = counts.get(name, 0) + 1
    return sorted((name for name in counts if name not in _TIMES), key=lambda name: -counts[name])


def status(run: Run) -> str:
    """As tables say it."""
    return "complete" if run.record["status"] == "complete" else figures.status(run.record)


def facts(run: Run) -> dict[str, str]:
    """What stands at the head of a run's page."""
    record, environment = run.record, run.record.get("environment") or {}
    found = {
        "sweep": run.sweep or None,
        "model": record["model"],
        "method": run.series,
        "sparsity": record["sparsity"],
        "seed": record["seed"],
        "status": status(run),
        "error": (record.get("error") or {}).get("message"),
        "started": record.get("started"),
        "device": environment.get("device"),
        "commit": environment.get("git_commit"),
        "code": environment.get("code"),
        "configuration hash": record.get("config_hash"),
    }
    found |= {name: number(measure.value, name) for name, measure in run.figures.items()}
    phases = {k.removesuffix("_seconds"): v for k, v in record["phases"].items() if k.endswith("_seconds") and v}
    found["seconds by phase"] = ", ".join(f"{name} {value:.1f}" for name, value in phases.items())
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def behind(run: Run) -> dict[str, str]:
    """All that a run's figures depend on, as YAML, by heading."""
    record = run.record
    parts = {
        "Configuration": without_looks(record.get("config") or {}),
        "Calibration": record.get("calibration") or {},
        "Evaluations": [{k: v for k, v in row.items() if v is not None} for row in record["evaluations"]],
        "Environment": record.get("environment") or {},
    }
    # Through JSON, since YAML would write values that several runs share as references.
    return {
        heading: yaml.safe_dump(json.loads(json.dumps(part)), sort_keys=False, allow_unicode=True, width=100)
        for heading, part in parts.items()
        if part
    }


def without_looks(node):
    """A configuration without keys that begin with an underscore, which decide nothing."""
    if isinstance(node, Mapping):
        return {key: without_looks(value) for key, value in node.items() if not str(key).startswith("_")}
    return node


def worst(run: Run) -> list[tuple[str, str, str, str]]:
    """Name, zeros, relative loss and status of the layers of highest loss, where losses are finite."""
    rows = [row for row in run.record.get("layers") or [] if row.get("relative_loss") is not None]
    rows = sorted((row for row in rows if math.isfinite(float(row["relative_loss"]))),
                  key=lambda row: -float(row["relative_loss"]))  # fmt: skip
    return [
        (
            row["name"],
            f"{float(row.get('sparsity', row['sparsity_target'])):.4f}",
            number(float(row["relative_loss"]), "relative loss"),
            str(row.get("status", "")),
        )
        for row in rows[:_WORST]
    ]
