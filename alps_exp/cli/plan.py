"""plan=true: what a run would do and need, or the runs of a sweep, without running them."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ..allocation.prunable import linear_shapes
from ..base.clock import duration
from ..base.errors import UserError
from ..checkpoints import upload
from ..checkpoints.packed import packed_size
from ..data.settings import GeneratedSettings
from ..layer.inputs import Statistics
from ..model.experts import Experts
from ..model.hidden import choose_place
from ..model.layers import ExpertLayer, find_layer
from ..model.structure import blocks_of, count, find_blocks
from ..procedure.distil import device_bytes
from ..runs.fresh import refuse_too_little
from ..runs.settings import Settings
from ..runs.workspace import Workspace, streams

# What a solve takes beside its inputs, in float32 copies of the weight (out × in) and of the Gram matrix (in × in).
_WORKSPACE = {Statistics.NONE: (3, 0), Statistics.DIAGONAL: (3, 0), Statistics.MOMENTS: (6, 0), Statistics.GRAM: (8, 8)}

_SAVED = "the saved model"
_FINISHING, _DISTILLING = "finishing blocks", "distilling"


def plan(settings: Settings) -> str:
    """A text: layers with their patterns, estimated time, device, host and disk memory.

    Everything is derived from the model's configuration; the time is the work in floating-point operations over the
    rate of a matrix product measured on the device just now, and good to a factor of about two. Text is read only
    where a training asks for more than the calibration's, to see that there is so much.

    Raises:
        UserError: there is too little of it.
    """
    patterns, skeleton = settings.patterns, settings.model.skeleton
    shapes = settings.shapes or linear_shapes(skeleton, settings.selection)

    node = settings.configuration.content["model"]
    lines = [
        f"run        {settings.configuration.name}",
        f"model      {node['name']} ({node.get('path') or node.get('package')})",
    ]
    kinds = Counter(
        (name.rsplit(".", 1)[-1], shapes[name], str(patterns[name]) if name in patterns else "dense") for name in shapes
    )
    share = sum(math.prod(shapes[name]) for name in patterns) / count(find_blocks(skeleton)[1].parameters())
    lines.append(
        f"layers     {len(patterns)} of {len(shapes)} linear layers in the decoder blocks are pruned, "
        f"{share:.1%} of the blocks' weights"
    )
    lines += [
        f"           {count:4d} × {suffix:<12} {shape[0]} × {shape[1]:<6} {pattern}"
        for (suffix, shape, pattern), count in kinds.items()
    ]
    lines += _time_lines(settings, Workspace())
    lines += _memory_lines(settings)
    if settings.push is not None:
        size = sum(part.size for part in _disk(settings) if part.what == _SAVED)
        lines.append(
            f"push       {_bytes(size)} of the saved model, its card and record to {upload.address(settings.push)}, "
            "private if it is new; a token is there"
        )
        lines.append(
            "           (whether it may write there, and whether that holds something else, the run asks first)"
        )
    return "\n".join(lines)


def plan_of_all(names: Sequence[str], runs: Sequence[Settings], complete: Sequence[bool], place: Path) -> str:
    """A table of the runs of a sweep with the time and the disk that each takes, their sums, and whether they fit.

    Args:
        names: of the runs.
        runs: what they are asked to do.
        complete: which of them have a complete record and would not be run.
        place: the folder that they write to, which need not exist.
    """
    rows, seconds, kept, passing, unknown = [["run", "state", "time", "disk"]], 0.0, 0, 0, set()
    workspace = Workspace()
    for name, settings, done in zip(names, runs, complete, strict=True):
        if done:
            rows.append([name, "complete", "", ""])
            continue
        if _more_text(settings):
            try:
                refuse_too_little(settings, workspace)
            except UserError as error:
                raise UserError(f"{error} (run {name})") from error
        own, disk = sum(_seconds(settings).values()), _disk(settings)
        keeps = sum(part.size for part in disk if part.stays)
        seconds, kept = seconds + own, kept + keeps
        passing = max(passing, sum(part.size for part in disk if not part.stays))
        unknown.update(_not_estimated(settings))
        rows.append([name, "to run", duration(own), _bytes(keeps) if keeps else "record only"])
    pending = len(runs) - sum(complete)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    lines.append(f"{len(runs)} runs: {sum(complete)} complete, {pending} to run")
    if pending:
        missing = f"; {' and '.join(sorted(unknown))} not in it" if unknown else ""
        lines.append(f"time: about {duration(seconds)}, one after the other, without loading{missing}")
        free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free
        lines.append(
            f"disk: {_bytes(kept) if kept else 'records only'} in the end, {_bytes(kept + passing)} at most, "
            f"{_bytes(free)} free in {place}"
        )
        if kept + passing > free:
            lines.append(
                f"warning: the disk will not hold it: make {_bytes(kept + passing - free)} of space, or give "
                "hydra.sweep.dir=DIR on another disk, save=packed, or resumable=false"
            )
    return "\n".join(lines)


def estimated_work(settings: Settings) -> float:
    """Floating-point operations of a run, as far as its configuration tells: good to a factor of about two."""
    return sum(_work(settings).values())


def _needed(settings: Settings) -> Statistics:
    return settings.solver.statistics | (Statistics.GRAM if settings.losses and settings.prunes else Statistics.NONE)


def _work(settings: Settings) -> dict[str, float]:
    """Floating-point operations of a run, by what they are for."""
    skeleton, patterns = settings.model.skeleton, settings.patterns
    shapes, needed = settings.shapes, _needed(settings)
    windows, asked = settings.calibration, settings.evaluation
    prefix, blocks = find_blocks(skeleton)
    end = max(blocks_of(patterns, prefix), default=-1) + 1
    handed = _handed_on(settings)
    block_weights = sum(_running(block, handed) for block in blocks[:end])
    tokens = windows.nsamples * windows.seqlen
    forward = 2 * block_weights * tokens * _passes(settings, needed)
    if settings.sensitivity.used:  # forwards, forwards again, and backwards
        forward += 3 * 2 * block_weights * settings.sensitivity.windows * windows.seqlen
    inputs, experts = _distinct_inputs(patterns, shapes), _distinct_inputs(_of_experts(settings), shapes)
    training = _training_flops(settings, block_weights, sum(p.numel() for p in skeleton.parameters()))
    squares = sum(width**2 for width in inputs) - (1 - handed) * sum(width**2 for width in experts)
    gram = 2 * tokens * squares if Statistics.GRAM in needed else 0
    solving = sum(settings.solver.flops(*shapes[name]) for name in patterns)
    solving += sum(settings.solver.block_work(own, tokens)[0] for own in _by_block(patterns, shapes))
    everything = sum(p.numel() for p in skeleton.parameters())
    texts = len(asked.texts)
    evaluation = 2 * everything * (asked.windows or 0) * texts * (asked.seqlen if texts else 0)
    parts = {"forward passes": forward, "Gram matrices": gram, "solving": solving}
    parts |= {"evaluation": evaluation} if asked.windows else {}  # of whole texts, whose length is not known yet
    parts |= training
    if seen := settings.solver.trained_windows():
        parts["training"] = 6 * everything * seen * windows.seqlen
    return parts


def _seconds(settings: Settings) -> dict[str, float]:
    """Those of `_work`'s parts at the rate measured now; a stage of finishing ends when its minutes are over."""
    rate, finish = _measured_rate(settings.device), settings.finish
    found = {part: flops / rate for part, flops in _work(settings).items()}
    if finish.block is not None and (minutes := finish.block_minutes) is not None:
        found[_FINISHING] = min(found[_FINISHING], 60 * minutes)
    if finish.distil is not None and (minutes := finish.distil_minutes(found.get(_FINISHING, 0))) is not None:
        found[_DISTILLING] = min(found[_DISTILLING], 60 * minutes)
    return found


