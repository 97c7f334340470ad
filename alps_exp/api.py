"""alps_exp from Python: prune one layer, or a loaded model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .base.checks import one_of, parse_device, require
from .base.errors import UserError
from .layer.inputs import Inputs
from .layer.method import Method
from .layer.problem import LayerProblem
from .layer.registry import solver as named_solver
from .layer.solver import Solution, Solver
from .methods.refit import refitted
from .methods.target import build_target
from .patterns import Pattern, parse_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .allocation.allocations import Allocation
    from .allocation.selection import Selection
    from .calibration.sensitivity import SensitivityChoice
    from .methods.target import Target
    from .pruning.job import PruneJob
    from .runs.record import RunRecord
    from .training.finish import Finish


@torch.no_grad()
def prune_layer(
    weight: Tensor,
    inputs: Tensor | None = None,
    gram: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    tokens: int | None = None,
    sequences: int | None = None,
    method: str | Solver = "alps",
    sparsity: float | str | Pattern = 0.7,
    refit: str = "none",
    **hyperparameters,
) -> Solution:
    """Prune one linear layer. Needs torch and a yaml reader only.

    Args:
        weight: (out, in) dense weight, on any device.
        inputs: (tokens, in) or (sequences, length, in) calibration inputs, from which all statistics are taken.
        gram: (in, in) their Gram matrix XᵀX, both triangles, a plain sum over tokens, undamped; in place of `inputs`.
        mean: (in,) mean over tokens, for DSnoT.
        var: (in,) variance over the tokens within each sequence, averaged over sequences, for DSnoT.
        tokens: number of tokens behind `gram`.
        sequences: number of sequences behind `gram`, or into which a (tokens, in) `inputs` divides.
        method: a name in conf/method ("alps", "sparsegpt", "wanda", "dsnot", "magnitude", "dense"), or a solver.
        sparsity: 0.7, "0.7", "2:4", or a pattern.
        refit: "pcg", "exact" or "admm" replaces the weights on the method's support by better ones there; "none".
        **hyperparameters: the method's, by name.

    Returns:
        The solution; `solution.weight` is (out, in) in the weight's dtype (float32 for half precision).

    Raises:
        UserError: an unknown name or a value that is not allowed (a ValueError; one line that says what is).
    """
    chosen = refitted(named_solver(method, **hyperparameters), refit)
    if not isinstance(chosen, Solver):
        raise UserError(f"{type(chosen).__name__} prunes blocks or the model as a whole: give it to prune_model")
    pattern = parse_sparsity(sparsity)
    for label, value in (("weight", weight), ("inputs", inputs), ("gram", gram), ("mean", mean), ("var", var)):
        if not isinstance(value, (Tensor, type(None))) or (label == "weight" and value is None):
            raise UserError(f"{label} must be a torch tensor, got {type(value).__name__}")
    for label, value in (("tokens", tokens), ("sequences", sequences)):
        if value is not None:
            require(label, value, int, 1, float("inf"))
    if inputs is not None:
        given = [n for n, v in (("gram", gram), ("mean", mean), ("var", var), ("tokens", tokens)) if v is not None]
        if given:
            raise UserError(f"inputs and {', '.join(given)} are both given: give the inputs or their statistics")
        problem = LayerProblem.from_inputs(weight.detach(), inputs.detach(), sequences)
    else:
        problem = LayerProblem(weight.detach(), Inputs(gram, None, mean, var, tokens, sequences))
        if gram is not None:
            problem.inputs.check_gram(gram.dtype)
    pattern.check(tuple(problem.weight.shape))
    return chosen.solve(problem, pattern)


def prune_model(
    model: PreTrainedModel,
    tokens: Tensor,
    method: str | Method = "alps",
    sparsity: float | str | Pattern = 0.7,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 1,
    propagate: str = "pruned",
    losses: bool = True,
    refit: str = "none",
    target: str | Target = "layer",
    capture: str = "auto",
    sensitivity: str | SensitivityChoice = "none",
    allocation: str | Allocation = "uniform",
    finish: str | Finish = "none",
    held_out: Tensor | None = None,
    fresh: Tensor | None = None,
    expert_shrinkage: float = 0.03,
    expert_weighting: str = "none",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    layer_sparsity: Mapping[str, float | str | Pattern] | None = None,
    progress: bool = False,
    **hyperparameters,
) -> dict:
    """Prune a loaded `transformers` causal language model in place.

    What is set on the model stays as it is: training mode, gradients, the key-value cache, hooks, and forwards that
    were replaced on its modules. Of a compiled model the module behind it is pruned, which it runs from then on.

    Args:
        model: the model, on any device, in any floating dtype.
        tokens: (windows, seqlen) integer token ids to calibrate on.
        method: as in `prune_layer`.
        sparsity: as in `prune_layer`.
        device: where the blocks compute; by default where the model is.
        batch_size: windows per forward.
        propagate: "pruned" (each block sees what the pruned blocks before it produce) or "dense".
        losses: measure every layer's relative loss (takes Gram matrices whatever the method needs).
        refit: as in `prune_layer`.
        target: what the layers are fitted to, a name in conf/target ("layer", "stream"), or a target.
        capture: which inputs are collected together, "auto", "block" or "groups" (conf/config.yaml).
        sensitivity: whether gradients of the dense model weigh the outputs: "none", "outputs", or a choice.
        allocation: how the sparsity is divided among layers, a name in conf/allocation, or an allocation.
        finish: which gradients the kept weights follow after that, "none", "block", "distil" or "block+distil"
            (conf/finish), or a choice; it needs `held_out`.
        held_out: (windows, seqlen) token ids that are not calibrated on: every layer's loss is measured on them too,
            and they choose among the weights of finishing.
        fresh: (windows, seqlen) token ids that finishing trains on beside `tokens`: a distillation, and blocks where
            `finish.block.fresh` says so.
        expert_shrinkage: so many tokens for each input are added to the statistics of an expert, as the experts of its
            layer receive them on average.
        expert_weighting: "squared" counts an expert's tokens by the squares of their routing weights; "none" all alike.
        include: globs on the names of the layers to prune.
        exclude: globs on the names of layers among them that stay dense.
        layer_sparsity: glob → sparsity for the layers it matches, in place of `sparsity`.
        progress: show progress on standard error.
        **hyperparameters: as in `prune_layer`.

    Returns:
        The run record as plain values: `layers`, `summary`, `phases`, `environment` and the call's settings.

    Raises:
        UserError: as `prune_layer`; also a model without decoder blocks, or that is another one block by block
            (`faithful`), with adapters, or spread over devices; a width that the pattern does not fit, tokens of the
            wrong shape or outside the vocabulary, NaN or infinite weights. All this is found before any weight changes.
            What shows while a block is solved (NaN or infinite activations, too little memory, a matrix that cannot be
            factorised) leaves the blocks before it pruned: load the model again.
    """
    from .allocation.selection import Selection
    from .pruning.job import PruneJob

    order = {"batch_size": batch_size, "propagate": propagate, "losses": losses, "capture": capture}
    experts = {"shrinkage": expert_shrinkage, "weighting": expert_weighting}
    windows = {"tokens": tokens, "held_out": held_out, "fresh": fresh}
    named = {"target": target, "sensitivity": sensitivity, "allocation": allocation}
    _check_order(**order, **experts)
    model = getattr(model, "_orig_mod", model)
    _check_windows(model, **windows)
    chosen = named_solver(method, **hyperparameters)
    fitting = refitted(chosen, refit)
    pattern = parse_sparsity(sparsity)
    place = _place(model, device)
    selection = Selection.parse(include, exclude, layer_sparsity)
    fitting, patterns = _for_the_model(fitting, model, selection, pattern)
    built = _built(**named, finish=finish)
    job = PruneJob(fitting, patterns, selection, quiet=not progress, **windows, **order, **experts, **built)
    _check_job(model, job)
    record = _record_of_the_call(model, job, place, chosen, method, pattern, refit, named)
    _prune_in_place(model, job, place, record)
    return record.to_dict()


def _check_order(batch_size: int, propagate: str, losses: bool, capture: str, shrinkage: float, weighting: str) -> None:
    from .base.choices import CAPTURE, PROPAGATE, WEIGHTINGS

    require("prune_model.batch_size", batch_size, int, 1, float("inf"))
    require("prune_model.expert_shrinkage", shrinkage, float, 0, 1e6)
    one_of("prune_model.expert_weighting", weighting, WEIGHTINGS)
    one_of("propagate", propagate, PROPAGATE)
    one_of("capture", capture, CAPTURE)


def _check_windows(model: nn.Module, tokens: Tensor, held_out: Tensor | None, fresh: Tensor | None) -> None:
    from .model.loading import context_length

    if not hasattr(model, "get_input_embeddings"):
        raise UserError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    vocabulary = model.get_input_embeddings().num_embeddings
    _check_tokens("tokens", tokens, vocabulary)
    for name, windows in (("held_out", held_out), ("fresh", fresh)):
        if windows is not None:
            _check_tokens(name, windows, vocabulary)
            if windows.shape[1] != tokens.shape[1]:
                raise UserError(
                    f"{name} has windows of {windows.shape[1]} tokens and tokens of {tokens.shape[1]}: give as many"
                )
    context = context_length(model.config)
    if context is not None and tokens.shape[1] > context:
        raise UserError(f"tokens of {tokens.shape[1]} a window are beyond the model's context of {context} tokens")


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Where the blocks compute: as asked, or where the model is."""
    from .model.blocks import refuse_scattered

    place = parse_device(str(device)) if device is not None else next(model.parameters()).device
    refuse_scattered(model, place)
    return place


