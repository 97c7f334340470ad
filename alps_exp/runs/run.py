"""One run: settings → model and tokens → block loop → evaluation → record."""

from __future__ import annotations

import errno
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..base import threads
from ..base.clock import Stopwatch
from ..base.errors import UserError
from ..base.redaction import refuse_keys
from ..checkpoints import upload
from ..checkpoints.hub import first_line
from ..evaluation import perplexity, protocol
from ..model import loading
from ..model.blocks import BlockModel
from ..procedure.distil import refuse_streamed
from ..procedure.prune import prune_blocks
from ..procedure.strength import check_strength
from ..procedure.trained import refuse_streamed as refuse_untrainable
from ..pruning.job import PruneJob
from ..pruning.store import NoStore, ProgressStore, locked
from ..pruning.tools import Tools
from . import resume, sharing, together
from .fresh import fresh_text
from .loggers import log_record
from .naming import Configuration
from .provenance import environment, identity, inputs_of, peak_memory
from .record import FILE, RunRecord
from .saving import rehearse, save
from .settings import Settings, resolve
from .workspace import Workspace, streams


def run(
    asked: Mapping | Settings,
    directory: Path,
    workspace: Workspace | None = None,
    finished: Callable[[Path], dict | None] = lambda directory: None,
) -> dict:
    """Run one configuration and write its record into `directory`.

    What an interrupted run of the same configuration has finished there is not done again.

    Args:
        asked: the composed configuration, or what it was resolved to already.
        directory: the run's own directory; a complete record of an earlier run there is kept as record.previous.json.
            One of another configuration is refused.
        workspace: loads the model and the texts; give one to share them between runs.
        finished: asked once no other process is at work in the directory; a record that it finds is all there is to do.

    Returns:
        The record as plain values.

    Raises:
        HeldError: another process is at work in the directory.
        UserError and others: after a record with status "failed" and the error was written.
        KeyboardInterrupt: likewise; its text says from where the same command goes on.
    """
    if not sys.stderr.isatty():  # the libraries' own bars fill a log with thousands of lines
        transformers_logging.disable_progress_bar()
    configuration = asked.configuration if isinstance(asked, Settings) else Configuration.of(asked)
    content, solver = configuration.content, configuration.solver
    refuse_keys(content)
    record = RunRecord(
        status="running",
        config=content,
        config_hash=configuration.digest,
        model=configuration.model,
        method=content["method"]["name"],
        sparsity=str(configuration.pattern) if solver.prunes else "0",
        seed=content["seed"],
    )
    directory.mkdir(parents=True, exist_ok=True)
    workspace = workspace or Workspace()
    with locked(directory), _resource_errors(directory):
        resume.refuse_other(directory, configuration)
        resume.check(configuration, content["resume"], content["resumable"], directory)
        if (earlier := finished(directory)) is not None:
            return earlier
        together.outlast(directory)
        resume.prepare(directory, content["resume"])
        chosen = threads.settle(content["threads"])
        _announce(chosen.line)
        record.write(directory)
        try:
            settings = asked if isinstance(asked, Settings) else resolve(content)
            store = _execute(settings, record, directory, workspace, chosen)
            record.status = "complete"
            record.write(directory)
        except BaseException as error:
            if cut := isinstance(error, KeyboardInterrupt):
                on = f": the same command goes on from {directory}" if content["resumable"] else ""
                error = KeyboardInterrupt(f"interrupted{on}")
            record.status = "failed"
            record.error = {"type": type(error).__name__, "message": str(error)}
            with suppress(OSError):  # on a full disk; what is reported is the error itself
                record.write(directory)
            if cut:
                raise error from None
            raise
        if store is not None:
            store.clear()
    log_record(record.to_dict(), settings.logger, directory)
    if not workspace.keep:  # a sweep has lines and tables of its own
        print(describe(record, directory), flush=True)
    return record.to_dict()


