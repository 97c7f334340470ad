"""What a run is asked to do, resolved once: below `Settings` nobody reads a configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..allocation.allocations import Allocation
from ..allocation.prunable import linear_shapes, other_names
from ..allocation.selection import Selection
from ..base import garbage
from ..base.checks import local_path, parse_device, require
from ..base.errors import UserError
from ..base.redaction import refuse_keys
from ..calibration.sensitivity import Sensitivity, SensitivityChoice
from ..checkpoints import upload
from ..data import texts
from ..data.settings import CalibrationSettings, DataSettings, GeneratedSettings, check_bos
from ..evaluation import perplexity, protocol
from ..evaluation.settings import EvaluationSettings
from ..layer.method import Method
from ..layer.registry import build
from ..methods.refit import refitted
from ..methods.target import Target
from ..model import loading
from ..model.loading import ModelSettings
from ..patterns import Pattern
from ..patterns.written import pattern_of
from ..procedure.distil import refuse_streamed
from ..procedure.mixtures import check_experts, check_method
from ..procedure.scope import check_scope
from ..procedure.strength import check_strength
from ..procedure.trained import refuse_streamed as refuse_untrainable
from ..procedure.weighing import check_weighing
from ..pruning.method import ModelMethod
from ..training.finish import Finish
from . import loggers, resume, together
from .choices import Choices
from .loggers import LoggerSettings
from .naming import Configuration, plain
from .shrinking import shrunk_config
from .values import check_among, check_root


@dataclass(frozen=True)
class Settings:
    """A run's configuration, checked, with all that can be known without the weights and the texts.

    Attributes:
        configuration: for the record, with its hash and the run's name.
        model: where it is, its config.json and its empty network.
        calibration: the windows.
        evaluation, logger: what is measured, and where it is told; None in a process that only prunes with others.
        solver: the method, with its refit.
        selection: the choice of layers.
        shapes: layer name → (out, in), of all linear layers of the decoder blocks; empty where nothing is pruned.
        patterns: layer name → pattern, for every layer that is pruned.
        device: where the blocks compute.
        dtype: of the weights; "auto" is the checkpoint's own, which CPUs compute slowly: there it is float32.
        own_dtype: whether the configuration leaves the dtype to the checkpoint.
        target: what the layers are fitted to.
        sensitivity: whether gradients of the dense model weigh the outputs.
        allocation: how the sparsity is divided among layers.
        finish: which gradients the kept weights follow after that.
        statistics_cache: GB, or "auto".
        save: False, True, "packed" or "shrunk".
        push: repository of the hub that the saved model goes to.
        fresh: the windows of another data set to distil on beside the calibration's; None without such.

    The others are the configuration's keys of these names.
    """

    configuration: Configuration
    model: ModelSettings
    calibration: CalibrationSettings
    evaluation: EvaluationSettings | None
    solver: Method
    selection: Selection
    shapes: Mapping[str, tuple[int, int]]
    patterns: Mapping[str, Pattern]
    device: torch.device
    dtype: torch.dtype | str
    own_dtype: bool
    devices: int
    batch_size: int
    propagate: str
    losses: bool
    target: Target
    capture: str
    sensitivity: SensitivityChoice
    allocation: Allocation
    finish: Finish
    expert_shrinkage: float
    expert_weighting: str
    stream: str | bool
    hidden_states: str
    resumable: bool
    resume: str | bool
    statistics_cache: float | str
    save: str | bool
    push: str | None
    logger: LoggerSettings | None
    fresh: CalibrationSettings | None = None

    @property
    def prunes(self) -> bool:
        """Whether the method changes any weight."""
        return self.solver.prunes

    @property
    def reads_text(self) -> bool:
        """Whether the run has any use for the model's tokenizer."""
        return bool(self.prunes or self.evaluation.reads_text or self.save)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, as far as config.json tells."""
        dtype = self.model.config.dtype if self.dtype == "auto" else self.dtype
        return dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize


# Keys whose values `Settings` has as they are given.
_AS_THEY_ARE = ("devices", "batch_size", "propagate", "losses", "capture", "expert_shrinkage", "expert_weighting")
_AS_THEY_ARE += ("stream", "hidden_states", "resumable", "resume", "statistics_cache")


def resolve(cfg: Mapping, whole: bool = True) -> Settings:
    """Check a configuration, as far as that goes without the weights and the texts, and give what it says.

    Args:
        cfg: the composed configuration.
        whole: False leaves the evaluation and the logger alone, for a process that only prunes with others.

    Raises:
        UserError: the first mistake found.
    """
    cfg = plain(cfg)
    refuse_keys(cfg)
    _check_paths(cfg)
    selection, choices, configuration, data = check_words(cfg, whole)
    together.check(cfg["devices"], str(cfg["device"]))
    device = parse_device(cfg["device"])
    logger = loggers.resolve(cfg["logger"]) if whole else None
    # From here on the model's files are read.
    model = _model(cfg, configuration.solver.prunes)
    shapes, patterns, solver = _layers(cfg, configuration, model, selection, choices)
    if configuration.content["save"] == "shrunk":
        shrunk_config(model.skeleton, patterns)
    calibration, fresh = _windows(cfg, data, solver, choices.finish)
    settings = Settings(
        configuration=configuration,
        model=model,
        calibration=calibration,
        evaluation=protocol.resolve(cfg["eval"], data, model) if whole else None,
        solver=solver,
        selection=selection,
        shapes=shapes,
        patterns=patterns,
        device=device,
        dtype=_dtype(cfg["dtype"], device),
        own_dtype=cfg["dtype"] == "auto",
        **choices._asdict(),
        **{key: cfg[key] for key in _AS_THEY_ARE},
        save=configuration.content["save"],
        push=cfg.get("push"),
        logger=logger,
        fresh=fresh,
    )
    if whole:
        _check_outside(cfg, settings)
    garbage.settle()  # almost all that a run needs has been imported by now
    return settings


def check_words(cfg: Mapping, whole: bool = True) -> tuple[Selection, Choices, Configuration, DataSettings]:
    """Check what a configuration says, by itself: neither the device is asked about it nor the model's files.

    Nothing here computes with torch, so that it can be asked where stand-ins are imported (`early`).

    Args:
        cfg: the configuration as plain values.
        whole: as in `resolve`.

    Returns:
        The choice of layers, the other choices, the configuration, and the data set.

    Raises:
        UserError: the first mistake found.
    """
    prunes = build(cfg["method"]).prunes
    selection = Selection.parse(*(cfg["layers"][key] for key in ("include", "exclude", "sparsity")))
    pattern_of(cfg["sparsity"])  # so that a mistake in it is told before those below
    _check_values(cfg)
    _check_stream(cfg, prunes)
    choices = Choices.of(cfg)
    configuration = Configuration.of(cfg)
    _check_together(cfg, configuration, choices)
    if prunes and not cfg["layers"]["sparsity"]:  # which may leave no layer the sparsity of the others
        refitted(configuration.solver, cfg["refit"]).check_pattern(configuration.pattern)
    if configuration.content["save"] == "shrunk":
        _check_shrinks(cfg["method"]["name"], configuration.solver)
    data = DataSettings.parse(cfg["data"])
    _check_texts(cfg, data, prunes)
    _fresh(choices.finish, data)  # names a text that there is
    if whole:
        protocol.check_texts(cfg["eval"], data)
    return selection, choices, configuration, data


def _check_stream(cfg: Mapping, prunes: bool) -> None:
    if cfg["stream"] is not True or not prunes:
        return
    if isinstance(DataSettings.parse(cfg["data"]), GeneratedSettings):
        raise UserError(
            "data=generated needs the whole model in memory to write text: leave out stream=true, or give a text "
            "(data=c4, data=local)"
        )
    if not cfg["resumable"]:
        raise UserError("stream=true keeps pruned blocks in the run's directory and needs resumable=true")


def _check_together(cfg: Mapping, configuration: Configuration, choices: Choices) -> None:
    """What the choices say to each other."""
    target = choices.target
    _check_target(cfg, target)
    _check_scope(cfg, configuration.solver, target, choices.sensitivity)
    if getattr(target, "strength", 0) == "auto":
        check_strength(cfg["data"]["holdout"], cfg["devices"], cfg["stream"] is True)
    _check_finish(cfg, configuration.solver, choices.finish)
    resume.check(configuration, cfg["resume"], cfg["resumable"])


def _model(cfg: Mapping, prunes: bool) -> ModelSettings:
    model = loading.resolve(cfg["model"])
    loading.check_weights(model)
    if prunes and model.context is not None and cfg["seqlen"] > model.context:
        raise UserError(
            f"seqlen={cfg['seqlen']} is beyond the model's context of {model.context} tokens: give at most that"
        )
    return model


def _layers(
    cfg: Mapping, configuration: Configuration, model: ModelSettings, selection: Selection, choices: Choices
) -> tuple[Mapping[str, tuple[int, int]], Mapping[str, Pattern], Method]:
    """The model's layers, the patterns of those to prune, and the method as it treats this model, if it can."""
    solver = refitted(configuration.solver, cfg["refit"])
    if not configuration.solver.prunes:
        return {}, {}, solver
    shapes = linear_shapes(model.skeleton, selection)
    patterns = selection.patterns_for(shapes, configuration.pattern, other_names(model.skeleton))
    solver = solver.for_layers(patterns, shapes)
    check_method(model.skeleton, patterns, solver)
    check_experts(model.skeleton, patterns, solver, choices.finish, cfg["expert_weighting"])
    solver = solver.for_model(model.skeleton, patterns)
    free = selection.shared(patterns)
    check_weighing(choices.allocation, choices.sensitivity, cfg["nsamples"], solver, free)
    if choices.allocation.needs == "nothing":  # what can be known of it without the weights, such as what a file lacks
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        choices.allocation.allocate(free, sizes, Sensitivity())
    return shapes, patterns, solver