def _not_estimated(settings: Settings) -> list[str]:
    """What takes time that `_work` does not know."""
    asked = settings.evaluation
    missing = ["evaluation on whole texts (eval.windows)"] if asked.texts and not asked.windows else []
    missing += ["tasks"] if asked.tasks.names else []
    missing += ["writing the calibration text"] if isinstance(settings.calibration.data, GeneratedSettings) else []
    missing += [settings.solver.unplanned] if settings.solver.unplanned else []
    missing += ["choosing target.strength"] if getattr(settings.target, "strength", 0) == "auto" else []
    return missing + ([f"eval={asked.protocol}"] if asked.own is not None else [])


def _time_lines(settings: Settings, workspace: Workspace) -> list[str]:
    windows, device, parts = settings.calibration, settings.device, _seconds(settings)
    rate = _measured_rate(device)
    text = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    missing = _not_estimated(settings)
    written = isinstance(windows.data, GeneratedSettings)
    unknown = f"; {' and '.join(missing)} not in it" if missing else ""
    lines = []
    if more := _fresh(settings):
        whose, count = (settings.fresh or windows).data.name, more * windows.seqlen
        lines = [f"           {more} windows of fresh text to train on (data={whose}), {count:,} tokens"]
    if seen := settings.solver.trained_windows():
        distinct = settings.solver.training_windows(windows.seqlen) * windows.seqlen
        lines = [f"           training on {seen * windows.seqlen:,} tokens ({distinct:,} of them distinct)"]
    if _more_text(settings) and (unseen := refuse_too_little(settings, workspace)):
        lines.append(f"           ({unseen})")
    return [
        f"tokens     {windows.nsamples} windows of {windows.seqlen}{', written by the model' if written else ''}",
        *lines,
        f"time       about {duration(sum(parts.values()))} on {device}: {text}{unknown}",
        f"           (from {rate / 1e12:.2g} TFLOP/s measured now in float32; loading is not in it)",
    ]


