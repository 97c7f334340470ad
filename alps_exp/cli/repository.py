"""Hydra's repository of configuration files, at a cost that a run of a second can bear."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any
from unittest import mock

from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import InputDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

_read: dict[tuple[str, ...], ConfigResult | None] = {}  # by where a file lies and what it says


class Repository(ConfigRepository):
    """The repository that parses a package's file once as long as it says the same.

    Hydra copies it for every composition and every question about a group, with the whole ConfigStore, so as not to
    change the original. What it then changes is the list of sources alone: a copy shares all else.
    """

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.sources = [_Package(s.provider, f"pkg://{s.path}") if s.scheme() == "pkg" else s for s in self.sources]

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if not isinstance(source, _Package):
            return super().load_config(config_path)
        key = source.provider, source.path, config_path, source.text(config_path)
        if key not in _read:
            _read[key] = super().load_config(config_path)
        found = _read[key]
        # Hydra changes the configuration that it gets, and copies the defaults.
        return found and dataclasses.replace(found, config=copy.deepcopy(found.config), header=dict(found.header))

    def __deepcopy__(self, memo: dict) -> Repository:
        return copy.copy(self)


class _Package(ImportlibResourcesConfigSource):
    def text(self, config_path: str) -> str:
        file = resources.files(self.path).joinpath(self._normalize_file_name(config_path))
        return file.read_text(encoding="utf-8")


@contextmanager
def lean() -> Iterator[None]:
    """Hydra without the map of all choices that it makes anew for each file it reads, a sixth of a composition.

    Names in a list of defaults that refer to other choices need it; where there are any, Hydra's own is made.
    """
    whole = defaults_list._create_interpolation_map

    def needed(overrides: Any, defaults: Sequence[InputDefault], self_added: bool) -> DictConfig:
        return whole(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else _NOTHING

    with mock.patch.object(defaults_list, "_create_interpolation_map", needed):
        yield


_NOTHING = OmegaConf.create()