def _check_shrinks(name: str, solver: Method) -> None:
    if not solver.structured:
        raise UserError(
            f"save=shrunk leaves out whole channels and heads, which {name} does not prune: give save=true or "
            "save=packed"
        )
    if not solver.even:
        raise UserError(
            f"{name} leaves other numbers of channels and heads in every block, which no model's configuration can "
            "say: give save=true"
        )


def _windows(
    cfg: Mapping, data: DataSettings, solver: Method, finish: Finish
) -> tuple[CalibrationSettings, CalibrationSettings | None]:
    """The calibration's windows, and those of another data set to distil on beside them."""
    text, more = _fresh(finish, data), finish.fresh(cfg["nsamples"], cfg["seqlen"])
    common = cfg["seqlen"], cfg["seed"], cfg["model"]["bos"]
    training = max(0, solver.training_windows(cfg["seqlen"]) - cfg["nsamples"])
    calibration = CalibrationSettings(data, cfg["nsamples"], *common, more if text is None else 0, training)
    return calibration, text and CalibrationSettings(text, 0, *common, more)


def _check_outside(cfg: Mapping, settings: Settings) -> None:
    """What a process that prunes alone asks of the tokenizer and the hub."""
    if settings.reads_text:
        _check_tokenizer(settings)
    if settings.push is not None:
        (upload.check_token if cfg["plan"] else upload.check)(settings.push)  # a plan asks no hub about it


