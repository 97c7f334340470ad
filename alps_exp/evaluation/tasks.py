"""Tasks of lm-eval on a network in memory: names, data, prompts within the context, scores as rows of the record.

Prompts, metrics and standard errors are lm-eval's own. What is decided here is which rows are evaluated and how the
network is called.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from lm_eval import evaluator

from ..base.errors import UserError
from ..model.blocks import BlockModel
from ..model.loading import ModelSettings, context_length, load_tokenizer
from ..model.loading import stamps as model_stamps
from ..model.tokenization import refuse_unknown, special_tokens
from .perplexity import whole_model
from .settings import TaskSettings
from .task_data import stamps
from .task_names import Request, calling_lm_eval, load, request

# The seeds of lm-eval's command line.
_RANDOM_SEED, _SEED = 0, 1234
# Draws for the standard error of what has no closed form (LAMBADA's perplexity).
_BOOTSTRAP = 1000
_CPU_BATCH, _MOST_BATCH = 16, 256


@dataclass(frozen=True)
class Pass:
    """Tasks that lm-eval evaluates together.

    Attributes:
        suffix: what their names carry in the record, "" or "@5".
        requested: names that the user gave; tables show these, and tasks of a tag, and not the members of a group.
        loaded: lm-eval's tasks and groups by name.
        samples: task → the rows to evaluate, in order; a task that is not there is evaluated on all.
        sampling: task → how they were chosen.
        sources: task → `source`, `split` and `rows`, where the data are local.
        truncated: task → requests longer than the model's context.
    """

    suffix: str
    requested: tuple[str, ...]
    loaded: Mapping
    samples: Mapping[str, list[int]]
    sampling: Mapping[str, str]
    sources: Mapping[str, dict]
    truncated: Mapping[str, int]


def prepare(model: ModelSettings, options: TaskSettings) -> tuple[Pass, ...]:
    """Everything about the configured tasks that needs no weights: data read, examples chosen, lengths checked.

    The same tasks of the same model are prepared once per process, unless their files change.

    Raises:
        UserError: unknown task (names the nearest), data that cannot be had, a tokenizer without the tokens
            that lm-eval needs, prompts beyond the model's context.
    """
    # The batch size has no part in it.
    asked, files = dataclasses.replace(options, batch_size="auto"), (stamps(options.source), model_stamps(model.source))
    return _prepared(model, asked, files)


@lru_cache(maxsize=4)
def _prepared(model: ModelSettings, options: TaskSettings, files: tuple) -> tuple[Pass, ...]:
    tokenizer = load_tokenizer(model.source)
    by_shots: dict[int | None, list[Request]] = {}
    for asked in map(request, options.names):
        by_shots.setdefault(asked.shots, []).append(asked)
    limits = _Limits(options)
    passes = []
    for shots, group in by_shots.items():
        suffix = "" if shots is None else f"@{shots}"
        names = [asked.name for asked in group]
        loaded, sources = load(names, shots, options.source, options.run_code)
        samples, sampling = {}, {}
        for name, task in loaded["tasks"].items():
            task.set_config("num_fewshot", task.config.num_fewshot or 0 if shots is None else shots)
            samples[name], sampling[name] = limits.choose(name, suffix, loaded, len(task.eval_docs))
        chosen = {name: rows for name, rows in samples.items() if rows is not None}
        lengths = _Lengths(tokenizer, model.context, model.vocabulary, options)
        truncated = {name: lengths.beyond(name, task, chosen.get(name)) for name, task in loaded["tasks"].items()}
        passes.append(Pass(suffix, tuple(names), loaded, chosen, sampling, sources, truncated))
    limits.refuse_unused()
    return tuple(passes)


class _Limits:
    """Which rows of a task are evaluated."""

    def __init__(self, options: TaskSettings) -> None:
        self.by_name, self.everywhere = dict(options.limits), options.limit
        self.seed, self.used = options.limit_seed, set()

    def choose(self, name: str, suffix: str, loaded: Mapping, rows: int) -> tuple[list[int] | None, str]:
        """The rows, None for all, and how they were chosen. A group's limit holds for each of its tasks."""
        groups = loaded["groups"].values()
        above = [group.name for group in groups if name in {task.task_name for task in group.get_all_tasks()}]
        keys = [f"{key}{end}" for key in (name, *above) for end in dict.fromkeys((suffix, ""))]
        key = next((key for key in keys if key in self.by_name), None)
        self.used.add(key)
        limit = self.by_name.get(key, self.everywhere)
        if limit is None or limit >= rows:
            return None, f"all of {rows}"
        if self.seed is None:
            return list(range(limit)), f"the first {limit} of {rows}"
        picks = random.Random(self.seed).sample(range(rows), limit)
        return sorted(picks), f"{limit} of {rows} at random, seed {self.seed}"

    def refuse_unused(self) -> None:
        """Raise UserError for a name in eval.limit that is none of the tasks."""
        if unused := sorted(set(self.by_name) - self.used):
            raise UserError(f"eval.limit names {unused[0]!r}, which is not among eval.tasks: give names of those")


