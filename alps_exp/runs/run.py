"""One run: configuration → model and tokens → block loop → evaluation → record."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..allocation.prunable import linear_shapes, other_names
from ..allocation.selection import Selection
from ..base.checks import local_path, one_of, parse_device, require
from ..base.clock import Stopwatch
from ..base.errors import UserError
from ..base.redaction import refuse_keys
from ..calibration.sharing import NoSharing
from ..checkpoints.hub import first_line
from ..data import texts, windows
from ..evaluation import perplexity, protocol
from ..layer.registry import build
from ..layer.solver import Solver
from ..methods.refit import REFITS, refitted
from ..model import loading
from ..model.hidden import PLACES
from ..patterns import Pattern
from ..patterns.written import pattern_of
from ..pruning.job import PROPAGATE, PruneJob
from ..pruning.loop import prune_blocks
from ..pruning.store import NoStore, ProgressStore, locked
from ..pruning.tools import Tools
from . import resume, sharing
from . import together as launch
from .environment import environment, peak_memory
from .inputs import inputs_of
from .loggers import check_logger, log_record
from .naming import canonical, config_hash, model_name
from .record import FILE, RunRecord
from .saving import rehearse, save
from .workspace import Workspace

SAVE = (False, True, "dense", "packed")
COMPLETE = ("auto", "skip", "renew", "again")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def validate(cfg: Mapping) -> dict[str, Pattern]:
    """Check all that can be known without the weights and the texts.

    Args:
        cfg: the composed configuration.

    Returns:
        layer name → pattern, for every layer that the run prunes.

    Raises:
        UserError: the first mistake found.
    """
    refuse_keys(cfg)
    _check_paths(cfg)
    solver = build(cfg["method"])
    selection_of(cfg), pattern_of(cfg["sparsity"])
    for key, low in (("nsamples", 1), ("seqlen", 2), ("batch_size", 1), ("devices", 1), ("seed", 0)):
        require(key, cfg[key], int, low, float("inf"))
    launch.check(cfg)
    require("data.holdout", cfg["data"]["holdout"], int, 0, float("inf"))
    if cfg["data"]["holdout"] and not cfg["losses"]:
        raise UserError(f"data.holdout={cfg['data']['holdout']} measures losses and needs losses=true")
    one_of("propagate", cfg["propagate"], PROPAGATE)
    one_of("dtype", cfg["dtype"], ("auto", *DTYPES))
    one_of("refit", cfg["refit"], REFITS)
    for key in ("losses", "plan", "resumable"):
        one_of(key, cfg[key], (True, False))
    one_of("complete", cfg["complete"], COMPLETE)
    if cfg["minutes"] is not None:
        require("minutes", cfg["minutes"], float, 0, float("inf"), open_low=True)
    one_of("save", cfg["save"], SAVE)
    one_of("stream", cfg["stream"], ("auto", True, False))
    one_of("hidden_states", cfg["hidden_states"], PLACES)
    if cfg["stream"] is True and not cfg["resumable"] and solver.prunes:
        raise UserError("stream=true keeps pruned blocks in the run's directory and needs resumable=true")
    resume.check(cfg)
    sharing.check(cfg)
    parse_device(cfg["device"])
    check_logger(cfg["logger"])
    _check_texts(cfg, solver.prunes)

    config = loading.load_config(cfg["model"])
    loading.check_weights(cfg["model"])
    context = loading.context_length(config)
    if solver.prunes and context is not None and cfg["seqlen"] > context:
        raise UserError(f"seqlen={cfg['seqlen']} is beyond the model's context of {context} tokens: give at most that")
    patterns = layer_patterns(cfg)
    protocol.check(cfg)
    _check_tokenizer(cfg, solver.prunes)
    return patterns


def layer_patterns(cfg: Mapping) -> dict[str, Pattern]:
    """layer name → pattern, for every layer that the run prunes.

    Raises:
        UserError: names or patterns that do not fit the model.
    """
    if not build(cfg["method"]).prunes:
        return {}
    network, selection = loading.empty_model(cfg["model"]), selection_of(cfg)
    shapes = linear_shapes(network, selection)
    return selection.patterns_for(shapes, pattern_of(cfg["sparsity"]), other_names(network))


def _check_texts(cfg: Mapping, prunes: bool) -> None:
    """What the configuration says about calibration texts, and about BOS, without reading them."""
    for key in ("model", "eval"):
        windows.check_bos(f"{key}.bos", cfg[key]["bos"])
    windows.check_node(cfg["data"])
    windows.check_seed(cfg["data"], cfg["seed"])
    if prunes:
        texts.check_source(cfg["data"])
    for key in ("path", "eval_path"):
        if (path := cfg["data"].get(key)) is not None:
            texts.local_file(path, f"data.{key}={path}")


def _reads_text(cfg: Mapping, prunes: bool) -> bool:
    """Whether a run has any use for the model's tokenizer."""
    options = cfg["eval"]
    return bool(prunes or options["datasets"] or options["tasks"] or options["sample_tokens"] or cfg["save"])