def _check_values(cfg: Mapping) -> None:
    check_root(cfg)
    check_among(cfg)
    require("data.holdout", cfg["data"]["holdout"], int, 0, float("inf"))
    used = cfg["losses"] or cfg["finish"]["name"] != "none" or cfg["target"].get("strength") == "auto"
    used = used or build(cfg["method"]).trains
    if cfg["data"]["holdout"] and not used:
        raise UserError(f"data.holdout={cfg['data']['holdout']} measures losses and needs losses=true")
    if cfg.get("push") is not None:
        upload.check_name(str(cfg["push"]))


def _check_target(cfg: Mapping, target: Target) -> None:
    if target.beside and cfg["propagate"] == "dense":
        raise UserError(
            "target=stream makes up for what pruned blocks have lost, and propagate=dense feeds every block what the "
            "dense ones produce: leave one of them out"
        )
    in_order = cfg["capture"] == "groups" or target.beside
    if in_order and cfg["statistics_cache"] not in ("auto", 0):
        raise UserError(
            f"statistics_cache={cfg['statistics_cache']} shares what is collected before a block is pruned, and "
            f"{'target=stream' if target.beside else 'capture=groups'} collects it behind pruned layers: leave it out"
        )


def _check_scope(cfg: Mapping, method: Method, target: Target, sensitivity: SensitivityChoice) -> None:
    """Refuse what only the block loop does with layers that are solved one by one."""
    if not method.shares and cfg["statistics_cache"] not in ("auto", 0):
        raise UserError(
            f"statistics_cache={cfg['statistics_cache']} shares what methods collect that prune layer by layer, and "
            f"{cfg['method']['name']} runs blocks by itself: leave it out"
        )
    if method.trains:
        refuse_untrainable(cfg["method"]["name"], cfg["stream"] is True)
        if method.batch < cfg["devices"]:
            raise UserError(
                f"method.batch={method.batch} windows are fewer than devices={cfg['devices']}: give a larger batch, or "
                "fewer devices"
            )
    check_scope(cfg["method"]["name"], method, target, sensitivity, cfg["capture"], cfg["devices"])


