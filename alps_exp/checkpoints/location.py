"""Where a model node points: to this machine or to the hub. Needs no library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..base.errors import UserError

ADAPTER = "adapter_config.json"
_OWNED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME
NO_CONFIG = "has no config.json; give a folder that `save_pretrained` wrote or a hub download"


def local_model(node: Mapping) -> bool:
    """Whether a model node's path names something on this machine, rather than on the hub: "name" or "owner/name"."""
    path = str(node.get("path") or "")
    meant = path.startswith((".", "~", "/")) or "\\" in path or path.count("/") > 1
    return bool(path) and (node.get("name") == "local" or meant or Path(path).expanduser().exists())


def of_hub(path: str) -> str:
    """The words for a model of the hub that no file of conf/model names."""
    return f"model=llama-7b model.path={path} model.name={path.rpartition('/')[2]}"


def check_there(node: Mapping) -> None:
    """Refuse a model node that names no model, or a path of this machine where nothing or no model lies.

    Raises:
        UserError: one of these.
    """
    name, path = node.get("name"), node.get("path")
    if node.get("package"):
        return
    if not path:
        raise UserError(f"model={name} needs model.path=DIR, a folder with config.json and the weights")
    if local_model(node):
        try:
            place = Path(str(path)).expanduser()
            place.lstat()
            lacking = place.is_dir() and not node.get("gguf_file") and not any(map(_describes, place.iterdir()))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"model.path={path} does not exist; give a folder with config.json and the weights, or a .gguf file"
                + (f", or, from the hub, {of_hub(str(path))}" if _OWNED.fullmatch(str(path)) else "")
            ) from None
        except (OSError, RuntimeError, ValueError):
            return  # told with its reason by whoever reads it
        if lacking:
            raise UserError(f"model.path={path} {NO_CONFIG}")


def _describes(file: Path) -> bool:
    """Whether a file of a folder says what model lies there, or why none can be read."""
    return file.name in ("config.json", ADAPTER) or file.suffix == ".gguf"
