"""From run records to figures: a value per metric of each record, and their means and deviations over seeds.

Everything here is the same whatever the order in which the records come.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..patterns import written
from ..runs.naming import NEUTRAL, NOT_HASHED
from . import looks

if TYPE_CHECKING:
    import pandas as pd

AXES = ("model", "sparsity", "method")
PHASES = ("weigh", "transfer", "calibrate", "solve", "propagate")
FINISHING = ("finish", "distil")
TRAINING = ("train",)
UNKNOWN = "unknown"

# The released ALPS is what was published; our default is set beside it too.
_PUBLISHED_AS = {"alps-paper": "alps"}
# What the dense model's figures depend on.
_EVALUATED = ("model", "eval", "dtype", "device")
_CHOICES = tuple(group for group, choice in NEUTRAL.items() if isinstance(choice, dict))
_LOSSES = {"relative_loss": "relative loss", "held_out_loss": "held-out loss"}
_CALIBRATION = ("dataset", "source", "split", "revision", "sampling", "windows", "seqlen", "bos")
_READING = ("source", "split", "revision", "protocol", "reading", "windows", "seqlen", "bos", "sampling", "shots")


@dataclass(frozen=True)
class Measure:
    """One number of one record.

    Attributes:
        value: may be infinite or NaN, where the record says so.
        stderr: standard error over a task's examples.
        better: -1 where lower is better, 1 where higher is, 0 where neither.
        shown: in tables, unless they name their metrics.
    """

    value: float
    stderr: float | None = None
    better: int = -1
    shown: bool = True


@dataclass(frozen=True)
class Group:
    """The records that make one row: of one configuration but for the seed.

    Attributes:
        key: model, sparsity, method and the values of `settings`.
        records: complete ones, by seed.
        status: "complete", or of a group without complete records "OOM", "error", "unfinished" or "missing".
    """

    key: tuple[str, ...]
    records: list[Mapping]
    status: str


@dataclass(frozen=True)
class Aggregate:
    """All groups of a table.

    Attributes:
        settings: keys of the configuration that vary among the records of a model, or of a model and a method.
        groups: in the order of tables.
        frame: a row per group and metric: `model`, `sparsity`, `method`, the settings, `metric` (None where nothing was
            measured), `mean`, `std` (sample standard deviation over seeds), `n`, `stderr` (over examples, for n = 1),
            `status`, `published`, `ratio` (ours / published), `source`, and for the layout `better` and `shown`.
        seconds: whether it has times.
        incomplete: runs that are part of no mean, and why ("OOM", "error", "unfinished", "missing", "unreadable").
    """

    settings: list[str]
    groups: list[Group]
    frame: pd.DataFrame
    seconds: bool
    incomplete: dict[str, str]


def is_dense(record: Mapping) -> bool:
    """Whether nothing was pruned."""
    return written.is_dense(record["sparsity"])


def sees_gradients(record: Mapping) -> bool:
    """Whether gradients of the dense model took part, which one-shot methods do without.

    Where nothing reads them, as mostly under N:M, no backward pass is made, and the record has no time for it.
    """
    name = ((record.get("config") or {}).get("sensitivity") or {}).get("name", "none")
    return name != "none" and not is_dense(record) and record["phases"].get("weigh_seconds") is not None


def measures(record: Mapping) -> dict[str, Measure]:
    """What a record measured, by the names that docs/tables.md lists."""
    found = {}
    layers = record.get("layers") or []
    for field, name in _LOSSES.items():
        values = [float(row[field]) for row in layers if row.get(field) is not None]
        if values:
            where = f" of {layers[0]['name']}" if len(layers) == 1 else ""
            found[name + where] = Measure(_mean(values))
    for item in record["evaluations"]:
        error = item.get("stderr")
        found[_metric(item)] = Measure(
            float(item["value"]), None if error is None else float(error), _better(item), item.get("shown", True)
        )
    spent = [record["phases"].get(f"{phase}_seconds") for phase in PHASES]
    if any(value is not None for value in spent):
        found["seconds"] = Measure(math.fsum(value for value in spent if value is not None), better=0)
    spent = [record["phases"].get(f"{phase}_seconds") for phase in FINISHING]
    if any(value is not None for value in spent):
        found["finishing seconds"] = Measure(math.fsum(value for value in spent if value is not None), better=0)
        found["finishing tokens"] = Measure(sum(row["tokens"] for row in trainings(record)), better=0, shown=False)
    if is_trained(record):
        found["training seconds"] = Measure(float(record["phases"].get("train_seconds") or 0.0), better=0)
        found["training tokens"] = Measure(record["training"]["tokens"], better=0)
    if record["phases"].get("pruning_peak_device_bytes"):
        found["peak GB"] = Measure(record["phases"]["pruning_peak_device_bytes"] / 1e9, better=0, shown=False)
    if layers:
        iterations = math.fsum(row.get("iterations", 0) for row in layers) / len(layers)
        found["iterations"] = Measure(iterations, better=0, shown=False)
        found["zeros"] = Measure(float(record["summary"]["sparsity"]), better=0, shown=False)
    return found


def trainings(record: Mapping, stages: Sequence[str] = ("blocks", "distil")) -> list[Mapping]:
    """What finishing did, a row for each training: those of the blocks, and that of the model."""
    finish = record.get("finish") or {}
    rows = list(finish.get("blocks") or []) if "blocks" in stages else []
    return rows + ([finish["distil"]] if "distil" in stages and finish.get("distil") else [])


def by_block(record: Mapping) -> list[tuple[int, float]]:
    """Each block and the mean relative loss of its layers, along the depth; without blocks where that is not finite."""
    blocks: dict[int, list[float]] = {}
    for row in record.get("layers") or []:
        if row.get("relative_loss") is not None and "block" in row:
            blocks.setdefault(row["block"], []).append(float(row["relative_loss"]))
    means = ((block, _mean(values)) for block, values in sorted(blocks.items()))
    return [(block, mean) for block, mean in means if math.isfinite(mean)]


def is_trained(record: Mapping) -> bool:
    """Whether the method trained the model against its own loss, as one-shot methods do not."""
    return bool(record.get("training"))


def finish_of(record: Mapping) -> str:
    """The name of a record's finish, "none" where there is none."""
    return ((record.get("config") or {}).get("finish") or {}).get("name", "none")