def _for_the_model(
    fitting: Method, model: nn.Module, selection: Selection, pattern: Pattern
) -> tuple[Method, dict[str, Pattern]]:
    """The method as it treats this model, and the pattern of each layer to prune by name."""
    from .allocation.prunable import linear_shapes, other_names
    from .procedure.mixtures import check_method

    if not fitting.prunes:
        return fitting, {}
    shapes = linear_shapes(model, selection)
    patterns = selection.patterns_for(shapes, pattern, other_names(model))
    fitting = fitting.for_layers(patterns, shapes)
    check_method(model, patterns, fitting)
    return fitting.for_model(model, patterns), patterns


def _built(
    target: str | Target, sensitivity: str | SensitivityChoice, allocation: str | Allocation, finish: str | Finish
) -> dict:
    """The job's parts of these names, those that are given by name as their files have them."""
    from .allocation.allocations import build_allocation
    from .base.resources import choice_file
    from .calibration.sensitivity import build_sensitivity

    builders = {"target": build_target, "sensitivity": build_sensitivity, "allocation": build_allocation}
    given = {"target": target, "sensitivity": sensitivity, "allocation": allocation}
    found = {
        group: builders[group](choice_file(group, choice)) if isinstance(choice, str) else choice
        for group, choice in given.items()
    }
    return {**found, "finish": _finish(finish)}