def _check_finish(cfg: Mapping, method: Method, finish: Finish) -> None:
    if finish.name == "none":
        return
    if not method.prunes:
        raise UserError(f"finish={finish.name} finishes what was pruned, and method=dense prunes nothing: leave it out")
    if method.trains:
        raise UserError(
            f"finish={finish.name} compares with the dense model, and {cfg['method']['name']} trains its weights: "
            "leave it out"
        )
    finish.check(cfg["propagate"], cfg["data"]["holdout"], cfg["nsamples"])
    if finish.block is not None and finish.block.fresh and not finish.fresh(cfg["nsamples"], cfg["seqlen"]):
        raise UserError("finish.block.fresh=true trains on fresh text: say how much (finish.tokens=1000000)")
    if finish.distil is not None:
        refuse_streamed(cfg["stream"] is True)
    if finish.block is not None and isinstance(method, ModelMethod):
        raise UserError(
            f"finish=block is a stage of the block loop, and {cfg['method']['name']} prunes the model as a whole: give "
            "finish=distil"
        )
    if finish.block is not None and finish.block.batch % cfg["devices"]:
        raise UserError(
            f"finish.block.batch={finish.block.batch} windows do not divide among devices={cfg['devices']}: give a "
            "multiple of that"
        )
    if finish.distil is not None and finish.distil.batch < cfg["devices"]:
        raise UserError(
            f"finish.distil.batch={finish.distil.batch} windows are fewer than devices={cfg['devices']}: give a larger "
            "batch, or fewer devices"
        )


def _fresh(finish: Finish, data: DataSettings) -> DataSettings | None:
    """The data set of the text to distil on; None where it is the calibration's.

    Raises:
        UserError: no such data set or file, or one that names no text.
    """
    if finish.tokens is None or (finish.path is None and finish.data in (None, data.name)):
        return None
    try:
        found = DataSettings.named(finish.data or "local")
    except UserError as error:
        raise UserError(f"finish.data={finish.data}: {error}") from None
    if finish.path is not None:
        if isinstance(found, GeneratedSettings):
            raise UserError(f"finish.path={finish.path}: finish.data=generated has no file: leave one of them out")
        texts.local_file(finish.path, f"finish.path={finish.path}")
        return dataclasses.replace(found, path=finish.path)
    if not isinstance(found, GeneratedSettings) and not found.calibration_file:
        raise UserError(f"finish.data={finish.data} needs finish.path=FILE ({', '.join(texts.EXTENSIONS)})")
    return found


def _check_texts(cfg: Mapping, data: DataSettings, prunes: bool) -> None:
    """What the configuration says about calibration texts, and about BOS, without reading them."""
    for key in ("model", "eval"):
        check_bos(f"{key}.bos", cfg[key]["bos"])
    data.check(cfg["seed"])
    if prunes:
        texts.check_source(data)
    for key in ("path", "eval_path"):
        if (path := getattr(data, key)) is not None:
            texts.local_file(path, f"data.{key}={path}")


def _check_tokenizer(settings: Settings) -> None:
    """Whether the model has a tokenizer that can do what the run asks of it."""
    asked, tokenizer = settings.evaluation, loading.load_tokenizer(settings.model.source)
    if settings.prunes:
        check_bos("model.bos", settings.calibration.bos, tokenizer)
    if asked.texts or asked.tasks.names:
        check_bos("eval.bos", asked.bos, tokenizer)
    if asked.sample_tokens:
        perplexity.prompt_ids(tokenizer, asked.prompt, asked.sample_tokens, settings.model.config)


def _check_paths(cfg: Mapping) -> None:
    """That the folders which a configuration names can be looked at, and the files of a local model be read."""
    paths = {"model.path": cfg["model"].get("path"), "eval.task_source": cfg["eval"]["task_source"]}
    paths |= {"resume": cfg["resume"]} if cfg["resume"] not in ("auto", False) else {}
    found = {key: local_path(key, path) for key, path in paths.items() if path is not None}
    if (folder := found.get("model.path")) and folder.is_dir():
        for kind in ("*.json", "*.safetensors", "*.bin", "*.gguf", "*.model"):
            for file in sorted(folder.glob(kind)):
                local_path("model.path", file)


def _dtype(asked: str, device: torch.device) -> torch.dtype | str:
    if asked != "auto":
        return getattr(torch, asked)
    return torch.float32 if device.type == "cpu" else "auto"