def _better(item: Mapping) -> int:
    """As in `Measure`. Records were written before their rows said it: perplexities, bits and scores of tasks."""
    if "better" not in item:
        return -1 if any(word in item["metric"] for word in ("perplexity", "bits", "byte")) else 1
    return {"lower": -1, "higher": 1, None: 0}[item["better"]]


def _metric(item: Mapping) -> str:
    unit = f", {item['unit']}" if item.get("unit") else ""
    name = f"{item['dataset']} {item['metric']}{unit}"
    if "windows" in item:
        partial = f", {item['windows']} of {item['total_windows']}" if item.get("partial") else ""
        return f"{name} ({item['seqlen']}{partial})"
    return f"{name} ({item['samples']} of {item['total_samples']})" if item.get("partial") else name


def aggregate(
    records: Iterable[Mapping],
    missing: Iterable[str] | Mapping[str, str] = (),
    seconds: bool = True,
    published: bool = True,
) -> Aggregate:
    """Group records that differ in their seed only, and take mean and deviation of each metric.

    Args:
        records: run records as plain values.
        missing: names of runs without a record, or with why ("missing", "unreadable"); each has a row if no other
            record fills it.
        seconds: with times.
        published: with published figures.

    Raises:
        UserError: records of one configuration that differ in more than the seed: code, dtype, device, texts.
    """
    records = sorted(records, key=_order)
    missing = dict(missing) if isinstance(missing, Mapping) else dict.fromkeys(missing, "missing")
    settings = varying(records)
    groups = _groups(records, settings)
    present = {group.key[:3] for group in groups}
    models = {record["model"] for record in records}
    for key in {_coordinates(run, models) for run in missing} - present - {None}:
        groups.append(Group((*key, *[""] * len(settings)), [], "missing"))
    groups.sort(key=lambda group: order(group.key))
    rows = [row for group in groups for row in _rows(group, settings, seconds, published)]
    figures = ["metric", "mean", "std", "n", "stderr", "status", "published", "source"]
    import pandas as pd  # whose import takes longer than to list runs

    frame = pd.DataFrame(rows, columns=[*AXES, *settings, *figures, "better", "shown"])
    frame = frame.astype(dict.fromkeys(("mean", "std", "stderr", "published"), "float64"))
    frame.insert(frame.columns.get_loc("published") + 1, "ratio", frame["mean"] / frame["published"])
    incomplete = {_name(record): status(record) for record in records if record["status"] != "complete"}
    incomplete |= missing
    return Aggregate(settings, groups, frame, seconds, incomplete)


def varying(records: Sequence[Mapping]) -> list[str]:
    """Keys of the configuration, other than the seed, that differ among the records of one model; of the keys that a
    choice of a group brings, among those of one model with that choice."""
    scopes: dict[tuple, list[tuple[dict, bool]]] = {}
    for record in records:
        flat = settings_of(record)
        rest = dict(flat)
        for group, choice in {
            "method": record["method"],
            **{name: flat.get(f"{name}.name") for name in (*_CHOICES, "data")},
        }.items():
            own = {key: rest.pop(key) for key in flat if key.startswith(f"{group}.") and key != f"{group}.name"}
            scopes.setdefault((record["model"], group, choice), []).append((own, False))
        scopes.setdefault((record["model"],), []).append((rest, is_dense(record)))
    keys = set()
    for configs in scopes.values():
        for key in set().union(*(config for config, _ in configs)):
            # To lack a key (of layers.sparsity) is a difference, but for the dense model, which has few.
            values = {config.get(key) for config, dense in configs if key in config or not dense}
            if len(values) > 1:
                keys.add(key)
    return sorted(keys)


