"""Names of runs: what makes two configurations the same, and the directory each writes to."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import Container, DictConfig, OmegaConf

from ..base.errors import UserError
from ..base.files import sha256
from ..checkpoints.location import local_model
from ..patterns import parse_sparsity

if TYPE_CHECKING:
    from ..layer.method import Method
    from ..patterns import Pattern

# Where the run is logged, whether it is only planned or resumed, when a sweep leaves it out, what is in memory or a
# cache when, and the number of threads, but for last digits, change neither weights nor evaluations.
NOT_HASHED = ("hydra", "logger", "plan", "stream", "hidden_states", "resumable", "resume", "complete", "minutes")
NOT_HASHED += ("statistics_cache", "threads", "table", "push")

# Choices that say "nothing": with them a configuration is the same as without their keys.
NEUTRAL = {
    "target": {"name": "layer"},
    "sensitivity": {"name": "none"},
    "allocation": {"name": "uniform"},
    "finish": {"name": "none"},
    "capture": "auto",
    "expert_shrinkage": 0.03,
    "expert_weighting": "none",
}

# The same of keys of a method.
_NEUTRAL_OF_METHODS = {"trace": False}

# What an evaluation depends on where nothing is pruned, and what of it only a calibration reads.
_EVALUATED = ("model", "data", "method", "eval", "device", "dtype", "save")
_CALIBRATING = {"model": ("nsamples", "seqlen", "bos"), "data": ("sampling", "holdout", "disjoint_seeds")}


@dataclass(frozen=True)
class Configuration:
    """A configuration in the one form that the record, the hash and the names are made from.

    Attributes:
        content: what `canonical` gives, without what a sweep's file says about tables.
        digest: see `config_hash`.
        model: the model's name.
        solver: the method.
        pattern: the sparsity.
        name: of the run, see `run_name`.
    """

    content: Mapping
    digest: str
    model: str
    solver: Method
    pattern: Pattern
    name: str

    @classmethod
    def of(cls, cfg: Mapping) -> Configuration:
        """That of a composed configuration.

        Raises:
            UserError: a method or a sparsity that is not allowed.
        """
        from ..layer.registry import build
        from ..patterns.written import pattern_of

        content = canonical(cfg)
        content.pop("table", None)
        content["eval"] = {key: value for key, value in content["eval"].items() if key != "run_code"}  # a permission
        solver, pattern = build(content["method"]), pattern_of(content["sparsity"])
        kept = _that_decides({key: value for key, value in content.items() if key not in NOT_HASHED})
        kept = {key: value for key, value in kept.items() if NEUTRAL.get(key, ...) != value}
        kept["method"] = {k: v for k, v in kept["method"].items() if _NEUTRAL_OF_METHODS.get(k, ...) is not v}
        kept["layers"] = {**kept["layers"], "sparsity": _in_order(kept["layers"]["sparsity"])}
        decides = json.dumps(kept if solver.prunes else _evaluated(kept, "_target_" in content["eval"]), sort_keys=True)
        digest, model = sha256(decides), _model_name(content["model"])
        words = f"{model}-{content['method']['name']}"
        if solver.prunes:
            words += f"-{pattern.slug}-s{content['seed']}"
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", words).lstrip(".-")[:120]
        return cls(content, digest, model, solver, pattern, f"{safe}-{digest[:8]}")


def config_hash(cfg: Mapping) -> str:
    """sha256 (hex) of the `canonical` configuration, without Hydra's own part and the keys that change no result.

    For a method that prunes nothing, these are all keys but those that an evaluation depends on.
    """
    return Configuration.of(cfg).digest


def run_name(cfg: Mapping) -> str:
    """<model>-<method>-<sparsity>-s<seed>-<hash>: safe as a file name, unique to the configuration.

    <model>-<method>-<hash> where the method prunes nothing.
    """
    return Configuration.of(cfg).name


def plain(cfg: Mapping) -> Mapping:
    """A composed configuration as plain values, as it was written, without Hydra's part."""
    if not isinstance(cfg, DictConfig):
        return cfg
    parts = {str(key): cfg[key] for key in cfg if key != "hydra"}  # raises for what is missing
    return {key: _values(part) if OmegaConf.is_config(part) else part for key, part in parts.items()}


def _values(part: Container) -> Any:
    return OmegaConf.to_container(part, resolve=True, throw_on_missing=True)


def canonical(cfg: Mapping) -> dict:
    """The configuration as plain values, without Hydra's part, what can be written in several ways written in one.

    Local paths are absolute; whole numbers are floats where a method's field is one; save=dense is true;
    globs are sorted where their order says nothing.
    """
    content = {key: dict(value) if isinstance(value, Mapping) else value for key, value in plain(cfg).items()}
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
    if "choices" in (allocation := content.get("allocation", {})):
        choices = allocation.pop("choices")
        whole = isinstance(choices, list) and all(type(n) is int for n in choices)
        allocation |= {} if choices is None else {"choices": sorted(choices) if whole else choices}
    if "path" in content.get("allocation", {}):
        content["allocation"]["path"] = _absolute(content["allocation"]["path"])
    if "finish" in content:
        content["finish"] = _canonical_finish(content["finish"])
    for key, fields in _float_fields(content).items():
        content[key] |= {k: float(v) for k, v in content[key].items() if k in fields and type(v) is int}
    if content["save"] == "dense":
        content["save"] = True
    layers = content["layers"]
    for key in ("include", "exclude"):
        if isinstance(layers[key], list):
            layers[key] = sorted(set(map(str, layers[key])))
    if isinstance(layers["sparsity"], Mapping):
        layers["sparsity"] = {name: _level(value) for name, value in layers["sparsity"].items()}
    return content