class _Texts(NamedTuple):
    """What a run reads: its windows, None where it prunes nothing; what judges it; fresh text, where it came from, and
    what is doubtful about it."""

    tokens: Tensor | None
    prepared: protocol.Prepared
    fresh: Tensor | None
    facts: dict
    doubts: list[str]


def _execute(
    settings: Settings, record: RunRecord, directory: Path, workspace: Workspace, chosen: threads.Choice
) -> ProgressStore | None:
    """All of a run but its record's last word; hands back the finished blocks, for which there is no use any more."""
    device, asked = settings.device, settings.evaluation
    _refuse_streamed(settings, record.method, streams(settings, 2 if workspace.keep else 1))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    record.environment = environment(device) | {"cores_free": chosen.free}
    torch.manual_seed(settings.calibration.seed)
    watch = Stopwatch(device)

    texts = _read(settings, record, workspace)
    if settings.save:
        rehearse(settings.model.config, workspace.tokenizer(settings), record.model)
    in_team, peak, fallbacks = settings.prunes and settings.devices > 1, None, []
    if in_team:
        # Its blocks are on the disk afterwards; what follows takes them from there, as when a run goes on.
        content = settings.configuration.content
        peak, fallbacks = together.prune_together(content, directory, device, settings.devices, texts.fresh)
        watch.lap("prune")
    model = _load(settings, record, directory, workspace, texts.doubts)
    store = None
    if settings.prunes:
        job, tools = _open(settings, record, directory, workspace, model, texts, in_team)
        store = tools.store if settings.resumable else None
    watch.lap("load")

    if asked.sample_tokens:
        record.sample = {"prompt": asked.prompt, "dense": workspace.dense_sample(settings, model)}
        watch.lap("evaluate")
    if settings.prunes:
        _prune(record, model, job, tools)
        record.finish |= {"text": texts.facts} if texts.facts else {}
        watch.lap("prune")
        record.phases["pruning_peak_device_bytes"] = peak or peak_memory(device)["peak_device_bytes"]
        _tell(record, [line for line in fallbacks if line not in record.warnings])
        _tell(record, _doubts_of_threads(store, device))
    tokenizer = workspace.tokenizer(settings) if settings.reads_text else None
    record.evaluations = protocol.measure(texts.prepared, asked, model, tokenizer)
    if asked.sample_tokens and settings.prunes:
        record.sample["pruned"] = perplexity.sample(model, tokenizer, asked.prompt, asked.sample_tokens)
    watch.lap("evaluate")
    _book_phases(record, watch, device, peak)
    if settings.save:
        _save(settings, record, directory, model, tokenizer, store, watch)
        _book_phases(record, watch, device, peak)
    return store


def _refuse_streamed(settings: Settings, method: str, streamed: bool) -> None:
    """Raise UserError for what needs the whole model in memory where the blocks are read one at a time."""
    if settings.finish.distil is not None:
        refuse_streamed(streamed)
    if getattr(settings.target, "strength", 0) == "auto":
        check_strength(settings.calibration.data.holdout, settings.devices, streamed)
    if settings.solver.trains:
        refuse_untrainable(method, streamed)


def _read(settings: Settings, record: RunRecord, workspace: Workspace) -> _Texts:
    """All texts, before the model is loaded."""
    if not settings.prunes:
        return _Texts(None, workspace.prepared(settings), None, {}, [])
    tokens, record.calibration = workspace.calibration(settings)
    prepared = workspace.prepared(settings)
    return _Texts(tokens, prepared, *fresh_text(settings, tokens, prepared, workspace))


def _load(
    settings: Settings, record: RunRecord, directory: Path, workspace: Workspace, doubts: Sequence[str]
) -> BlockModel:
    """The dense model; the record says how it came and what is doubtful about it and the texts."""
    model = workspace.model(settings, settings.device, directory)
    record.environment["dtype"] = str(model.model.dtype).removeprefix("torch.")
    record.environment["streamed"] = model.source is not None
    record.environment["inputs"] = inputs_of(settings)  # a checkpoint on the hub is here by now
    note = loading.tokenizer_note(settings.model.source) if settings.reads_text else None
    _tell(record, [*loading.doubts(settings.model, model.model), *doubts, *([note] if note else [])])
    return model