def _handed_on(settings: Settings) -> float:
    """The share of the tokens that an expert is handed on average; 1 where config.json does not tell."""
    config = settings.model.config.get_text_config(decoder=True)
    counts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    several = next((count for count in counts if isinstance(count, int) and count > 1), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / several) if several and isinstance(chosen, int) else 1.0


def _running(block: nn.Module, handed: float) -> float:
    """Weights of a block that a token is multiplied by."""
    experts = [module for module in block.modules() if Experts.of(module) is not None]
    held = sum(p.numel() for module in experts for p in module.parameters())
    return sum(p.numel() for p in block.parameters()) - (1 - handed) * held


def _of_experts(settings: Settings) -> list[str]:
    """The layers to prune that are experts'."""
    return [name for name in settings.patterns if isinstance(find_layer(settings.model.skeleton, name), ExpertLayer)]


def _training_flops(settings: Settings, block_weights: int, weights: int) -> dict[str, float]:
    """Of finishing, by stage: a forward and a backward of twice that per window and epoch, and the looks at held-out
    windows."""
    windows, finish = settings.calibration, settings.finish
    held_out, more, beside = windows.data.holdout, _fresh(settings), _fresh_blocks(settings)
    found = {}
    for part, choice, size, trained in (
        (_FINISHING, finish.block, block_weights, windows.nsamples + beside),
        (_DISTILLING, finish.distil, weights, windows.nsamples + more),
    ):
        if choice is not None:
            looks = 1 + max(4, choice.epochs)
            found[part] = 2 * size * windows.seqlen * (3 * choice.epochs * trained + looks * held_out)
    if beside:  # through the dense blocks and the pruned
        found["fresh text through the blocks"] = 2 * 2 * block_weights * windows.seqlen * beside
    if finish.distil is not None:  # what the dense model makes of the windows
        found["teaching"] = 2 * block_weights * windows.seqlen * (windows.nsamples + more + held_out)
    return found


def _fresh(settings: Settings) -> int:
    """Windows of fresh text to train on."""
    return settings.finish.fresh(settings.calibration.nsamples, settings.calibration.seqlen)


def _fresh_blocks(settings: Settings) -> int:
    """Those that blocks are finished on, too."""
    block = settings.finish.block
    return _fresh(settings) if block is not None and block.fresh else 0


def _more_text(settings: Settings) -> bool:
    """Whether a training asks for more text than the calibration's."""
    return bool(_fresh(settings) or settings.calibration.training)


def _passes(settings: Settings, needed: Statistics) -> float:
    """How often the calibration windows go through a block; those that are cut short count in part."""
    if not needed:
        return 0
    if settings.target.beside:
        return 5.5
    if settings.finish.block is not None:
        return 3
    if settings.capture == "groups":
        return 3
    return 1 if settings.propagate == "dense" else 2