def _canonical_finish(node: Mapping) -> dict:
    """With the name of all stages, of which Hydra gives the last one's, and whole numbers as floats."""
    from ..training.finish import BESIDE, STAGES, build_finish

    finish = build_finish(node)
    found: dict = {"name": finish.name}
    for stage in (stage for stage in STAGES if stage in node):
        floats = {field.name for field in dataclasses.fields(getattr(finish, stage)) if "float" in str(field.type)}
        pairs = node[stage].items()
        found[stage] = {k: float(v) if k in floats and type(v) is int else v for k, v in pairs}
        if found[stage].get("fresh") is False:  # as before there was such a key
            del found[stage]["fresh"]
    beside = {key: node[key] for key in BESIDE if node.get(key) is not None}
    changed = {"path": _absolute, "minutes": float}
    return found | {key: changed.get(key, lambda value: value)(value) for key, value in beside.items()}


def _absolute(path) -> str | None:
    if path is None:
        return None
    try:
        found = Path(str(path)).expanduser()
    except RuntimeError:  # no such user: whoever reads the file says so
        return str(path)
    # The last part stays though it may be a link: those of a hub's cache lead to names without a suffix.
    return str(found.resolve() if found.name in ("", "..") else found.parent.resolve() / found.name)


def _float_fields(content: Mapping) -> dict[str, set[str]]:
    """By group, the fields of what its node describes that are numbers with a fraction."""
    from ..allocation.allocations import build_allocation
    from ..calibration.sensitivity import SensitivityChoice
    from ..data.settings import GeneratedSettings
    from ..evaluation.evaluation import build_evaluation
    from ..layer.registry import build
    from ..methods.target import build_target

    built = {"method": build(content["method"])}
    built |= {"target": build_target(content["target"])} if "target" in content else {}
    built |= {"allocation": build_allocation(content["allocation"])} if "allocation" in content else {}
    built |= {"sensitivity": SensitivityChoice()} if "sensitivity" in content else {}
    built |= {"data": GeneratedSettings("")} if "temperature" in content["data"] else {}
    built |= {"eval": own} if (own := build_evaluation(content["eval"])) is not None else {}
    return {
        key: {field.name for field in dataclasses.fields(value) if "float" in str(field.type)}
        for key, value in built.items()
    }


def _level(value):
    """A layer's own sparsity: a number, or how its pattern is written."""
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        return parse_sparsity(value).written
    except UserError:
        return value


def _in_order(levels):
    """The layers' own sparsities so that their order counts, the last match being the one that does: pairs where it is
    another than that of the alphabet, in which a hash has the keys."""
    return list(levels.items()) if isinstance(levels, Mapping) and list(levels) != sorted(levels) else levels


def _that_decides(content: dict) -> dict:
    """Without the keys that begin with an underscore: the path of a class, and how tables show a method. A method that
    moves to another module stays the same method."""
    return {
        key: _that_decides(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if not str(key).startswith("_")
    }


def _evaluated(content: dict, own: bool) -> dict:
    """The part of a configuration on which evaluations of an unpruned model depend; `own`: `eval` names a class."""
    content = {key: content[key] for key in _EVALUATED}
    for node, keys in _CALIBRATING.items():
        content[node] = {key: value for key, value in content[node].items() if key not in keys}
    names = content["eval"]["datasets"]
    if not names and not own:  # tasks have no windows
        del content["eval"]["seqlen"]
    if content["data"]["name"] not in names:
        del content["data"]
    return content


def _model_name(node: Mapping) -> str:
    """The model's name; for a local folder that folder's name, or that of the run that saved it as RUN/model."""
    if node["name"] == "local" and node.get("path"):
        path = Path(str(node["path"])).expanduser().resolve()
        return path.parent.name if path.name == "model" else path.name
    return str(node["name"])


def command_of() -> str | None:
    """The command that this run was started with; None where it was not started from the command line."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    return shlex.join(["python", "-m", "alps_exp", *map(str, HydraConfig.get().overrides.task)])


def register() -> None:
    """Make `${run_name:}` and `${run_dir:}` known to OmegaConf; conf/config.yaml names the run's directory by them."""
    OmegaConf.register_new_resolver("run_name", _resolve_run_name, replace=True)
    OmegaConf.register_new_resolver("run_dir", _resolve_run_dir, replace=True)


def _resolve_run_name(*, _root_: DictConfig) -> str:
    return run_name(_root_)


def _resolve_run_dir(*, _root_: DictConfig) -> str:
    resume = _root_.get("resume", "auto")
    return str(Path(str(resume)).expanduser()) if resume not in ("auto", False) else f"results/runs/{run_name(_root_)}"
