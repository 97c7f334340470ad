"""What a result depends on beside its configuration: versions, code, device, files; and what it took in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, baselines
from ..base.files import file_sha256, sha256
from ..model import loading
from .settings import Settings

_PACKAGE = Path(__file__).parents[1]
# Rooms and modules of the package that show, plan and arrange results without taking part in making them; and, of a
# wheel, the folders that a checkout has beside the package.
_ARRANGING = (
    "cli/",
    "report/",
    "tables/",
    "__main__.py",
    "demo.py",
    "base/gpus.py",
    "base/progress.py",
    "base/terminal.py",
)
_ARRANGING += ("runs/loggers.py", "baselines/", "conf/", "sweeps/")


def environment(device: torch.device) -> dict:
    """Versions, device and git commit that a result depends on."""
    names = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "lm-eval", "numpy")
    return {
        "alps_exp": __version__,
        "code": code_version(),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


@cache
def code_version() -> str:
    """Version and a digest (12 hex digits) of the sources that decide about weights and evaluations."""
    return f"{__version__} ({code_digest([_PACKAGE, *map(Path, baselines.__path__)])[:12]})"


def code_digest(folders: Iterable[Path]) -> str:
    """sha256 (hex) of the paths and contents of all Python files in the folders and below, but for those of the package
    that make no results."""
    digest = hashlib.sha256()
    for folder in folders:
        names = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
        for name, file in sorted(names.items()):
            if not name.startswith(_ARRANGING):
                digest.update(f"{name}\n{file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def identity(
    settings: Settings, device: torch.device, dtype: torch.dtype, tokens: Tensor, fresh: Tensor | None = None
) -> dict[str, str]:
    """All that decides a run's weights, by name.

    Args:
        settings: the run's.
        device: where it runs.
        dtype: of the model.
        tokens: (windows, seqlen) calibration windows.
        fresh: (windows, seqlen) text that a distillation reads beside them.
    """
    return {
        "configuration": settings.configuration.digest[:16],
        **_software(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "calibration": sha256(tokens.numpy().tobytes())[:16],
        **{f"checkpoint {name}": value for name, value in loading.identity(settings.model.source).items()},
        **settings.solver.digests(),
        **settings.allocation.digests(),
        **({"fresh text": sha256(fresh.numpy().tobytes())[:16]} if fresh is not None else {}),
    }


def _software() -> dict[str, str]:
    return {
        "code": code_version(),
        **{name: str(_version(name)) for name in ("torch", "transformers")},
    }


@cache
def _version(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def inputs_of(settings: Settings) -> dict[str, str]:
    """Digests of the checkpoint, of local texts, and of the descriptions of the data sets evaluated on, by name."""
    source, data = settings.model.source, settings.calibration.data
    found = dict(_checkpoint(source, loading.changed(source))) | settings.solver.digests()
    found |= settings.allocation.digests()
    paths = {"path": data.path, "eval_path": data.eval_path}
    if settings.fresh is not None:
        paths["finish"] = settings.fresh.data.path
    for text in settings.evaluation.texts:
        name = text.data.name
        if name != data.name:
            described = json.dumps(dataclasses.asdict(text.data))
            found[f"data {name}"] = sha256(described)[:16]
        paths[name] = text.path
    for key, path in paths.items():
        if path is not None:
            file = Path(str(path)).expanduser()
            stat = file.stat()
            found[f"text {key}"] = _text(file, stat.st_size, stat.st_mtime_ns)
    return found


@cache
def _checkpoint(source: loading.ModelSource, changed: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"checkpoint {name}", value) for name, value in loading.identity(source).items())


@cache
def _text(file: Path, size: int, modified: int) -> str:
    return file_sha256(file)[:16]


@cache  # as the digest of the code: what is loaded stays, whatever becomes of the checkout
def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with "-dirty" when it has uncommitted changes."""
    root = _PACKAGE.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory(device: torch.device) -> dict:
    """Peak bytes allocated on the device since the last reset, and of the process in host memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