def settings_of(record: Mapping) -> dict[str, str]:
    """What of a record's configuration can change its figures, beside model, method, sparsity and seed: keys → text.
    Of the dense model, what its evaluation depends on."""
    config = {key: value for key, value in record.get("config", {}).items() if key not in NOT_HASHED}
    if is_dense(record):
        config = {key: value for key, value in config.items() if key in _EVALUATED}
    else:
        config = NEUTRAL | config  # records from before these choices were there
    flat = leaves({key: value for key, value in config.items() if key not in ("seed", "sparsity")})
    if flat.get("method.trace") == "false":  # as records are from before there were traces
        del flat["method.trace"]
    return {key: value for key, value in flat.items() if key not in ("model.name", "method.name") and "._" not in key}


def leaves(node: Mapping, prefix: str = "") -> dict[str, str]:
    """Leaves of a configuration as text, by their dotted keys."""
    found = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def key_of(record: Mapping, settings: Sequence[str]) -> tuple[str, ...]:
    """Model, sparsity, method and the values of `settings` of a record: what a group's `key` is."""
    flat = settings_of(record)
    return (record["model"], record["sparsity"], record["method"], *(flat.get(key, "") for key in settings))


def _groups(records: Sequence[Mapping], settings: Sequence[str]) -> list[Group]:
    members: dict[tuple[str, ...], list[Mapping]] = {}
    for record in records:
        members.setdefault(key_of(record, settings), []).append(record)
    groups = []
    for key, found in members.items():
        complete = [record for record in found if record["status"] == "complete"]
        _refuse_mixtures(key, complete)
        if is_dense(found[0]):
            complete = complete[:1]  # whatever its seed and the sparsity beside it: nothing of either takes part
        groups.append(Group(key, complete, "complete" if complete else status(found[0])))
    return groups


def status(record: Mapping) -> str:
    """Of a run that is not complete, as tables say it: "OOM", "error" or "unfinished"."""
    error = record.get("error")
    if not error:
        return "unfinished"
    out_of_memory = "OutOfMemory" in error["type"] or error["type"] == "MemoryError"
    told = error["type"] == "UserError" and "device's memory does not suffice" in error["message"]
    return "OOM" if out_of_memory or told else "error"


def provenance(record: Mapping) -> dict[str, object]:
    """What a result depends on beside its configuration and its seed."""
    environment, calibration = record.get("environment") or {}, record.get("calibration") or {}
    facts = {
        "code": environment.get("code") or UNKNOWN,
        "dtype": environment.get("dtype") or UNKNOWN,
        "device": environment.get("device") or UNKNOWN,
    }
    facts |= {name: (environment.get("versions") or {}).get(name) for name in ("torch", "transformers")}
    facts |= environment.get("inputs") or {}
    facts |= {f"calibration {key}": calibration.get(key) for key in _CALIBRATION}
    for item in record["evaluations"]:
        facts |= {f"{_metric(item)} {key}": item.get(key) for key in _READING if key in item}
    return facts


def _refuse_mixtures(key: tuple[str, ...], records: Sequence[Mapping]) -> None:
    seeds: dict[int, Mapping] = {}
    first = provenance(records[0]) if records else {}
    label = " ".join(key[:3])
    for record in records:
        facts = provenance(record)
        for name in sorted({*first, *facts}):
            if first.get(name) != facts.get(name):
                raise UserError(
                    f"{label}: not averaged over seeds, since {name} is {first.get(name)} in {_name(records[0])} and "
                    f"{facts.get(name)} in {_name(record)}: run these again alike (-m with complete=renew), or "
                    "move one away"
                )
        if not is_dense(record) and record["seed"] in seeds:
            raise UserError(
                f"{label}: {_name(seeds[record['seed']])} and {_name(record)} have the same configuration and seed: "
                "move one away"
            )
        seeds[record["seed"]] = record


def _name(record: Mapping) -> str:
    return str(record.get("run") or f"the run of seed {record['seed']}")


