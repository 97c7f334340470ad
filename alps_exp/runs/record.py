"""The result of one run, as data: written first and atomically; everything else (tables, W&B) reads it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..base.files import read_json, write_json
from ..base.redaction import redaction

if TYPE_CHECKING:  # the rooms below need torch, and who only reads records does not
    from ..pruning.rows import LayerRow, PruneResult

SCHEMA = 1
FILE = "record.json"


@dataclass
class RunRecord:
    """One run.

    Attributes:
        status: "running", "complete" or "failed".
        config, config_hash: what was asked, resolved, and its hash (what cannot change the result left out).
        model, method, sparsity, seed: the run's coordinates in a table.
        calibration: where the tokens came from, and how they were drawn.
        layers: one row per pruned layer.
        summary: layers, weights (in them), block_weights (all parameters of the decoder blocks), share (the former of
            the latter), sparsity over all pruned weights, mean relative loss, solver seconds; of structured pruning
            `removed`: weights that left with their channels and heads, their share of block_weights, and the share of
            `channels` and of `heads`.
        phases: seconds of load, transfer (blocks to the device and back), calibrate, solve, propagate, evaluate, save;
            peak device and host memory in bytes, that of the device also until the model was pruned.
        evaluations: dataset, metric, value, windows, seqlen, protocol, …
        sample: prompt and what the dense and the pruned model make of it.
        saved: format of the saved weights, bytes dense and packed, and their ratio, with save=packed; bytes dense and
            shrunk with save=shrunk.
        pushed: address of the commit on the hub (save.push).
        drift: of every block's output from the dense model's, by stream (target=stream).
        strength: what target.strength=auto was chosen by.
        finish: what finishing did: a training per block (`blocks`) and that of the model (`distil`), each with its loss
            on held-out windows `before` and `after`, `curve`, `steps`, `seconds` and `tokens`; whether the losses of
            `layers` are those before the distillation (`layer_losses`).
        training: of a method that trains the model on text, what its training did: `steps`, `tokens`,
            `tokens_per_second`, `seconds`, `curve`, and more (docs/training.md).
        warnings: what was unusual and was handled.
        environment: versions, device, git commit; whether the model was streamed and where its hidden states were.
        error: type and message, of a failed run.
        attempts: how often the run was begun. Seconds of calibrate, solve and propagate are those of every block where
            it was finished; all else in `phases` is of the last attempt, `restore` the time that it took to get there.
        cached_blocks: those whose statistics this attempt took from another run; their seconds of calibrate are those
            of reading them.
        cached_passes: passes over the dense model whose results this attempt took from another run.
    """

    status: str
    config: dict
    config_hash: str
    model: str
    method: str
    sparsity: str
    seed: int
    calibration: dict = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    phases: dict = field(default_factory=dict)
    evaluations: list[dict] = field(default_factory=list)
    sample: dict | None = None
    saved: dict | None = None
    pushed: str | None = None
    drift: list[dict] = field(default_factory=list)
    strength: dict = field(default_factory=dict)
    finish: dict = field(default_factory=dict)
    training: dict | None = None
    warnings: list[str] = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    error: dict | None = None
    attempts: int = 1
    cached_blocks: list[int] = field(default_factory=list)
    cached_passes: list[str] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    def book(self, result: PruneResult) -> list[str]:
        """Take over what the block loop did; hands back what was unusual about it, in words."""
        self.layers = result.layers
        self.summary = summarise(result.layers, result.block_weights)
        self.phases |= {f"{phase}_seconds": seconds for phase, seconds in result.seconds.items()}
        self.environment["hidden_states"] = result.hidden_states
        self.cached_blocks = result.cached_blocks
        self.cached_passes = result.cached_passes
        self.drift = result.drift
        self.strength = result.strength
        self.finish = result.finish
        self.training = result.training
        found = warnings_of(result.layers) + result.notes
        self.warnings += found
        return found

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return _plain(dataclasses.asdict(self), redaction())

    def write(self, directory: Path) -> Path:
        """Write `record.json` into the directory, whole or not at all."""
        path = directory / FILE
        write_json(path, self.to_dict())
        return path


def summarise(rows: list[LayerRow], block_weights: int = 0) -> dict:
    """Figures over all pruned layers: weights weigh in the sparsity, layers equally in the mean relative loss.

    Args:
        rows: of the layers.
        block_weights: all parameters of the decoder blocks.
    """
    weights = sum(row.shape[0] * row.shape[1] for row in rows)
    losses = [row.relative_loss for row in rows if row.relative_loss is not None]
    held_out = [row.held_out_loss for row in rows if row.held_out_loss is not None]
    units = [row.stats for row in rows if "unit" in row.stats]
    from ..pruning.structured import removed_weights

    removed = removed_weights(rows)
    found = {"weights": removed, "share": removed / block_weights if block_weights else None}
    for kind in dict.fromkeys(own["unit"] for own in units):
        of = [own for own in units if own["unit"] == kind]
        found[kind] = 1 - sum(own["kept"] for own in of) / sum(own["units"] for own in of)
    structured = {"removed": found} if units else {}
    return (
        structured
        | _experts(rows)
        | {
            "layers": len(rows),
            "weights": weights,
            "block_weights": block_weights,
            "share": weights / block_weights if block_weights else None,
            "sparsity": sum(row.sparsity * row.shape[0] * row.shape[1] for row in rows) / weights if weights else 0.0,
            "mean_relative_loss": math.fsum(losses) / len(losses) if losses else None,
            "mean_held_out_loss": math.fsum(held_out) / len(held_out) if held_out else None,
            "solver_seconds": math.fsum(row.seconds for row in rows),
        }
    )


def _experts(rows: Sequence[LayerRow]) -> dict:
    """How many tokens the experts of a mixture received, if there are such.

    Returns:
        `experts`: `count` of experts, `tokens` that they received on average, `thinnest`, the one with the fewest, and
        its `fewest` tokens.
    """
    tokens = {row.name.rpartition(".")[0]: row.tokens for row in rows if "borrowed" in row.stats}
    if not tokens:
        return {}
    thinnest = min(tokens, key=tokens.__getitem__)
    mean = sum(tokens.values()) / len(tokens)
    return {"experts": {"count": len(tokens), "tokens": mean, "thinnest": thinnest, "fewest": tokens[thinnest]}}


def warnings_of(rows: Sequence[LayerRow]) -> list[str]:
    """What was unusual about the layers' inputs or losses, one line per kind."""
    found = []
    dead = [row for row in rows if row.dead_inputs]
    if dead:
        found.append(
            f"{len(dead)} layers have inputs that are zero on every calibration token ({dead[0].name}: "
            f"{dead[0].dead_inputs} of {dead[0].shape[1]}); their weights are pruned first or ignored"
        )
    empty = dict.fromkeys(row.name.rpartition(".")[0] for row in rows if "borrowed" in row.stats and not row.tokens)
    if empty:
        found.append(
            f"{len(empty)} experts received no calibration tokens and were pruned by the mean statistics of their "
            f"layer's experts: {', '.join(empty)}; use more windows (nsamples)"
        )
    if raised := [row for row in rows if "ridge" in row.stats]:
        found.append(
            f"{len(raised)} layers' Gram matrices are not positive definite with method.ridge, which was raised, up to "
            f"{max(row.stats['ridge'] for row in raised):.2g} ({raised[0].name}): use more windows (nsamples)"
        )
    few = [row for row in rows if row.tokens is not None and row.tokens < row.shape[1]]
    if few:
        found.append(
            f"{len(few)} layers have more inputs than calibration tokens ({few[0].name}: {few[0].shape[1]} inputs, "
            f"{few[0].tokens} tokens); their losses say little about other text: use more windows (nsamples)"
        )
    fitted = ((row.name, row.relative_loss if row.target == "layer" else row.target_loss) for row in rows)
    lost = {name: loss for name, loss in fitted if (loss or 0) > 1}
    if lost:
        worst = max(lost, key=lost.get)
        found.append(
            f"{len(lost)} layers have a relative loss above 1, which is worse than zeros alone (the worst {worst}: "
            f"{lost[worst]:.4g}): the result is doubtful; try another method, a lower sparsity or other text"
        )
    return found