def _hidden(settings: Settings) -> tuple[int, str | None]:
    """Bytes of the hidden states of all windows trained on, and where they lie; None where there are none."""
    windows, beside = settings.calibration, settings.target.beside or settings.finish.block is not None
    width = getattr(settings.model.config, "hidden_size", 0)
    read = windows.nsamples + _fresh_blocks(settings)
    size = read * windows.seqlen * width * settings.itemsize * (1 + beside)
    if not _needed(settings):
        return size, None
    return size, choose_place(settings.device, size) if settings.hidden_states == "auto" else settings.hidden_states


def _sizes(settings: Settings) -> tuple[int, int, int]:
    """Bytes of the model, of its largest block, and of what lies outside the blocks."""
    skeleton, size = settings.model.skeleton, settings.itemsize
    _, blocks = find_blocks(skeleton)
    weights = sum(p.numel() for p in skeleton.parameters())
    block = max(sum(p.numel() for p in module.parameters()) for module in blocks)
    return weights * size, block * size, (weights - sum(p.numel() for p in blocks.parameters())) * size


def _memory_lines(settings: Settings) -> list[str]:
    skeleton, patterns, device = settings.model.skeleton, settings.patterns, settings.device
    shapes, needed, windows = settings.shapes, _needed(settings), settings.calibration
    model_bytes, block_bytes, outside_bytes = _sizes(settings)
    block, (hidden, place), streamed = block_bytes // settings.itemsize, _hidden(settings), streams(settings)
    statistics = workspace = 0
    if patterns:
        first = [name for name in patterns if _block_of(name) == _block_of(next(iter(patterns)))]
        if Statistics.GRAM in needed:
            statistics = 4 * sum(width**2 for width in _distinct_inputs(first, shapes))
        copies = _WORKSPACE[Statistics.GRAM if Statistics.GRAM in needed else needed]
        workspace = max(4 * (copies[0] * math.prod(shapes[n]) + copies[1] * shapes[n][1] ** 2) for n in first)
        tokens = windows.nsamples * windows.seqlen
        workspace += max(settings.solver.block_work(own, tokens)[1] for own in _by_block(patterns, shapes))
    step = statistics + workspace
    if settings.finish.block is not None:  # the block, its kept weights' state, and gradients of the widest layer
        state = 20 if settings.finish.block.state == "float32" else 14
        kept = sum((1 - patterns[name].sparsity) * math.prod(shapes[name]) for name in first)
        step += int(4 * block + state * kept + 4 * max(math.prod(shapes[name]) for name in first))
    # Streamed, one block is in use, one on its way in, and one on its way out.
    held = outside_bytes + 3 * block_bytes if streamed else model_bytes
    lines = []
    if device.type == "cuda":
        there = block_bytes + outside_bytes + step + (hidden if place == "device" else 0)
        free = torch.cuda.mem_get_info(device)[0]
        lines.append(f"device     about {_bytes(there)} with one block at a time, {_bytes(free)} free")
        rest = hidden if place == "host" else 0
    else:
        lines.append("device     none beside the CPU")
        rest = step + (hidden if place in ("host", "device") else 0)
    devices, what = settings.devices, "of the whole model"
    what += f" (on each of {devices})" if devices > 1 else ""
    if settings.solver.trains:
        training = settings.solver.memory(skeleton, patterns, _computing_bytes(settings), windows.seqlen, devices)
        place_of = "device" if device.type == "cuda" else "host"
        lines.append(f"           at least {_bytes(training)} on the {place_of} for the training {what}")
        rest = max(rest, training - held) if place_of == "host" else rest
    if settings.finish.distil is not None:
        distilling = _distilling_bytes(settings, shapes)
        place_of = "device" if device.type == "cuda" else "host"
        lines.append(f"           at least {_bytes(distilling)} on the {place_of} for the distillation {what}")
        read = windows.nsamples + _fresh(settings) + windows.data.holdout
        width = getattr(settings.model.config, "hidden_size", 0)
        states = read * windows.seqlen * width * settings.itemsize
        there = states if settings.hidden_states != "disk" else 0
        rest = max(rest, distilling + there - held) if place_of == "host" else rest
        lines.append(f"           {_bytes(states)} for the dense model's hidden states (hidden_states says where)")
    what = "three blocks and what lies outside them" if streamed else "the model"
    lines.append(f"host       about {_bytes(held + rest)}: {_bytes(held)} for {what}, {_bytes(rest)} for the rest")
    parts = ", ".join(f"{_bytes(part.size)} for {part.what}" for part in _disk(settings))
    lines.append(f"disk       {parts or 'less than 1 MB for the record'}")
    return lines


