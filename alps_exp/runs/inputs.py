"""What a run reads beside its configuration: whether that has changed since a record was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ..base.files import file_sha256, sha256
from ..data import windows
from ..evaluation import protocol
from ..model import loading


def inputs_of(cfg: Mapping) -> dict[str, str]:
    """Digests of the checkpoint, of local texts, and of the descriptions of the data sets evaluated on, by name.

    Args:
        cfg: the configuration, plain values.
    """
    found = dict(_checkpoint(json.dumps(cfg["model"], sort_keys=True, default=str), loading.changed(cfg["model"])))
    paths = {key: cfg["data"].get(key) for key in ("path", "eval_path")}
    for name in cfg["eval"]["datasets"]:
        if name != cfg["data"]["name"]:
            found[f"data {name}"] = sha256(json.dumps(windows.data_node(name)))[:16]
        paths[name] = protocol.local_path(cfg["eval"], name)
    for key, path in paths.items():
        if path is not None:
            file = Path(str(path)).expanduser()
            stat = file.stat()
            found[f"text {key}"] = _text(file, stat.st_size, stat.st_mtime_ns)
    return found


@cache
def _checkpoint(model: str, changed: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"checkpoint {name}", value) for name, value in loading.identity(json.loads(model)).items())


@cache
def _text(file: Path, size: int, modified: int) -> str:
    return file_sha256(file)[:16]