class _Lengths:
    """Compares prompts with the model's context, as lm-eval's own model cuts them, and with its vocabulary."""

    def __init__(self, tokenizer, context: int | None, vocabulary: int | None, options: TaskSettings) -> None:
        self.tokenizer, self.context, self.vocabulary, self.options = tokenizer, context, vocabulary, options
        largest = max(tokenizer.get_vocab().values())
        self.all_known = self.vocabulary is None or largest < self.vocabulary
        rule, (_, after) = str(options.bos).lower(), special_tokens(tokenizer)
        if after and rule == "auto":  # lm-eval takes the tokens of a continuation from where its context's end
            raise UserError(
                f"eval.tasks cannot be scored with a tokenizer that adds {' '.join(after)} after each text: give "
                "eval.bos=false, or eval.bos=true for a BOS before each text"
            )

    def beyond(self, name: str, task, rows: list[int] | None) -> int:
        """How many of the task's requests are longer than the context.

        Raises:
            UserError: some are and eval.truncate is off; the tokenizer lacks a special token, or makes tokens that the
                model does not know.
        """
        generates = task.OUTPUT_TYPE == "generate_until"
        # lm-eval pads prompts with the end-of-text token where there is no padding token.
        if self.tokenizer.eos_token_id is None and (generates or self.tokenizer.bos_token_id is None):
            what = "an end-of-text token, which also pads" if generates else "a BOS or an end-of-text token"
            raise UserError(
                f"task {name} needs a tokenizer with {what}, and the model's has none: name one in its "
                "tokenizer_config.json"
            )
        fits = self.context is None or task.OUTPUT_TYPE == "loglikelihood_rolling"  # those are read in windows
        if fits and self.all_known:
            return 0
        with calling_lm_eval():
            task.set_fewshot_seed(seed=_SEED)
            task.build_all_requests(samples=rows, rank=0, world_size=1)
        if not self.all_known:
            texts = ["".join(part for part in instance.args if isinstance(part, str)) for instance in task.instances]
            ids = (max(row, default=0) for row in self.tokenizer(texts, verbose=False)["input_ids"])
            refuse_unknown(ids, self.tokenizer, self.vocabulary, f"task {name}")
        if fits:
            return 0
        if generates:
            most = max(int(instance.args[1].get("max_gen_toks", 256)) for instance in task.instances)
            texts, longest = [instance.args[0] for instance in task.instances], self.context - most
            if longest < 1:
                raise UserError(
                    f"task {name} generates up to {most} tokens, beyond the model's context of {self.context}: leave "
                    "it out, or take another model"
                )
        else:  # the last token of a continuation is predicted, not read
            texts, longest = ["".join(instance.args) for instance in task.instances], self.context + 1
        longest -= str(self.options.bos).lower() in ("true", "window")
        # A token is at least a byte, so short texts need no tokenising.
        texts = [text for text in texts if len(text.encode()) + 8 > longest]
        lengths = [len(row) for row in self.tokenizer(texts, verbose=False)["input_ids"]] if texts else []
        count = sum(length > longest for length in lengths)
        if count and not self.options.truncate:
            raise UserError(
                f"task {name}: {count} of {len(task.instances)} prompts are beyond the model's context of "
                f"{self.context} tokens (the longest has {max(lengths)}): eval.truncate=true drops their beginnings, "
                "as lm-eval does, or leave the task out"
            )
        return count


