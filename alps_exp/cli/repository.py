"""Hydra's repository of configuration files, at a cost that a run of a second can bear."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

import yaml
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

# Pickles are read back ten times as fast as configurations are copied.
_read: dict[tuple, tuple[ConfigResult, bytes] | None] = {}  # by where a file lies and what it says
_merged: dict[tuple, tuple[bytes, list]] = {}  # by the files that were merged, with the nodes whose ids are in the key
_KEPT = 200  # of those, of 20 KB each


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
        key = source.says(config_path)
        if key not in _read:
            result = super().load_config(config_path)
            _read[key] = result and (result, pickle.dumps(result.config))
        if _read[key] is None:
            return None
        found, config = _read[key]
        # Hydra changes the configuration that it gets, and copies the defaults.
        return dataclasses.replace(found, config=pickle.loads(config), header=dict(found.header))

    def origin(self, config_path: str) -> tuple[tuple, Any] | None:
        """What tells a file from others, and what must not be freed as long as that holds; None for a user's file."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if isinstance(source, _Package):
            return source.says(config_path), None
        if source is None or source.scheme() != "structured":
            return None
        node = ConfigStore.instance()._load(f"{config_path}.yaml").node
        return (config_path, id(node)), node

    def __deepcopy__(self, memo: dict) -> Repository:
        return copy.copy(self)


class _Package(ImportlibResourcesConfigSource):
    def _read_config(self, res: Any) -> ConfigResult:
        if self.path != "alps_exp.conf" or _Loader is None:
            return super()._read_config(res)
        text = res.read_text(encoding="utf-8")
        config = OmegaConf.create(yaml.load(text, Loader=_Loader) or {})
        return ConfigResult(self.provider, f"pkg://{self.path}", config, self._get_header_dict(text))

    def says(self, config_path: str) -> tuple[str, ...]:
        file = resources.files(self.path).joinpath(self._normalize_file_name(config_path))
        return self.provider, self.path, config_path, file.read_text(encoding="utf-8")


@contextmanager
def lean() -> Iterator[None]:
    """Hydra without the map of all choices that it makes anew for each file it reads, a sixth of a composition, and
    without merging the same files again, most of one.

    Names in a list of defaults that refer to other choices need the map; where there are any, Hydra's own is made.
    """
    whole, merge = defaults_list._create_interpolation_map, ConfigLoaderImpl._compose_config_from_defaults_list

    def needed(overrides: Any, defaults: Sequence[InputDefault], self_added: bool) -> DictConfig:
        return whole(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else _NOTHING

    def merged(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: CachingConfigRepository) -> DictConfig:
        ours = isinstance(repo.delegate, Repository)
        origins = [repo.delegate.origin(default.config_path) if ours else None for default in defaults]
        # Hydra's own files and the root come first, are the most, and are the same whatever a run chooses.
        begun = 1 + next((number for number, default in enumerate(defaults) if default.primary), -1)
        cfg = OmegaConf.create()
        for first, last in ((0, begun), (begun, len(defaults))):
            key = tuple((d.package, d.primary, o and o[0]) for d, o in zip(defaults[:last], origins, strict=False))
            if key in _merged:
                cfg = pickle.loads(_merged[key][0])
                continue
            with _replaced(config_loader_impl, "OmegaConf", _From([cfg])):
                cfg = merge(self, defaults[first:last], repo)
            if None not in origins[:last]:
                _merged[key] = pickle.dumps(cfg), [origin and origin[1] for origin in origins[:last]]
                if len(_merged) > _KEPT:
                    del _merged[next(iter(_merged))]
        return cfg

    with (
        _replaced(defaults_list, "_create_interpolation_map", needed),
        _replaced(ConfigLoaderImpl, "_compose_config_from_defaults_list", merged),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    # What unittest.mock does, whose import takes longer than a composition.
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _loader() -> type | None:
    """OmegaConf's reader of yaml on the parser in C, which takes a tenth of the time; None where it was not built.

    It does not look for keys given twice, as a user's file may have them; a test does, in the project's own.
    """
    if not hasattr(yaml, "CSafeLoader"):
        return None
    return type("Loader", (yaml.CSafeLoader,), {"yaml_implicit_resolvers": get_yaml_loader().yaml_implicit_resolvers})


_Loader = _loader()


class _From:
    """OmegaConf, whose first new configuration is one that is there already."""

    def __init__(self, begun: list[DictConfig]) -> None:
        self._begun = begun

    def create(self, *given: Any, **more: Any) -> Any:
        return self._begun.pop() if self._begun else OmegaConf.create(*given, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(OmegaConf, name)


_NOTHING = OmegaConf.create()
