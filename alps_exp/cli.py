"""The command line: one run, a sweep, or a question about the configuration.

Everything that can be known beforehand is checked beforehand, for every job of a sweep, so that a typing mistake costs
one line and no model is loaded for it. Jobs hand back how they ended instead of raising, because an exception in one
job would end Hydra's whole sweep.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from . import __version__, naming, overrides
from .errors import UserError
from .redaction import redacted

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Outcome:
    """How one job ended."""

    name: str
    status: Literal["completed", "refused", "failed"]
    message: str = ""


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `alps-exp` and `python -m alps_exp`: exits with 0, 1 (failed), 2 (user's mistake) or 130."""
    sys.exit(guarded(lambda: command(list(sys.argv[1:] if words is None else words))))


def guarded(action: Callable[[], int]) -> int:
    """The exit status that `action` returns, or that of its error, which is told in one line."""
    try:
        status = action()
        sys.stdout.flush()
    except UserError as error:
        status = _report(str(error), USER_ERROR)
    except KeyboardInterrupt as error:
        status = _report(str(error) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has gone; say nothing, and keep Python from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILURE
    except Exception as error:
        hint = "" if _full_error() else "; HYDRA_FULL_ERROR=1 shows the trace"
        status = _report(_describe(error) + hint, FAILURE)
    return status


def command(words: list[str]) -> int:
    """Do what the words ask and return the exit status.

    Raises:
        UserError: a mistake in the words, before anything was loaded.
    """
    args, parser = _parse(words)
    if args.version:
        print(f"alps_exp {__version__}")
        return 0
    name = args.config_name or "config"
    with overrides.initialized():
        app: Any = GlobalHydra.instance().hydra
        if args.shell_completion:
            _prepare_completion()
            try:
                app.shell_completion(config_name=name, overrides=args.overrides)
            except ValueError as error:
                raise UserError(f'{error}; as in: eval "$(alps-exp -sc install=bash)"') from error
            return 0
        args.overrides = overrides.prepared(args.overrides)
        if args.config_dir:
            args.overrides.insert(0, _search_path(args.config_dir))
        if args.multirun:
            return _sweep(app, name, args.overrides)
        if args.hydra_help:
            app.hydra_help(config_name=name, args_parser=parser, args=args)
            return 0
        if args.help or args.cfg or args.info:
            overrides.compose_prepared(args.overrides, name, complete=False)
            _answer(app, name, args, parser)
            return 0
        return _single(app, name, args.overrides)


def _parse(words: list[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = get_args_parser()
    # Ours in place of Hydra's version; and one line in place of a page of usage.
    parser._option_string_actions.pop("--version")
    parser.add_argument("--version", action="store_true", help="Show the version and exit")

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what can be given")

    parser.error = refuse  # type: ignore[method-assign]
    # Intermixed: -m may stand anywhere, also after an override.
    args = parser.parse_intermixed_args(words)
    if args.config_path or args.experimental_rerun:
        raise UserError("--config-path and --experimental-rerun are not supported; --config-dir adds a folder")
    asked = [args.cfg is not None, args.info is not None, args.shell_completion, args.multirun, args.run]
    if sum(asked) > 1:
        raise UserError("give one of --run, --multirun, --cfg, --info and --shell-completion")
    if args.resolve and not (args.cfg or args.help):
        raise UserError("--resolve goes with --cfg or --help")
    return args, parser


def _search_path(folder: str) -> str:
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder")
    return f"hydra.searchpath=['file://{path}']"


def _prepare_completion() -> None:
    """Put the line to complete into the form that Hydra composes; the last word is still being typed."""
    *words, last = os.environ.get("COMP_LINE", "").split(" ")
    try:
        settled = [word for word in words[1:] if word and not word.startswith("-")]
        os.environ["COMP_LINE"] = " ".join([*words[:1], *overrides.prepared(settled), last])
    except UserError:
        pass  # nothing to suggest after a mistake, and no place to say so


def _answer(app: Any, name: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.help:
        app.app_help(config_name=name, args_parser=parser, args=args)
    elif args.cfg:
        app.show_cfg(
            config_name=name, overrides=args.overrides, cfg_type=args.cfg, package=args.package, resolve=args.resolve
        )
    else:
        app.show_info(args.info, config_name=name, overrides=args.overrides)


def _single(app: Any, name: str, words: list[str]) -> int:
    cfg = overrides.compose_prepared(words, name, with_hydra=True)
    if cfg.hydra.sweeper.get("params") or cfg.hydra.mode == RunMode.MULTIRUN:
        raise UserError("this is a grid of runs: add -m, as in python -m alps_exp -m +sweeps=demo")
    _validate(cfg)
    if cfg.plan:
        _print_plans([cfg])
        return 0
    with _making_directories():
        outcome = app.run(config_name=name, task_function=job, overrides=words).return_value
    return _exit_status([outcome])


def _sweep(app: Any, name: str, words: list[str]) -> int:
    words, jobs = overrides.expand(words, name)
    configs: list[DictConfig] = []
    # All are composed before the first is validated: names are wrong more often than values, and cost no import.
    for number, line in enumerate(jobs):
        with _naming_the_run(jobs, number):
            configs.append(overrides.compose_prepared(line, name, with_hydra=True))
    for number, cfg in enumerate(configs):
        with _naming_the_run(jobs, number):
            _validate(cfg)
    _refuse_twins(configs, jobs)
    if configs and all(cfg.plan for cfg in configs):
        _print_plans(configs)
        return 0
    with _making_directories():
        batches = app.multirun(config_name=name, task_function=job, overrides=words)
    # Sweepers other than Hydra's own need not return their jobs; the records tell then.
    outcomes = [result.return_value for batch in batches or [] for result in batch]
    return _exit_status(outcomes, total=len(jobs))


@contextmanager
def _naming_the_run(jobs: list[list[str]], number: int) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        place = f"run {number + 1} of {len(jobs)}: {_shown(jobs[number])}; none was started"
        raise UserError(f"{error} ({place})") from error


@contextmanager
def _making_directories() -> Iterator[None]:
    # Jobs hand back their own errors: what is left is Hydra failing to make their directories and logs.
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the run's directory ({_describe(error)}): give another one with hydra.run.dir=DIR "
            "(hydra.sweep.dir=DIR in a sweep), or start in another folder"
        ) from error


def _refuse_twins(configs: list[DictConfig], jobs: list[list[str]]) -> None:
    """Two runs of one configuration would write to one directory, perhaps at once."""
    seen: dict[str, list[str]] = {}
    for cfg, line in zip(configs, jobs, strict=True):
        run = naming.run_name(cfg)
        if run in seen:
            raise UserError(f"{_shown(seen[run])} and {_shown(line)} are the same configuration: name every run once")
        seen[run] = line


def _shown(line: list[str]) -> str:
    return " ".join(word.replace("'", "") for word in line if not word.startswith("hydra")) or "no overrides"


def _validate(cfg: DictConfig) -> None:
    from . import run

    run.validate(overrides.without_hydra(cfg))


def _print_plans(configs: list[DictConfig]) -> None:
    from .plan import plan

    print("\n\n".join(plan(overrides.without_hydra(cfg)) for cfg in configs))


def job(cfg: DictConfig) -> Outcome:
    """One run, in the directory that Hydra made for it; in a sweep perhaps in another process. Never raises."""
    from . import run

    directory = Path(HydraConfig.get().runtime.output_dir)
    log = logging.getLogger("alps_exp")
    try:
        run.run(cfg, directory)
    except UserError as error:
        log.exception("refused")
        return Outcome(directory.name, "refused", str(error) + _trace())
    except Exception as error:
        log.exception("failed")
        where = directory / "alps_exp.log"
        return Outcome(directory.name, "failed", f"{_describe(error)}; the trace is in {where}{_trace()}")
    return Outcome(directory.name, "completed")


def _exit_status(outcomes: list[Outcome], total: int = 1) -> int:
    failures = [outcome for outcome in outcomes if outcome.status != "completed"]
    for outcome in failures:
        _report(f"{outcome.name}: {outcome.message}" if total > 1 else outcome.message, FAILURE)
    if failures and total > 1:
        _report(f"{len(failures)} of {total} runs did not complete", FAILURE)
    if not failures:
        return 0
    return USER_ERROR if all(outcome.status == "refused" for outcome in failures) else FAILURE


def _report(message: str, status: int) -> int:
    if _full_error() and sys.exc_info()[0] is not None:
        print(redacted(traceback.format_exc()), file=sys.stderr)
    sys.stdout.flush()
    print(redacted(f"alps_exp: {message}"), file=sys.stderr)
    return status


def _trace() -> str:
    return f"\n{traceback.format_exc()}" if _full_error() else ""


def _full_error() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _describe(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