def _check_job(model: nn.Module, job: PruneJob) -> None:
    """Raise UserError for what does not go together."""
    from .procedure.mixtures import check_experts
    from .procedure.scope import check_scope
    from .procedure.weighing import check_weighing
    from .pruning.method import ModelMethod

    if job.target.beside and job.propagate == "dense":
        raise UserError("target stream makes up for what pruned blocks have lost: give propagate='pruned'")
    if getattr(job.target, "strength", 0) == "auto" and job.held_out is None:
        raise UserError(
            "target strength 'auto' is chosen by the loss on held-out windows: give held_out=TOKENS, or a number"
        )
    used = job.losses or job.finish.name != "none" or getattr(job.target, "strength", 0) == "auto" or job.solver.trains
    if job.held_out is not None and not used:
        raise UserError("held_out measures losses and needs losses=True")
    if not job.patterns:
        return
    name = type(job.solver).__name__
    check_scope(name, job.solver, job.target, job.sensitivity, job.capture)
    if job.solver.trains and job.finish.name != "none":
        raise UserError(f"finish={job.finish.name} compares with the dense model, and {name} trains its weights")
    check_weighing(job.allocation, job.sensitivity, len(job.tokens), job.solver, job.shared)
    check_experts(model, job.patterns, job.solver, job.finish, job.weighting)
    job.finish.check(job.propagate, len(job.held_out) if job.held_out is not None else 0, len(job.tokens))
    _check_fresh(job.finish, job.fresh, job.held_out)
    if job.finish.block is not None and isinstance(job.solver, ModelMethod):
        raise UserError("finish=block is a stage of the block loop, and the method prunes the model as a whole")


