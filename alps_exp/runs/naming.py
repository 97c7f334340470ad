"""Names of runs: what makes two configurations the same, and the directory each writes to."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..base.files import sha256
from ..checkpoints.location import local_model

# Where the run is logged, whether it is only planned or resumed, when a sweep leaves it out, and what is in memory or a
# cache when, change neither weights nor evaluations.
NOT_HASHED = ("hydra", "logger", "plan", "stream", "hidden_states", "resumable", "resume", "complete", "minutes")
NOT_HASHED += ("statistics_cache", "table")

# What an evaluation depends on where nothing is pruned, and what of it only a calibration reads.
_EVALUATED = ("model", "data", "method", "eval", "device", "dtype", "save")
_CALIBRATING = {"model": ("nsamples", "seqlen", "bos"), "data": ("sampling", "holdout", "disjoint_seeds")}


def config_hash(cfg: Mapping) -> str:
    """sha256 (hex) of the `canonical` configuration, without Hydra's own part and the keys that change no result.

    For a method that prunes nothing, these are all keys but those that an evaluation depends on.
    """
    kept = _that_decides({key: value for key, value in canonical(cfg).items() if key not in NOT_HASHED})
    content = kept if prunes(cfg) else _evaluated(kept)
    return sha256(json.dumps(content, sort_keys=True))


def canonical(cfg: Mapping) -> dict:
    """The configuration as plain values, without Hydra's part, what can be written in several ways written in one.

    Local paths are absolute; whole numbers are floats where a method's field is one; save=dense is true;
    globs are sorted where their order says nothing.
    """
    if isinstance(cfg, DictConfig):
        kept = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        cfg = OmegaConf.to_container(kept, resolve=True, throw_on_missing=True)
    content = {key: dict(value) if isinstance(value, Mapping) else value for key, value in cfg.items()}
    if local_model(content["model"]):
        content["model"]["path"] = _absolute(content["model"]["path"])
    for key in ("path", "eval_path"):
        content["data"][key] = _absolute(content["data"].get(key))
    path = content["eval"]["path"]
    content["eval"]["path"] = (
        {k: _absolute(v) for k, v in path.items()} if isinstance(path, Mapping) else _absolute(path)
    )
    if (source := content["eval"]["task_source"]) not in ("hub", "package"):
        content["eval"]["task_source"] = _absolute(source)
    floats = _float_fields(content["method"])
    content["method"] |= {k: float(v) for k, v in content["method"].items() if k in floats and type(v) is int}
    if content["save"] == "dense":
        content["save"] = True
    layers = content["layers"]
    for key in ("include", "exclude"):
        if isinstance(layers[key], list):
            layers[key] = sorted(set(map(str, layers[key])))
    if isinstance(layers["sparsity"], Mapping):
        layers["sparsity"] = {name: _level(value) for name, value in layers["sparsity"].items()}
    return content


def _absolute(path) -> str | None:
    if path is None:
        return None
    found = Path(str(path)).expanduser()
    # The last part stays though it may be a link: those of a hub's cache lead to names without a suffix.
    return str(found.resolve() if found.name in ("", "..") else found.parent.resolve() / found.name)


def _float_fields(node: Mapping) -> set[str]:
    from ..layer.registry import build

    return {field.name for field in dataclasses.fields(build(node)) if "float" in str(field.type)}


def _level(value):
    """A layer's own sparsity: a number, or N:M."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _that_decides(content: dict) -> dict:
    """Without the keys that begin with an underscore: the path of a class, and how tables show a method. A method that
    moves to another module stays the same method."""
    return {
        key: _that_decides(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if not str(key).startswith("_")
    }


def prunes(cfg: Mapping) -> bool:
    """Whether the configuration's method changes any weight."""
    from ..layer.registry import build

    node = cfg["method"]
    return build(OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node).prunes


def _evaluated(content: dict) -> dict:
    """The part of a configuration on which the evaluations of an unpruned model depend."""
    content = {key: content[key] for key in _EVALUATED}
    for node, keys in _CALIBRATING.items():
        content[node] = {key: value for key, value in content[node].items() if key not in keys}
    names = content["eval"]["datasets"]
    if not names:  # tasks have no windows
        del content["eval"]["seqlen"]
    if content["data"]["name"] not in names:
        del content["data"]
    return content


def model_name(cfg: DictConfig) -> str:
    """The model's name; for a local folder that folder's name, or that of the run that saved it as RUN/model."""
    if cfg.model.name == "local" and cfg.model.get("path"):
        path = Path(str(cfg.model.path)).expanduser().resolve()
        return path.parent.name if path.name == "model" else path.name
    return str(cfg.model.name)


def run_name(cfg: DictConfig) -> str:
    """<model>-<method>-<sparsity>-s<seed>-<hash>: safe as a file name, unique to the configuration.

    <model>-<method>-<hash> where the method prunes nothing.
    """
    from ..patterns.written import pattern_of

    words = f"{model_name(cfg)}-{cfg.method.name}"
    if prunes(cfg):
        words += f"-{pattern_of(cfg.sparsity).slug}-s{cfg.seed}"
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", words).lstrip(".-")[:120]
    return f"{safe}-{config_hash(cfg)[:8]}"


def register() -> None:
    """Make `${run_name:}` and `${run_dir:}` known to OmegaConf; conf/config.yaml names the run's directory by them."""
    OmegaConf.register_new_resolver("run_name", _resolve_run_name, replace=True)
    OmegaConf.register_new_resolver("run_dir", _resolve_run_dir, replace=True)


def _resolve_run_name(*, _root_: DictConfig) -> str:
    return run_name(_root_)


def _resolve_run_dir(*, _root_: DictConfig) -> str:
    resume = _root_.get("resume", "auto")
    return str(Path(str(resume)).expanduser()) if resume not in ("auto", False) else f"results/runs/{run_name(_root_)}"