def measure(passes: tuple[Pass, ...], options: TaskSettings, model: BlockModel, tokenizer) -> list[dict]:
    """Evaluate prepared tasks.

    Args:
        passes: what `prepare` returned for these settings.
        options: the settings.
        model: the network, which may be larger than its device.
        tokenizer: the model's; it is not changed.

    Returns:
        A row per task (or group) and metric, for the record.
    """
    from .task_model import TaskModel

    size, device = options.batch_size, model.device
    if size == "auto" and device.type == "cpu":
        size = _CPU_BATCH
    rows = []
    with whole_model(model), calling_lm_eval():
        # A copy: lm-eval gives the tokenizer a padding token, which must not be saved with the model.
        network = TaskModel(
            model.model,
            copy.deepcopy(tokenizer),
            device=device,
            batch_size=size,
            max_batch_size=_MOST_BATCH,
            context=context_length(model.model.config),
            bos=options.bos,
        )
        for step in passes:
            rows += _rows(step, _evaluate(step, network, options.run_code), network.describe_bos())
    return rows


def _evaluate(step: Pass, network, run_code: bool) -> Mapping:
    random.seed(_RANDOM_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    for task in step.loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
    print(f"tasks: {', '.join(step.requested)}", file=sys.__stderr__, flush=True)
    return evaluator.evaluate(
        network, dict(step.loaded), samples=dict(step.samples), bootstrap_iters=_BOOTSTRAP, log_samples=False,
        confirm_run_unsafe_code=run_code,
    )  # fmt: skip


def _rows(step: Pass, results: Mapping, bos: str) -> list[dict]:
    rows = []
    groups, version = step.loaded["groups"], importlib.metadata.version("lm-eval")
    members = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    for name, scores in results["results"].items():
        tasks = [task.task_name for task in groups[name].get_all_tasks()] if name in groups else [name]
        counts = [results["n-samples"][task] for task in tasks]
        samples, total = (sum(count[key] for count in counts) for key in ("effective", "original"))
        source = step.sources.get(name, {})
        common = {
            "protocol": f"lm-eval {version}, task version {results['versions'].get(name)}",
            "samples": samples,
            "total_samples": total,
            "partial": samples < total,
            "sampling": step.sampling.get(name) or f"{samples} of {total} in {len(tasks)} tasks",
            "shots": results["n-shot"].get(name, 0),
            "truncated": sum(step.truncated[task] for task in tasks),
            "source": source.get("source") or _origin(step, tasks),
            "split": source.get("split"),
            "bos": bos,
        }
        higher = results["higher_is_better"].get(name, {})
        metrics = [key for key in scores if "," in key and not key.split(",")[0].endswith("_stderr")]
        shown = next((m for kind in ("acc", "exact_match") for m in metrics if m.startswith(f"{kind},")), metrics[0])
        for key in metrics:
            metric, rule = key.split(",")
            error = scores.get(f"{metric}_stderr,{rule}")
            rows.append(
                {
                    "dataset": f"{name}{step.suffix}",
                    "metric": metric if rule == "none" else f"{metric} ({rule})",
                    "value": float(scores[key]),
                    "stderr": float(error) if isinstance(error, (int, float)) else None,
                    "better": {True: "higher", False: "lower"}.get(higher.get(metric)),
                    "shown": key == shown and (name in step.requested or name not in members | set(groups)),
                    **common,
                }
            )
    return rows


def _origin(step: Pass, tasks: list[str]) -> str:
    """Where the data of a group, or of a task read from the hub, come from."""
    if step.sources:
        return f"{len(tasks)} tasks' local files"
    return ", ".join(sorted({str(step.loaded["tasks"][task].config.dataset_path) for task in tasks}))