def _prune_in_place(model: nn.Module, job: PruneJob, place: torch.device, record: RunRecord) -> None:
    """Prune, and leave the model where and in the modes in which it was, even after an error."""
    from .model.blocks import BlockModel
    from .procedure.prune import prune_blocks
    from .runs.provenance import peak_memory

    home = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not see that blocks' forwards are replaced
            record.book(prune_blocks(BlockModel(model, place), job))
    finally:
        for module in training:
            module.training = True
        if any(parameter.device != home for parameter in model.parameters()):
            model.to(home)
    record.phases |= peak_memory(place)


def _record_of_the_call(
    model: nn.Module,
    job: PruneJob,
    place: torch.device,
    chosen: Method,
    method: str | Method,
    pattern: Pattern,
    refit: str,
    named: Mapping[str, object],
) -> RunRecord:
    """A record that says what was asked; `named` are the choices as the caller gave them."""
    from .runs.provenance import environment
    from .runs.record import RunRecord

    name = method if isinstance(method, str) else type(method).__name__.lower()
    return RunRecord(
        status="complete",
        config={
            "method": {"name": name, **dataclasses.asdict(chosen)},
            "sparsity": str(pattern),
            "batch_size": job.batch_size,
            "propagate": job.propagate,
            "losses": job.losses,
            "refit": refit,
            "capture": job.capture,
            "expert_shrinkage": job.shrinkage,
            "expert_weighting": job.weighting,
            **{group: _described(choice, getattr(job, group)) for group, choice in named.items()},
            "finish": {"name": job.finish.name} | {k: v for k, v in dataclasses.asdict(job.finish).items() if v},
            "layers": {
                "include": list(job.selection.include),
                "exclude": list(job.selection.exclude),
                "sparsity": {glob: str(own) for glob, own in job.selection.sparsity.items()},
            },
        },
        config_hash="",
        model=getattr(model.config, "name_or_path", "") or type(model).__name__,
        method=name,
        sparsity=str(pattern) if chosen.prunes else "0",
        seed=0,
        calibration={"windows": job.tokens.shape[0], "seqlen": job.tokens.shape[1]},
        environment={**environment(place), "dtype": str(model.dtype).removeprefix("torch.")},
    )


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    *,
    seed: int = 0,
    bos: str | bool = "auto",
    prompts: Iterable[str] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """Calibration windows that a loaded model writes itself, as `data=generated` has them; nothing is kept on disk.

    Args:
        model: a causal language model of `transformers`, which writes where it is.
        tokenizer: the model's.
        nsamples: windows.
        seqlen: tokens in a window.
        seed: of the samples; no global generator is used or changed.
        bos: "auto": as the tokenizer begins texts; true, false, "window".
        prompts: texts that windows begin with, in turn.
        temperature: of the sampling.
        top_k: sample from so many of the likeliest tokens; 0: from all.
        top_p: and from those that make up this share of the probability.
        batch_size: windows at a time; another number gives other text.
        progress: show progress on standard error.

    Returns:
        Tokens (nsamples, seqlen) for `prune_model`.

    Raises:
        UserError: values that are not allowed, prompts that fill a window, NaN or infinite logits, windows that repeat.
    """
    from .base.files import sha256
    from .data.generated import first_tokens, refuse_repetition, write
    from .data.settings import GeneratedSettings
    from .model.loading import context_length
    from .model.tokenization import vocabulary_of

    given = tuple(prompts) if not isinstance(prompts, str) else prompts
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "batch_size": batch_size}
    data = GeneratedSettings("generated", prompts=given, **sampling)
    data.check()
    for name, value, low in (("nsamples", nsamples, 1), ("seqlen", seqlen, 2), ("seed", seed, 0)):
        require(name, value, int, low, float("inf"))
    context = context_length(model.config)
    if context is not None and seqlen > context:
        raise UserError(f"seqlen={seqlen} is beyond the model's context of {context} tokens: give at most that")
    key, place = sha256(f"calibration {seed}"), next(model.parameters()).device
    starts = first_tokens(data, tokenizer, nsamples, seqlen, bos, key, vocabulary_of(model.config))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        tokens = write(model, starts, seqlen, data, key, place, quiet=not progress)
    finally:
        for module in training:
            module.training = True
    refuse_repetition(tokens, temperature, max(map(len, starts)))
    return tokens