def _open(
    settings: Settings,
    record: RunRecord,
    directory: Path,
    workspace: Workspace,
    model: BlockModel,
    texts: _Texts,
    in_team: bool,
) -> tuple[PruneJob, Tools]:
    """What is to be pruned, and what was kept for it by earlier attempts and by other runs."""
    job, store = job_of(settings, texts.tokens, texts.fresh), NoStore()
    same = identity(settings, settings.device, model.model.dtype, texts.tokens, texts.fresh)
    if settings.resumable:
        automatic = threads.automatic(settings.configuration.content["threads"])
        store = resume.open_store(directory, same, keep_threads=automatic)
        record.environment["threads"] = torch.get_num_threads()
        record.attempts = store.attempts - in_team
        if store.finished and not in_team:
            print(f"alps_exp: {len(store.finished)} of {len(model)} blocks are finished already", file=sys.stderr)
    cache = sharing.open_cache(settings, job, same, directory, workspace.keep)
    return job, Tools(store, cache, passes=sharing.open_passes(settings, same, directory, workspace.keep))


def _prune(record: RunRecord, model: BlockModel, job: PruneJob, tools: Tools) -> None:
    try:
        _print(record.book(prune_blocks(model, job, tools)))
    finally:
        tools.sharing.close()
        tools.store.close()


def _doubts_of_threads(store: ProgressStore | None, device: torch.device) -> list[str]:
    if store is None or device.type != "cpu" or len(store.threads) < 2:
        return []
    counts = ", ".join(map(str, store.threads))
    return [f"attempts ran with different numbers of threads ({counts}): last digits may differ"]


def _save(
    settings: Settings,
    record: RunRecord,
    directory: Path,
    model: BlockModel,
    tokenizer: PreTrainedTokenizerBase,
    store: ProgressStore | None,
    watch: Stopwatch,
) -> None:
    known = len(record.warnings)
    save(model, tokenizer, settings, record, directory, store)
    _print(record.warnings[known:])
    watch.lap("save")
    if settings.push is not None:
        title = f"{record.model} pruned by {record.method}, sparsity {record.sparsity}"
        record.pushed = upload.push(directory / "model", settings.push, title)
        watch.lap("push")


@cache
def _announce(line: str | None) -> None:
    """Say once per process what holds for all of its runs."""
    if line is not None:
        print(f"alps_exp: {line}", file=sys.stderr)


def _tell(record: RunRecord, warnings: Sequence[str]) -> None:
    """Write warnings into the record and say them."""
    record.warnings += warnings
    _print(warnings)


def _print(warnings: Sequence[str]) -> None:
    for line in warnings:
        logging.getLogger("alps_exp").warning(line)
        print(f"alps_exp: warning: {line}", file=sys.stderr)


def job_of(settings: Settings, tokens: Tensor, fresh: Tensor | None = None, quiet: bool = False) -> PruneJob:
    """What the settings ask the block loop to do.

    Args:
        settings: the run's.
        tokens: all windows, as `CalibrationSettings.divided` takes them apart.
        fresh: (windows, seqlen) to distil on in place of those of fresh text among `tokens`.
        quiet: no progress.
    """
    windows = settings.calibration.divided(tokens)
    return PruneJob(
        solver=settings.solver,
        patterns=settings.patterns,
        selection=settings.selection,
        tokens=windows.calibration,
        batch_size=settings.batch_size,
        propagate=settings.propagate,
        losses=settings.losses,
        held_out=windows.held_out if len(windows.held_out) else None,
        quiet=quiet,
        target=settings.target,
        capture=settings.capture,
        sensitivity=settings.sensitivity,
        allocation=settings.allocation,
        finish=settings.finish,
        fresh=windows.fresh if fresh is None else fresh,
        text=windows.training,
        shrinkage=settings.expert_shrinkage,
        weighting=settings.expert_weighting,
    )