@dataclass(frozen=True)
class _Part:
    """Bytes that a run takes on disk, for what, and whether they stay when it is complete."""

    what: str
    size: int
    stays: bool = False


def _disk(settings: Settings) -> list[_Part]:
    skeleton, patterns, shapes, size = settings.model.skeleton, settings.patterns, settings.shapes, settings.itemsize
    (model_bytes, _, outside_bytes), streamed = _sizes(settings), streams(settings)
    hidden, place = _hidden(settings)
    dense, disk = outside_bytes if streamed and patterns else model_bytes, []
    if settings.save == "packed":
        less = sum(
            math.prod(shapes[name]) * size - packed_size(shapes[name], pattern.sparsity, size)
            for name, pattern in patterns.items()
        )
        disk = [_Part(_SAVED, model_bytes - less, True), _Part("its dense form while it is packed", dense)]
    elif settings.save == "shrunk":
        removed = sum(math.prod(shapes[name]) * pattern.sparsity for name, pattern in patterns.items())
        disk = [_Part(_SAVED, int(model_bytes - removed * size), True)]
    elif settings.save:
        disk = [_Part(_SAVED, dense, True)]
    disk += [] if Path(settings.model.source.path).exists() else [_Part("the download", model_bytes)]
    if settings.solver.trains and settings.resumable:
        state = settings.solver.state_bytes(skeleton, patterns, _computing_bytes(settings))
        disk.append(_Part("the training's checkpoint while it runs, at most", state))
    elif patterns and settings.resumable:
        stay = settings.save is True and streamed
        what = f"finished blocks{' (they become the saved model)' if stay else ' while it runs'}"
        disk.append(_Part(what, model_bytes - outside_bytes, stay))
    disk += [_Part("hidden states while it runs", hidden)] if place == "disk" else []
    if settings.finish.distil is not None and settings.resumable:
        kept = sum((1 - pattern.sparsity) * math.prod(shapes[name]) for name, pattern in patterns.items())
        disk.append(_Part("the distillation's checkpoint while it runs", int(16 * kept)))
    return disk


def _distilling_bytes(settings: Settings, shapes: Mapping) -> int:
    skeleton, config = settings.model.skeleton, settings.model.config
    layers = {name: (shapes[name], pattern.sparsity) for name, pattern in settings.patterns.items()}
    return device_bytes(
        settings.finish.distil,
        layers,
        sum(parameter.numel() for parameter in skeleton.parameters()),
        _computing_bytes(settings),
        len(find_blocks(skeleton)[1]),
        settings.calibration.seqlen,
        config.get_text_config(decoder=True).vocab_size,
        settings.devices,
    )


def _computing_bytes(settings: Settings) -> int:
    """Of a weight while the model as a whole is trained."""
    asked = settings.solver.precision if settings.solver.trains else settings.finish.distil.precision
    return 4 if asked == "float32" or settings.device.type == "cpu" else settings.itemsize


def _distinct_inputs(names, shapes) -> list[int]:
    """Widths of the distinct inputs: q/k/v, and gate/up, are fed by the same tensor."""
    groups = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        role = "in" if leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") else leaf
        groups[(parent, role)] = shapes[name][1]
    return list(groups.values())


def _by_block(patterns: Mapping, shapes: Mapping) -> list[dict[str, tuple[int, int]]]:
    """Shapes of the pruned layers, block by block."""
    found: dict[str, dict] = {}
    for name in patterns:
        found.setdefault(_block_of(name), {})[name] = shapes[name]
    return list(found.values())


def _block_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])


@cache
def _measured_rate(device: torch.device) -> float:
    """Floating-point operations per second of a float32 matrix product, measured once."""
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=device)
    matrix @ matrix
    repeats, start = 5, time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    float(product[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
