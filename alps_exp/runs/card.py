"""The model card of a saved model: what was done to which model, how sparse each layer is, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from tabulate import tabulate

from ..base.redaction import redacted, without_paths
from ..checkpoints.location import local_model

_LISTED = 1000  # layers; of more, record.json tells

# The hub's identifiers of licences that base models are under.
_LICENCES = frozenset(
    "afl-3.0 apache-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd-2-clause "  # noqa: SIM905
    "bsd-3-clause cc-by-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-sa-4.0 cc0-1.0 creativeml-openrail-m "
    "gemma gpl-3.0 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 mit mpl-2.0 "
    "openrail other unknown".split()
)


def card(record: Mapping, base: str | None, licence: str | None, command: str | None) -> str:
    """README.md for a repository of the hub, without keys and without paths of this machine.

    Args:
        record: the run's, as plain values.
        base: the base model's name on the hub; None where it is not from there.
        licence: what the base model's own card says; None where that is not known.
        command: what the run was started with.
    """
    config = record["config"]
    meta = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alps_exp", "pruning", "sparse", record["method"]],
    }
    meta |= {"base_model": base} if base else {}
    if licence:  # the hub takes no other words than these
        known = licence.lower() in _LICENCES
        meta |= {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    summary, environment = record["summary"], record["environment"]
    saved = record.get("saved") or {}
    facts = {
        "base model": base or record["model"],
        "method": record["method"],
        "sparsity": _sparsity(record),
        "target": config["target"]["name"],
        "sensitivity": config["sensitivity"]["name"],
        "allocation": config["allocation"]["name"],
        "allocation: N is one of": config["allocation"].get("choices"),
        "refit": config["refit"],
        "finish": config["finish"]["name"],
        "calibration": _calibration(record),
        "mean relative loss of the layers": summary.get("mean_relative_loss"),
        "stored": saved.get("format", "dense, as any transformers model"),
        "base model's licence": licence or "not found beside the weights: the base model's own applies",
    }
    neutral = ("none", "layer", "uniform", None)
    rows = [(name, value) for name, value in facts.items() if value not in neutral]
    parts = [
        f"# {record['model']} pruned by {record['method']}",
        "Pruned with alps_exp. `record.json` beside the weights is the whole record of the run.",
        _table(rows, ("", "")),
    ]
    if saved.get("format") == "packed":
        parts.append("The weights are packed; `alps_exp.load_packed(FOLDER)` reads them.")
    parts += ["## Evaluation", _evaluations(record["evaluations"])]
    if command:
        parts += ["## Made by", f"```\n{command}\n```"]
    versions = {"alps_exp": environment["code"], "commit": environment["git_commit"], "python": environment["python"]}
    versions |= environment["versions"] | {"device": environment["device"], "dtype": environment.get("dtype")}
    parts += ["## Versions", _table([(name, value) for name, value in versions.items() if value], ("", ""))]
    parts += ["## Sparsity by layer", _layers(record["layers"])] if record["layers"] else []
    if notes := record.get("warnings"):
        parts += ["## Warnings of the run", "\n".join(f"- {_plain(line)}" for line in notes)]
    head = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    return redacted(without_paths(f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"))


def _sparsity(record: Mapping) -> str:
    if not record["layers"]:
        return "0: nothing was pruned"
    summary = record["summary"]
    return f"{record['sparsity']} ({summary['sparsity']:.4f} of the weights of {summary['layers']} layers are zero)"


def _calibration(record: Mapping) -> str | None:
    facts = record["calibration"]
    if not facts:
        return None
    return f"{facts['windows']} windows of {facts['seqlen']} tokens of {facts['dataset']}, seed {record['seed']}"


def _evaluations(rows: Sequence[Mapping]) -> str:
    if not rows:
        return "Nothing was measured."
    found = []
    for row in rows:
        kind = "windows" if "windows" in row else "samples"
        size = f"{row.get(kind)} of {row.get(f'total_{kind}')}" if row.get("partial") else row.get(kind)
        name = f"{row['metric']} ({row['unit']})" if row.get("unit") else row["metric"]
        value = f"{float(row['value']):.6g}"
        found.append((row["dataset"], name, value, size, row.get("seqlen"), row.get("better")))
    return _table(found, ("data", "metric", "value", "windows or examples", "tokens in each", "better"))


def _layers(rows: Sequence[Mapping]) -> str:
    losses = (row.get("relative_loss") for row in rows)
    words = (None if loss is None else f"{float(loss):.4g}" for loss in losses)
    shown = [(row["name"], f"{row['sparsity']:.4f}", loss) for row, loss in zip(rows, words, strict=True)][:_LISTED]
    table = _table(shown, ("layer", "zeros", "relative loss"))
    more = f"\n\nAnd {len(rows) - _LISTED} more, in `record.json`." if len(rows) > _LISTED else ""
    return f"<details><summary>{len(rows)} layers</summary>\n\n{table}{more}\n\n</details>"


def _table(rows: Sequence[Sequence], heads: Sequence[str]) -> str:
    cells = [["" if value is None else _plain(value) for value in row] for row in rows]
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True)


def _plain(value) -> str:
    """Text that Markdown shows as it is."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(f"\\{sign}" if sign in r"\`*_|<>[]" else sign for sign in text).replace("\n", " ")


def base_of(node: Mapping, folder: str) -> tuple[str | None, str | None]:
    """The base model's name on the hub and its licence, as far as they are known.

    Args:
        node: `model` of the configuration.
        folder: where the model is, if it is on this machine.
    """
    if node.get("package") or local_model(node):
        return None, _licence_beside(Path(folder))
    name = str(node["path"])
    import httpx
    from huggingface_hub import HfApi, constants

    try:
        data = HfApi(endpoint=constants.ENDPOINT).model_info(name, revision=node.get("revision")).card_data
    except (httpx.HTTPError, OSError):  # from the cache, or out of reach by now
        data = None
    return name, getattr(data, "license", None)


def _licence_beside(folder: Path) -> str | None:
    """The `license` in the head of a folder's README.md."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    found = head.get("license") if isinstance(head, Mapping) else None
    return found if isinstance(found, str) else None
