"""Names of runs: what makes two configurations the same, and the directory each writes to."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

# Where the run is logged, whether it is only planned or resumed, when a sweep leaves it out, and what is in memory or a
# cache when, change neither weights nor evaluations.
NOT_HASHED = ("hydra", "logger", "plan", "stream", "hidden_states", "resumable", "resume", "complete", "minutes")
NOT_HASHED += ("statistics_cache", "table")

# What an evaluation depends on where nothing is pruned, and what of it only a calibration reads.
_EVALUATED = ("model", "data", "method", "eval", "device", "dtype", "save")
_CALIBRATING = {"model": ("nsamples", "seqlen", "bos"), "data": ("sampling", "holdout", "disjoint_seeds")}


def config_hash(cfg: DictConfig) -> str:
    """sha256 (hex) of the resolved configuration, without Hydra's own part and the keys that change no result.

    For a method that prunes nothing, these are all keys but those that an evaluation depends on.
    """
    kept = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in NOT_HASHED])
    content = OmegaConf.to_container(kept, resolve=True, throw_on_missing=True)
    if not prunes(cfg):
        content = _evaluated(content)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prunes(cfg: DictConfig) -> bool:
    """Whether the configuration's method changes any weight."""
    from .registry import build

    return build(OmegaConf.to_container(cfg.method, resolve=True)).prunes


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
    from .overrides import pattern_of

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