def _check_tokens(name: str, tokens: Tensor, vocabulary: int) -> None:
    integers = isinstance(tokens, Tensor) and tokens.dtype in (torch.int64, torch.int32)
    if not integers or tokens.ndim != 2 or tokens.numel() == 0 or tokens.shape[1] < 2:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise UserError(f"{name} must be an integer tensor (windows, seqlen), got {shape}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(f"{name} must be from 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}")


def _finish(asked: str | Finish) -> Finish:
    from .base.resources import choice_file
    from .training.finish import build_finish

    if not isinstance(asked, str):
        return asked
    nodes = [choice_file("finish", name) for name in asked.split("+")]
    return build_finish({key: value for node in nodes for key, value in node.items()})


def _check_fresh(finish: Finish, fresh: Tensor | None, held_out: Tensor | None) -> None:
    from .data.fresh import Spoken

    if finish.tokens is not None or (finish.distil is not None and finish.distil.windows is not None):
        raise UserError("finish.tokens and finish.distil.windows are keys of runs: give the text itself, fresh=TOKENS")
    if fresh is None:
        if finish.block is not None and finish.block.fresh:
            raise UserError("finish.block.fresh=True trains on fresh text: give it, fresh=TOKENS")
        return
    if not finish.reads:
        raise UserError("fresh is text to distil on: give finish='distil' or 'block+distil'")
    if shared := int(Spoken([held_out]).within(fresh).sum()):
        raise UserError(f"{shared} of {len(fresh)} windows of fresh share text with held_out: leave them out")


def _described(asked: object, chosen: object) -> dict:
    name = asked if isinstance(asked, str) else type(chosen).__name__.lower()
    fields = dataclasses.asdict(chosen)
    if fields.get("choices", ...) is None:
        del fields["choices"]
    return {**fields, "name": name}


def load_packed(folder: str | Path, resident: str = "dense", device: str | torch.device | None = None):
    """The `transformers` model of a folder that `save=packed` wrote, in its own dtype, in evaluation mode.

    Args:
        folder: `results/runs/…/model`.
        resident: what its pruned linear layers are in memory. "dense": dense weights. "packed": they stay packed, and
            products are made from there; on CUDA as gap codes, on the CPU as compressed sparse rows. "semi-structured":
            torch's tensors for 2:4 weights, on CUDA. Layers that the form would not make smaller are dense; gradients
            through the others are refused. `generate` works with all, with a static cache, too.
        device: where the model goes; by default, dense ones stay on the CPU, others go to CUDA if there is any.

    Raises:
        UserError: not a packed folder, or one that is damaged; a form that no layer can have.
    """
    from .checkpoints.packed import FILE, is_packed, pruned_names
    from .model.loading import load_model, resolve
    from .model.resident import FORMS, make_resident

    one_of("resident", resident, FORMS)
    path = Path(folder).expanduser()
    if not is_packed(path):
        raise UserError(
            f"{folder} has no {FILE}: give a folder that save=packed wrote; a dense one is loaded by "
            "AutoModelForCausalLM.from_pretrained"
        )
    model = load_model(resolve({"name": "local", "path": str(path)}))
    if device is None:
        device = "cuda" if resident != "dense" and torch.cuda.is_available() else "cpu"
    report = make_resident(model, resident, torch.device(device))
    if resident != "dense":
        model.config.use_cache = True  # for inference alone
        left = sorted({name.removesuffix(".weight") for name in pruned_names(path)} - set(report.layers))
        if left:
            warnings.warn(
                f"{len(left)} tensors that are packed in the file are dense in memory, {left[0]} for one: "
                f"resident={resident} would not make them smaller here, or they are no linear layers",
                stacklevel=2,
            )
    return model