def _check_tokenizer(cfg: Mapping, prunes: bool) -> None:
    """Whether the model has a tokenizer that can do what the run asks of it."""
    if not _reads_text(cfg, prunes):
        return
    options, tokenizer = cfg["eval"], loading.load_tokenizer(cfg["model"])
    for key, used in (("model", prunes), ("eval", options["datasets"] or options["tasks"])):
        if used:
            windows.check_bos(f"{key}.bos", cfg[key]["bos"], tokenizer)
    if options["sample_tokens"]:
        config = loading.load_config(cfg["model"])
        perplexity.prompt_ids(tokenizer, options["prompt"], options["sample_tokens"], config)


def _check_paths(cfg: Mapping) -> None:
    """That the folders which a configuration names can be looked at, and the files of a local model be read."""
    paths = {"model.path": cfg["model"].get("path"), "eval.task_source": cfg["eval"]["task_source"]}
    paths |= {"resume": cfg["resume"]} if cfg["resume"] not in ("auto", False) else {}
    found = {key: local_path(key, path) for key, path in paths.items() if path is not None}
    if (folder := found.get("model.path")) and folder.is_dir():
        for kind in ("*.json", "*.safetensors", "*.bin", "*.gguf", "*.model"):
            for file in sorted(folder.glob(kind)):
                local_path("model.path", file)


def selection_of(cfg: Mapping) -> Selection:
    """The configuration's choice of layers."""
    layers = cfg["layers"]
    return Selection.parse(layers["include"], layers["exclude"], layers["sparsity"])