def load(file: Path) -> dict:
    """The record in a file, as plain values.

    Raises:
        UserError: it cannot be read, is of a later version's form, or is no record; the file is named.
    """
    try:
        value = read_json(file, constant=str)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a readable record ({error}): delete it or run it again") from None
    return checked(value, str(file))


def find(directory: Path) -> dict | None:
    """The record of a run in its directory; None where there is none that can be read."""
    try:
        return load(directory / FILE)
    except UserError:
        return None


def checked(value, place: str) -> dict:
    """The value, if it is a record that this version can read.

    Raises:
        UserError: it is not; `place` is named.
    """
    from pydantic import ValidationError

    from .record_form import RecordForm

    schema = value.get("schema", SCHEMA) if isinstance(value, dict) else SCHEMA
    if isinstance(schema, int) and schema > SCHEMA:
        raise UserError(
            f"{place} is a record of form {schema}, by a later version of alps_exp; this one reads forms up to "
            f"{SCHEMA}: update alps_exp, or move the file elsewhere"
        )
    try:
        RecordForm.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise UserError(
            f"{place} is no run record ({where}: {first['msg']}): move it elsewhere, or run it again"
        ) from None
    return value


def set_aside(directory: Path) -> Path | None:
    """Rename a record that cannot be read, so that a run may write its own; the new name, None where there is none."""
    file = directory / FILE
    if not os.path.lexists(file) or find(directory) is not None:
        return None
    names = (f"record.unreadable{f'-{number}' if number else ''}.json" for number in itertools.count())
    aside = next(path for path in (directory / name for name in names) if not os.path.lexists(path))
    file.rename(aside)
    return aside


def _plain(value, redacted: Callable[[str], str]):
    """JSON has no NaN or infinity: they become strings, so that a reader notices instead of failing to parse. Keys of
    online services are left out."""
    if isinstance(value, dict):
        return {str(key): _plain(item, redacted) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, redacted) for item in value]
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