def _rows(group: Group, settings: Sequence[str], seconds: bool, published: bool) -> list[dict]:
    labels = dict(zip([*AXES, *settings], group.key, strict=True))
    nothing = {"metric": None, "n": 0, "status": group.status, "source": "", "better": 0, "shown": True}
    found: dict[str, list[Measure]] = {}
    for record in group.records:
        for name, measure in measures(record).items():
            if seconds or name not in ("seconds", "finishing seconds"):
                found.setdefault(name, []).append(measure)
    rows = []
    for name, values in found.items():
        mean, std = mean_and_std([measure.value for measure in values])
        figure, source = _published_beside(group, name) if published else (None, "")
        rows.append(
            labels
            | {
                "metric": name,
                "mean": mean,
                "std": std,
                "n": len(values),
                "stderr": values[0].stderr if len(values) == 1 else None,
                "status": group.status,
                "published": figure,
                "source": source,
                "better": values[0].better,
                "shown": values[0].shown,
            }
        )
    return rows or [labels | nothing]


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, None of a single value; exactly rounded sums, so the order plays no part.

    A mean that is infinite or NaN has no deviation: NaN.
    """
    mean = _mean(values)
    if len(values) == 1:
        return mean, None
    if min(values) == max(values):  # the mean's own rounding is no deviation
        return values[0], 0.0
    if not math.isfinite(mean):
        return mean, math.nan
    try:
        return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    except OverflowError:  # squares of perplexities that float64 still holds
        scale = max(map(abs, values))
        return mean, scale * mean_and_std([value / scale for value in values])[1]


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except ValueError:  # infinities of both signs
        return math.nan
    except OverflowError:
        return math.fsum(value / len(values) for value in values)


@functools.cache
def _published() -> dict[tuple[str, str, str, str], tuple[float, str]]:
    """(model, sparsity, method, metric) → figure and source; sparsity "*" where the source names none."""
    import pandas as pd

    found = {}
    for file in sorted((files("alps_exp") / "published").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".csv"):
            with file.open(encoding="utf-8") as stream:
                frame = pd.read_csv(stream, dtype={"sparsity": str}, keep_default_na=False)
            for row in frame.itertuples():
                source = f"{row.source}, {row.table}" if row.table else row.source
                found[row.model, row.sparsity, row.method, row.metric] = (float(row.value), source)
    return found


def _published_beside(group: Group, metric: str) -> tuple[float | None, str]:
    """The published figure of a group's metric and its source; None and "" where there is none."""
    if not _as_published(group.records[0].get("config") or {}, metric):
        return None, ""
    model, sparsity, method = group.key[:3]
    refit = group.records[0].get("config", {}).get("refit") or "none"
    name = metric if refit == "none" else f"{metric}, refit={refit}"
    method = _PUBLISHED_AS.get(method, method)
    figures = (_published().get((model, level, method, name)) for level in (sparsity, "*"))
    return next((figure for figure in figures if figure), (None, ""))


def _as_published(config: Mapping, metric: str) -> bool:
    """Whether a run calibrated and pruned what the published ones did, as far as its configuration says."""
    layers = config.get("layers") or {}
    usual = {"nsamples": 128, "seqlen": 2048, "propagate": "pruned"}
    whole = layers.get("include", ["*"]) == ["*"] or " of " in metric
    alike = all(config.get(key, value) == value for key, value in usual.items())
    return whole and alike and not layers.get("exclude") and not layers.get("sparsity")


def order(key: Sequence[str]) -> tuple:
    """Sorts model, sparsity, method and settings as tables list them."""
    model, sparsity, method, *rest = key
    return natural(model), written.order(sparsity), looks.method_order(method), [natural(value) for value in rest]


def _order(record: Mapping) -> tuple:
    key = (record["model"], record["sparsity"], record["method"])
    return order(key), record["seed"], record.get("config_hash", ""), str(record.get("run")), record.get("started", "")


def natural(text: str) -> list[tuple]:
    """Sorts opt-2.7b before opt-13b."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(1, float(part), "") if index % 2 else (0, 0.0, part) for index, part in enumerate(parts)]


_RUN = re.compile(r"(?P<words>.+)-(?P<slug>[^-]+)-s\d+-[0-9a-f]{8}")
_DENSE = re.compile(r"(?P<model>.+)-dense(-[^-]+-s\d+)?-[0-9a-f]{8}")


def _coordinates(run: str, models: Iterable[str]) -> tuple[str, str, str] | None:
    """Model, sparsity and method that a run's directory names; None where that is not clear."""
    if match := _DENSE.fullmatch(run):
        return match["model"], "0", "dense"
    if match := _RUN.fullmatch(run):
        if (sparsity := written.of_slug(match["slug"])) is None:
            return None
        for model in sorted(models, key=len, reverse=True):
            if match["words"].startswith(f"{model}-"):
                return model, sparsity, match["words"].removeprefix(f"{model}-")
        for method in sorted(looks.methods(), key=len, reverse=True):
            if match["words"].endswith(f"-{method}"):
                return match["words"].removesuffix(f"-{method}"), sparsity, method
    return None
