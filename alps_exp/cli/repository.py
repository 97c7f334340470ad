"""Hydra's repository of configuration files, at a cost that a run of a second can bear."""

from __future__ import annotations

import copy
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult

_read: dict[tuple[str, str, str], ConfigResult] = {}  # by where a file lies and what it says


class Repository(ConfigRepository):
    """The repository that parses a package's file once as long as it says the same.

    Hydra copies it for every composition and every question about a group, with the whole ConfigStore, so as not to
    change the original. What it then changes is the list of sources alone: a copy shares all else.
    """

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.sources = [_Package(s.provider, f"pkg://{s.path}") if s.scheme() == "pkg" else s for s in self.sources]

    def __deepcopy__(self, memo: dict) -> Repository:
        return copy.copy(self)


class _Package(ImportlibResourcesConfigSource):
    def _read_config(self, res: Any) -> ConfigResult:
        key = self.provider, self.path, res.read_text(encoding="utf-8")
        if key not in _read:
            _read[key] = super()._read_config(res)
        return copy.deepcopy(_read[key])  # Hydra changes what it gets
