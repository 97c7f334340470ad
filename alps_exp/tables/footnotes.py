"""What stands below a table: how its figures were made, and whether all alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from ..base.files import sha256
from ..patterns import written
from .figures import AXES, UNKNOWN, Aggregate, Group, finish_of, is_dense, is_trained, measures, sees_gradients

_NAMED = 12  # runs or rows that a footnote lists
_PACKAGES = ("torch", "transformers", "lm-eval", "numpy")
_ALL = "all"  # layers, which goes without saying


def footnotes(found: Aggregate, constant: Mapping[str, str], metrics: Sequence[str]) -> list[str]:
    """The lines below a table.

    Args:
        found: what `aggregate` made of the records.
        constant: axes that have one value in the whole table, and it.
        metrics: those that the table shows.
    """
    lines = [_protocol(found, constant, metrics)]
    if legend := _legend(found, metrics):
        lines.append(legend)
    sources = dict.fromkeys(filter(None, found.frame.loc[found.frame["metric"].isin(metrics), "source"]))
    if sources:
        lines.append(f"Published (not measured here): {'; '.join(sources)}.")
    if found.incomplete:
        runs = [f"{run} ({why})" for run, why in sorted(found.incomplete.items())]
        more = f"; and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
        lines.append(f"Not averaged: {'; '.join(runs[:_NAMED])}{more}.")
    return lines


def _protocol(found: Aggregate, constant: Mapping[str, str], metrics: Sequence[str]) -> str:
    facts: dict[str, Callable[[Mapping], str | None]] = {
        "evaluation": lambda record: f"eval={(record.get('config') or {}).get('eval', {}).get('name', UNKNOWN)}",
        "windows": lambda record: _windows(record, metrics),
        "calibration": _calibration,
        "layers": _layers,
        "refit": lambda record: _unusual(record, "refit", "none"),
        "propagate": lambda record: _unusual(record, "propagate", "pruned"),
        "target": lambda record: _choice(record, "target", "layer"),
        "sensitivity": lambda record: _choice(record, "sensitivity", "none"),
        "allocation": lambda record: _choice(record, "allocation", "uniform"),
        "seeds": lambda record: None,
        "dtype": lambda record: _environment(record, "dtype"),
        "device": lambda record: _environment(record, "device"),
        "commit": lambda record: (_environment(record, "git_commit") or "")[:8] or UNKNOWN,
        "code": lambda record: _environment(record, "code"),
        "inputs": _inputs,
        "threads": _threads,
    }
    facts |= {name: lambda record, name=name: _version(record, name) for name in _PACKAGES}
    parts = [f"{axis} {value}" for axis, value in constant.items()]
    for name, fact in facts.items():
        text = _seeds(found.groups) if name == "seeds" else _spread(found, fact)
        if text and text != _ALL and (name not in ("inputs", "threads") or " / " in text):  # only where they differ
            parts.append(f"{name} {text}")
    return _capital("; ".join(parts)) + "."


def _inputs(record: Mapping) -> str | None:
    """A short digest of the checkpoint and the local texts."""
    inputs = (record.get("environment") or {}).get("inputs")
    return sha256(json.dumps(inputs, sort_keys=True))[:8] if inputs else None


def _threads(record: Mapping) -> str | None:
    """How many threads a CPU's figures were computed with, on which their last digits depend."""
    threads = (record.get("environment") or {}).get("threads")
    return str(threads) if threads and _environment(record, "device").endswith("CPU") else None