def run(
    cfg: DictConfig,
    directory: Path,
    workspace: Workspace | None = None,
    finished: Callable[[Path], dict | None] = lambda directory: None,
) -> dict:
    """Run one configuration and write its record into `directory`.

    What an interrupted run of the same configuration has finished there is not done again.

    Args:
        cfg: the composed configuration.
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
    plain = canonical(cfg)
    plain.pop("table", None)  # of a sweep's file
    refuse_keys(plain)
    solver = build(plain["method"])
    record = RunRecord(
        status="running",
        config=plain,
        config_hash=config_hash(cfg),
        model=model_name(cfg),
        method=plain["method"]["name"],
        sparsity=str(pattern_of(plain["sparsity"])) if solver.prunes else "0",
        seed=plain["seed"],
    )
    directory.mkdir(parents=True, exist_ok=True)
    workspace = workspace or Workspace()
    with locked(directory), _resource_errors(directory):
        resume.refuse_other(directory, cfg)
        resume.check(plain, directory)
        if (earlier := finished(directory)) is not None:
            return earlier
        launch.outlast(directory)
        resume.prepare(directory, plain["resume"])
        record.write(directory)
        try:
            store = _execute(plain, solver, record, directory, workspace)
            record.status = "complete"
            record.write(directory)
        except BaseException as error:
            record.status = "failed"
            record.error = {"type": type(error).__name__, "message": str(error)}
            with suppress(OSError):  # on a full disk; what is reported is the error itself
                record.write(directory)
            if isinstance(error, KeyboardInterrupt) and plain["resumable"]:
                raise KeyboardInterrupt(f"interrupted: the same command goes on from {directory}") from None
            raise
        if store is not None:
            store.clear()
    log_record(record.to_dict(), plain["logger"], directory)
    if not workspace.keep:  # a sweep has lines and tables of its own
        print(describe(record, directory), flush=True)
    return record.to_dict()


def _execute(
    cfg: dict, solver: Solver, record: RunRecord, directory: Path, workspace: Workspace
) -> ProgressStore | None:
    """All of a run but its record's last word; hands back the finished blocks, for which there is no use any more."""
    device = parse_device(cfg["device"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    record.environment = environment(device)
    torch.manual_seed(cfg["seed"])
    watch = Stopwatch(device)
    patterns = validate(cfg)

    tokens = store = None
    cache = NoSharing()
    if solver.prunes:
        tokens, record.calibration = workspace.calibration(cfg)
    prepared = workspace.prepared(cfg)
    if cfg["save"]:
        rehearse(loading.load_config(cfg["model"]), workspace.tokenizer(cfg), record.model)
    together, peak = solver.prunes and cfg["devices"] > 1, None
    if together:
        # Its blocks are on the disk afterwards; what follows takes them from there, as when a run goes on.
        peak = launch.prune_together(cfg, record.config_hash, directory, device)
        watch.lap("prune")
    model = workspace.model(cfg, device, dtype_of(cfg, device), directory)
    record.environment["dtype"] = str(model.model.dtype).removeprefix("torch.")
    record.environment["streamed"] = model.source is not None
    record.environment["inputs"] = inputs_of(cfg)  # a checkpoint on the hub is here by now
    record.warnings = loading.doubts(cfg["model"], model.model)
    if _reads_text(cfg, solver.prunes) and (note := loading.tokenizer_note(cfg["model"])):
        record.warnings.append(note)
    _tell(record.warnings)
    if solver.prunes:
        job = job_of(cfg, solver, patterns, tokens)
        same = resume.identity(cfg, record.config_hash, device, model.model.dtype, tokens)
        if cfg["resumable"]:
            store = resume.open_store(directory, same)
            record.attempts = store.attempts - together
            if store.finished and not together:
                print(f"alps_exp: {len(store.finished)} of {len(model)} blocks are finished already", file=sys.stderr)
        cache = sharing.open_cache(cfg, job, same, directory, workspace.keep)
    watch.lap("load")

    sampling = cfg["eval"]["sample_tokens"] > 0
    if sampling:
        record.sample = {"prompt": cfg["eval"]["prompt"], "dense": workspace.dense_sample(cfg, model)}
        watch.lap("evaluate")
    if solver.prunes:
        try:
            _tell(record.book(prune_blocks(model, job, Tools(store or NoStore(), cache))))
        finally:
            cache.close()
            if store is not None:
                store.close()
        watch.lap("prune")
        if store is not None and device.type == "cpu" and len(store.threads) > 1:
            counts = ", ".join(map(str, store.threads))
            note = f"attempts ran with different numbers of threads ({counts}): last digits may differ"
            record.warnings.append(note)
            _tell([note])
    record.evaluations = protocol.measure(prepared, cfg, model, workspace.tokenizer(cfg))
    if sampling and solver.prunes:
        text = perplexity.sample(model, workspace.tokenizer(cfg), cfg["eval"]["prompt"], cfg["eval"]["sample_tokens"])
        record.sample["pruned"] = text
    watch.lap("evaluate")
    _book_phases(record, watch, device, peak)
    if cfg["save"]:
        known = len(record.warnings)
        save(model, workspace.tokenizer(cfg), record, directory, store)
        _tell(record.warnings[known:])
        watch.lap("save")
        _book_phases(record, watch, device, peak)
    return store


def _tell(warnings: Sequence[str]) -> None:
    for line in warnings:
        logging.getLogger("alps_exp").warning(line)
        print(f"alps_exp: warning: {line}", file=sys.stderr)


def job_of(
    cfg: Mapping, solver: Solver, patterns: Mapping[str, Pattern], tokens: Tensor, quiet: bool = False
) -> PruneJob:
    """What the configuration asks the block loop to do.

    Args:
        cfg: the configuration.
        solver: its method.
        patterns: layer name → pattern.
        tokens: (nsamples + data.holdout, seqlen) windows to calibrate on, then those to hold out.
        quiet: no progress.
    """
    calibration, held_out = tokens[: cfg["nsamples"]], tokens[cfg["nsamples"] :]
    return PruneJob(
        solver=refitted(solver, cfg["refit"]),
        patterns=patterns,
        selection=selection_of(cfg),
        tokens=calibration,
        batch_size=cfg["batch_size"],
        propagate=cfg["propagate"],
        losses=cfg["losses"],
        held_out=held_out if len(held_out) else None,
        quiet=quiet,
    )


def _book_phases(record: RunRecord, watch: Stopwatch, device: torch.device, peak: int | None) -> None:
    # The loop books its own phases, which "prune" spans.
    record.phases |= {f"{phase}_seconds": seconds for phase, seconds in watch.seconds.items() if phase != "prune"}
    record.phases |= peak_memory(device)
    if peak is not None:
        record.phases["peak_device_bytes"] = max(peak, record.phases["peak_device_bytes"] or 0)


def dtype_of(cfg: Mapping, device: torch.device) -> torch.dtype | str:
    """The dtype that a configuration asks for.

    auto is the checkpoint's own on a GPU; CPUs compute half precision slowly, so there it is float32.
    """
    if cfg["dtype"] != "auto":
        return DTYPES[cfg["dtype"]]
    return torch.float32 if device.type == "cpu" else "auto"


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
    lines += [f"  {line}" for line in protocol.describe(record.evaluations)]
    if record.saved:
        dense, packed = record.saved["dense_bytes"], record.saved["packed_bytes"]
        lines.append(f"  saved packed: {packed / 1e6:.4g} MB, {packed / dense:.1%} of {dense / 1e6:.4g} MB dense")
    seconds = {k.removesuffix("_seconds"): v for k, v in record.phases.items() if k.endswith("_seconds")}
    lines.append(f"  {sum(seconds.values()):.1f} s: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    lines.append(f"  {directory / FILE}")
    return "\n".join(lines)
