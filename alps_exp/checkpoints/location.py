"""Where a model node points: to this machine or to the hub. Needs no library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def local_model(node: Mapping) -> bool:
    """Whether a model node's path names something on this machine, rather than on the hub: "name" or "owner/name"."""
    path = str(node.get("path") or "")
    meant = path.startswith((".", "~", "/")) or "\\" in path or path.count("/") > 1
    return bool(path) and (node.get("name") == "local" or meant or Path(path).expanduser().exists())