def _spread(found: Aggregate, fact: Callable[[Mapping], str | None]) -> str:
    """A fact's value; its values with the rows that each belongs to, where they differ."""
    values: dict[str, list[Group]] = {}
    for group in found.groups:
        for value in dict.fromkeys(fact(record) for record in group.records):
            if value is not None:
                values.setdefault(value, []).append(group)
    if len(values) < 2:
        return "".join(values)
    axes = [*AXES, *found.settings]
    for index, axis in enumerate(axes):
        owners = {value: dict.fromkeys(group.key[index] for group in groups) for value, groups in values.items()}
        if len(set().union(*owners.values())) == sum(map(len, owners.values())):  # each belongs to one value
            prefix = "" if axis in AXES else f"{axis}="
            return " / ".join(
                f"{value} ({', '.join(prefix + name for name in names)})" for value, names in owners.items()
            )
    rows = {value: ", ".join(dict.fromkeys(_label(group) for group in groups)) for value, groups in values.items()}
    owned = [group.key for groups in values.values() for group in groups]
    if len(owned) > _NAMED and len(owned) == len(set(owned)):  # a list that nobody reads, of which one part will do
        rows[max(values, key=lambda value: len(values[value]))] = "the other rows"
    return " / ".join(f"{value} ({names})" for value, names in rows.items())


def _label(group: Group) -> str:
    return " ".join(word for word in group.key[1:] if word)


def _windows(record: Mapping, metrics: Sequence[str]) -> str | None:
    shown = [item for item in record["evaluations"] if "windows" in item and any(item["dataset"] in m for m in metrics)]
    return ", ".join(f"{item['dataset']} {item['windows']} × {item['seqlen']}" for item in shown) or None


def _calibration(record: Mapping) -> str | None:
    facts = record.get("calibration")
    if not facts:
        return None
    return f"{facts['windows']} × {facts['seqlen']} tokens of {facts['dataset']} ({facts.get('split', UNKNOWN)})"


def _layers(record: Mapping) -> str | None:
    """Which layers were pruned."""
    if is_dense(record):
        return None
    asked = (record.get("config") or {}).get("layers")
    asked = asked if isinstance(asked, Mapping) else {}
    included, excluded = (globs if isinstance(globs := asked.get(key), list) else [] for key in ("include", "exclude"))
    words = [] if included in ([], ["*"]) else [", ".join(map(str, included))]
    words += [f"without {', '.join(map(str, excluded))}"] if excluded else []
    return " ".join(words) or _ALL


def _choice(record: Mapping, group: str, usual: str) -> str | None:
    """The name of a group's choice, where it is another one than usual."""
    choice = (record.get("config") or {}).get(group) or {}
    name, among = choice.get("name", usual), choice.get("choices")
    return None if name == usual else f"{name} of N in {among}" if among else name


def _unusual(record: Mapping, key: str, usual: str) -> str | None:
    value = (record.get("config") or {}).get(key, usual)
    return None if value == usual or is_dense(record) else value


def _environment(record: Mapping, key: str) -> str:
    return str((record.get("environment") or {}).get(key) or UNKNOWN)


def _version(record: Mapping, name: str) -> str | None:
    return ((record.get("environment") or {}).get("versions") or {}).get(name)


def _seeds(groups: Sequence[Group]) -> str:
    """Seeds of the pruned rows; which rows have which is said by n."""
    seeds = {record["seed"] for group in groups for record in group.records if not is_dense(record)}
    return ", ".join(map(str, sorted(seeds)))