def _book_phases(record: RunRecord, watch: Stopwatch, device: torch.device, peak: int | None) -> None:
    # The loop books its own phases, which "prune" spans.
    record.phases |= {f"{phase}_seconds": seconds for phase, seconds in watch.seconds.items() if phase != "prune"}
    record.phases |= peak_memory(device)
    # An evaluation may have begun to count anew, and a team's devices have counted for themselves.
    known = (peak, record.phases.get("pruning_peak_device_bytes"), record.phases["peak_device_bytes"])
    record.phases["peak_device_bytes"] = max(filter(None, known), default=None)


@contextmanager
def _resource_errors(directory: Path) -> Iterator[None]:
    """A full disk or device is the user's to mend, however deep the library that met it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device's memory does not suffice ({first_line(error)}): use shorter windows (seqlen, eval.seqlen), "
            "eval.batch_size=1, or a larger device; the same command goes on from the last finished block"
        ) from error
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise UserError(
                f"the disk is full while writing to {directory}: make space, and the same command goes on from there"
            ) from error
        raise


def describe(record: RunRecord, directory: Path) -> str:
    """A short summary for the terminal."""
    title = f"{record.model}, {record.method}" + (f", sparsity {record.sparsity}" if record.layers else "")
    lines = [title]
    if record.layers:
        loss, held_out = record.summary["mean_relative_loss"], record.summary["mean_held_out_loss"]
        lines.append(
            f"  {record.summary['layers']} layers ({record.summary['share']:.1%} of the blocks' weights), "
            f"{record.summary['sparsity']:.4f} zeros, mean relative loss "
            + (f"{loss:.4g}" if loss is not None else "not measured")
            + (f", {held_out:.4g} on held-out windows" if held_out is not None else "")
        )
        if experts := record.summary.get("experts"):
            lines.append(
                f"  {experts['count']} experts received {experts['tokens']:.4g} tokens on average, "
                f"{experts['thinnest']} the fewest: {experts['fewest']}"
            )
        if "removed" in record.summary:
            removed = record.summary["removed"]
            units = ", ".join(f"{removed[kind]:.1%} of the {kind}" for kind in ("channels", "heads") if kind in removed)
            lines.append(f"  {units} left, with {removed['share']:.1%} of the blocks' weights")
    if blocks := record.finish.get("blocks"):
        before, after = (math.fsum(row[key] for row in blocks) / len(blocks) for key in ("before", "after"))
        counted = "1 block" if len(blocks) == 1 else f"{len(blocks)} blocks"
        lines.append(f"  finished {counted}: mean error on held-out windows {before:.4g} → {after:.4g}")
    if done := record.finish.get("distil"):
        lines.append(
            f"  distilled in {done['steps']} steps: divergence on held-out windows {done['before']:.4g} → "
            f"{done['after']:.4g} (the layers' losses are those before it)"
        )
    if done := record.training:
        lines.append(
            f"  trained in {done['steps']} steps on {done['tokens']:,} tokens, {done['tokens_per_second']:.4g} tokens/s"
        )
        if "sparsity_before" in done:
            lines.append(f"  zeros {done['sparsity_before']:.6f} before, {done['sparsity_after']:.6f} after")
    lines += [f"  {line}" for line in protocol.describe(record.evaluations)]
    if record.saved:
        form = "shrunk" if "shrunk_bytes" in record.saved else "packed"
        dense, small = record.saved["dense_bytes"], record.saved[f"{form}_bytes"]
        lines.append(f"  saved {form}: {small / 1e6:.4g} MB, {small / dense:.1%} of {dense / 1e6:.4g} MB dense")
    if record.pushed:
        lines.append(f"  pushed to {record.pushed}")
    seconds = {k.removesuffix("_seconds"): v for k, v in record.phases.items() if k.endswith("_seconds")}
    lines.append(f"  {sum(seconds.values()):.1f} s: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    lines.append(f"  {directory / FILE}")
    return "\n".join(lines)