def _legend(found: Aggregate, metrics: Sequence[str]) -> str:
    pruned = found.frame[(found.frame["sparsity"] != written.DENSE) & found.frame["metric"].isin(metrics)]
    words = []
    counts = sorted(set(pruned["n"]))
    if counts and counts[-1] > 1:
        over = f"n = {counts[0]} seeds" if len(counts) == 1 else "n seeds"
        words.append(f"mean ± sample standard deviation over {over}")
    if found.frame.loc[found.frame["metric"].isin(metrics), "stderr"].notna().any():
        words.append("of a single seed, ± is the standard error over the examples")
    words += [text for name, text in _MEANINGS.items() if any(metric.startswith(name) for metric in metrics)]
    words += _heads(found, metrics)
    records = [record for group in found.groups for record in group.records]
    sharing = sum(bool(record.get("cached_blocks") or record.get("cached_passes")) for record in records)
    if sharing and "seconds" in metrics:
        words.append(
            f"{sharing} runs reused statistics collected by other runs; the time to collect them is counted there"
        )
    if any(map(sees_gradients, records)):
        words.append("†: has seen gradients of the dense model, as one-shot methods do not")
    words += _finished(records, metrics)
    words += written.notes(pruned["sparsity"])
    if any(map(is_trained, records)):
        words.append("§: trained on text against the model's own loss, not one-shot")
    competing = pruned[pruned["better"] != 0]
    if len(competing.groupby(["model", "sparsity", "metric"])) < len(competing):
        words.append("bold: best of a model and sparsity")
    made_up = {
        r["method"] for r in records for row in r.get("layers") or () if (row.get("stats") or {}).get("reconstruction")
    }
    whole = {record["method"] for record in records if (record.get("summary") or {}).get("removed")}
    if whole and any(" loss" in metric for metric in metrics):
        words.append(f"{', '.join(sorted(whole))}: losses of the layers whose inputs left")
    words += [f"{name}: a reconstruction, since the method's full text is not public" for name in sorted(made_up)]
    if zeros := _zeros(found):
        words.append(zeros)
    return _capital("; ".join(words)) + "." if words else ""


def _heads(found: Aggregate, metrics: Sequence[str]) -> list[str]:
    """What heads of columns say in short."""
    words = []
    if lengths := sorted({int(m[1]) for name in metrics if (m := re.search(r" perplexity \((\d+)", name))}):
        numbers = ", ".join(map(str, lengths))
        words.append(f"perplexity ({numbers}): in windows of that many tokens")
    if any(re.search(r"\d+ of \d+\)", name) for name in metrics):
        words.append("(… of …): on that many of the windows or examples")
    if any(name.split(" (")[0].endswith(" acc") for name in metrics):
        words.append("acc: accuracy, the share of right answers")
    if any(name.split(" (")[0].endswith(" acc_norm") for name in metrics):
        words.append("acc_norm: accuracy by log-probabilities divided by the answer's length")
    choices = [key for key in found.settings if "." in key]
    if choices:
        words.append(f"{', '.join(choices)}: keys of the configuration")
    return words


def _finished(records: Sequence[Mapping], metrics: Sequence[str]) -> list[str]:
    """Which rows have used gradients on the pruned model, and what that says about their losses."""
    names = {finish_of(record) for record in records} - {"none"}
    words = (
        [f"‡: kept weights followed gradients on the pruned model (finish {', '.join(sorted(names))})"] if names else []
    )
    if any("distil" in name for name in names) and any(" loss" in metric for metric in metrics):
        words.append("losses of distilled rows are those before the distillation")
    return words


_MEANINGS = {
    "relative loss": "relative loss: mean over the pruned layers",
    "held-out loss": "held-out loss: the same on windows not calibrated on",
    "seconds": "seconds: moving blocks, calibration, solving and propagation",
    "training seconds": "training seconds: those of methods that train the model, which are not among the others",
    "finishing seconds": "finishing seconds: those of finishing, which are not among the others",
    "peak GB": "peak GB: the most that one device held at a time until the model was pruned",
}


def _zeros(found: Aggregate) -> str:
    """How far the zeros are from what was asked; N:M and layers with counts that do not divide round."""
    gaps = []
    for group in found.groups:
        for record in group.records:
            layers = record.get("layers") or []
            weights = sum(row["shape"][0] * row["shape"][1] for row in layers)
            if weights:
                asked = sum(row["sparsity_target"] * row["shape"][0] * row["shape"][1] for row in layers) / weights
                gaps.append(abs(measures(record)["zeros"].value - asked))
    if not gaps or max(gaps) < 5e-5:
        return ""
    return f"zeros within {max(gaps):.1g} of the sparsity asked for"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
