"""The command line: one run, a sweep, or a question about the configuration.

Everything that can be known beforehand is checked beforehand, for every job of a sweep, so that a typing mistake costs
one line and no model is loaded for it.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from .. import __version__
from ..base.errors import UserError
from ..base.redaction import redacted
from ..base.terminal import INTERRUPTED, interrupted, settle
from ..checkpoints.location import check_there
from ..runs import early
from . import completion, overrides, sweep
from .cell import Outcome, describe_error, full_error, single

if TYPE_CHECKING:
    from ..runs.settings import Settings

USER_ERROR, FAILURE = 2, 1


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Do what the command line asks and exit with 0, 1 (failed), 2 (user's mistake) or 130 (interrupted)."""
    settle()
    sys.exit(guarded(lambda: command(list(sys.argv[1:] if words is None else words))))


def guarded(action: Callable[[], int]) -> int:
    """The exit status that `action` returns, or that of its error, which is told in one line."""
    try:
        return action()
    except (Exception, KeyboardInterrupt) as error:
        if interrupted(error):
            return _report((isinstance(error, KeyboardInterrupt) and str(error)) or "interrupted", INTERRUPTED)
        if isinstance(error, UserError):
            return _report(str(error), USER_ERROR)
        hint = "" if full_error() else "; HYDRA_FULL_ERROR=1 shows the trace"
        return _report(describe_error(error) + hint, FAILURE)


def command(words: list[str]) -> int:
    """Do what the words ask and return the exit status.

    Raises:
        UserError: a mistake in the words, before anything was loaded.
    """
    args, parser = _parse(words)
    if args.version:
        print(f"alps_exp {__version__}")
        return 0
    if args.help:
        from .helping import main as explain

        return explain(words)
    name, given = args.config_name or "config", args.overrides
    try:
        here = os.getcwd()
    except OSError:
        raise UserError("the current folder has been removed: change to another one") from None
    if "${" in here:
        raise UserError(f"the current folder is {here}, and Hydra reads a reference in its ${{: start in another one")
    asked = " ".join(args.overrides) if args.shell_completion else ""
    if asked.startswith("query=") and (own := completion.arguments(_line(), Path("results/runs"))) is not None:
        print("\n".join(own))  # fish takes a line for each, the others words
        return 0
    with overrides.initialized(_config_dir(args.config_dir)):
        app: Any = GlobalHydra.instance().hydra
        if args.shell_completion:
            return _complete(app, name, args.overrides, asked)
        args.overrides = overrides.prepared(args.overrides, name)
        if args.multirun:
            return _sweep(app, name, given, args.overrides)
        if args.hydra_help:
            app.hydra_help(config_name=name, args_parser=parser, args=args)
            return 0
        if args.cfg or args.info:
            overrides.compose_prepared(args.overrides, name, complete=False)
            if args.cfg:
                app.show_cfg(name, args.overrides, args.cfg, args.package, args.resolve)
            else:
                app.show_info(args.info, config_name=name, overrides=args.overrides)
            return 0
        return _single(app, name, args.overrides)


def _parse(words: list[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = get_args_parser()
    # Ours in place of Hydra's version; and one line in place of a page of usage.
    parser._option_string_actions.pop("--version")
    parser.add_argument("--version", action="store_true", help="Show the version and exit")

    def refuse(message: str) -> NoReturn:
        hint = ": keys have no dashes, as in sparsity=0.7" if message.startswith("unrecognized arguments: --") else ""
        raise UserError(f"{message}{hint}; --help shows what can be given")

    parser.error = refuse  # type: ignore[method-assign]
    # Intermixed: -m may stand anywhere, also after an override.
    args = parser.parse_intermixed_args(words)
    if args.config_path or args.experimental_rerun:
        raise UserError("--config-path and --experimental-rerun are not supported; --config-dir adds a folder")
    asked = [args.cfg is not None, args.info is not None, args.shell_completion, args.multirun, args.run]
    if sum(asked) > 1:
        raise UserError("give one of --run, --multirun, --cfg, --info and --shell-completion")
    if args.resolve and not args.cfg:
        raise UserError("--resolve goes with --cfg")
    return args, parser


def _config_dir(given: str | None) -> Path | None:
    if given is None:
        return None
    folder = Path(os.path.expanduser(given)).absolute()
    if not os.path.isdir(folder):
        raise UserError(f"--config-dir {given}: there is no such folder")
    own = files("alps_exp.conf")
    for group in own.iterdir():  # Hydra would read the project's file instead
        for name in [f"{group.name}/{file.name}" for file in group.iterdir()] if group.is_dir() else [group.name]:
            if name.endswith(".yaml") and (folder / name).exists():
                raise UserError(f"--config-dir {given}: {name} is the name of a file of this project: rename it")
    return folder


def _line() -> str:
    return os.environ.get("COMP_LINE", "")


def _complete(app: Any, name: str, words: list[str], asked: str) -> int:
    """What sets a shell up, or what the line at hand may go on with."""
    found, before = io.StringIO(), ""
    if query := asked.startswith("query="):
        print("\n".join(completion.commands(_line())))
        line, before = completion.split(_line())
        try:
            # In the form that Hydra composes; the last word is still being typed.
            command, *settled, last = line.split(" ")
            settled = [word for word in settled if word and not word.startswith("-")]
            os.environ["COMP_LINE"] = " ".join([command, *overrides.prepared(settled), last])
        except (UserError, ValueError):
            return 0  # nothing to suggest after a mistake, and no place to say so
    else:
        print(completion.ZSH if asked == "install=zsh" else "")
    try:
        with redirect_stdout(found):
            app.shell_completion(config_name=name, overrides=words)
    except ValueError as error:
        raise UserError(f'{error}; as in: eval "$(alps-exp -sc install=bash)"') from error
    print("\n".join(completion.answered(found.getvalue(), before)) if query else found.getvalue())
    return 0


def _single(app: Any, name: str, words: list[str]) -> int:
    cfg = overrides.compose_prepared(words, name, with_hydra=True)
    if cfg.hydra.sweeper.get("params") or cfg.hydra.mode == RunMode.MULTIRUN:
        raise UserError("this is a grid of runs: add -m, as in python -m alps_exp -m +sweeps=demo")
    settings = _resolved(cfg)
    if cfg.plan:
        from .plan import plan

        print(plan(settings))
        return 0
    _refuse_other(cfg, settings)
    with _making_directories():
        job = partial(single, settings=settings)
        outcome = app.run(config_name=name, task_function=job, overrides=words).return_value
    return _exit_status([outcome])


def _sweep(app: Any, name: str, given: list[str], words: list[str]) -> int:
    start = time.time()
    words, jobs = overrides.expand(words, name)
    if pushing := [job for job in jobs if any(word.startswith("push=") for word in job)]:
        raise UserError(
            f"{next(word for word in pushing[0] if word.startswith('push='))} names one repository for all runs of a "
            "sweep: leave out -m, and push runs one by one"
        )
    runs = sweep.cells(jobs, name)
    if runs and all(cell.cfg.plan for cell in runs):
        print(sweep.planned(runs))
        return 0
    with _making_directories():
        if runs:
            outcomes = sweep.run(app, name, given, words, runs, start)
        else:  # another sweeper than Hydra's own, which decides as it goes and need not return its jobs
            batches = app.multirun(config_name=name, task_function=single, overrides=words)
            outcomes = [result.return_value for batch in batches or [] for result in batch]
    return _exit_status(outcomes, sweep=True)


def several(lines: Sequence[list[str]], table: bool = True) -> tuple[int, list[sweep.Cell]]:
    """The runs of several command lines as one sweep, in this order.

    Args:
        lines: words of each, without -m.
        table: print the table at the end, and how the runs ended.

    Returns:
        The exit status, and the runs.

    Raises:
        UserError: a mistake in the words, before anything was loaded.
    """
    start = time.time()
    with overrides.initialized():
        prepared = [overrides.prepared(words) for words in lines]
        jobs = [job for words in prepared for job in overrides.expand(words)[1]]
        runs = sweep.cells(jobs)
        with _making_directories():
            app = GlobalHydra.instance().hydra
            outcomes = sweep.run(app, "config", [], prepared[0], runs, start, table)
    return _exit_status(outcomes, sweep=True), runs


@contextmanager
def _making_directories() -> Iterator[None]:
    # Jobs hand back their own errors: what is left is Hydra failing to make their directories and logs.
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError("the disk is full: make space, and the same command goes on") from error
        raise UserError(
            f"cannot write the run's directory ({describe_error(error)}): give another one with hydra.run.dir=DIR "
            "(hydra.sweep.dir=DIR in a sweep), or start in another folder"
        ) from error


def _resolved(cfg: DictConfig) -> Settings:
    content = early.check(cfg)  # before what imports torch
    check_there(cfg["model"])
    if mistake := early.first_mistake([content]):
        raise UserError(mistake[1])
    from ..runs.settings import resolve

    settings = resolve(cfg)
    overrides.check_places(cfg)
    return settings


def _refuse_other(cfg: DictConfig, settings: Settings) -> None:
    """Raise UserError for a directory with a run of another configuration, before the log is opened there."""
    from ..runs.resume import refuse_other

    refuse_other(Path(str(cfg.hydra.run.dir)), settings.configuration)


def _exit_status(outcomes: list[Outcome], sweep: bool = False) -> int:
    failures = [outcome for outcome in outcomes if outcome.status not in ("completed", "left")]
    if failures and sweep:
        _report(f"{len(failures)} of {len(outcomes)} runs did not complete:", FAILURE)
    for outcome in failures:
        _report(f"{outcome.name}: {outcome.message}" if sweep else outcome.message, FAILURE)
    if not failures:
        return 0
    return USER_ERROR if all(outcome.status in ("refused", "held") for outcome in failures) else FAILURE


def _report(message: str, status: int) -> int:
    if full_error() and sys.exc_info()[0] is not None:
        print(redacted(traceback.format_exc()), file=sys.stderr)
    sys.stdout.flush()
    print(redacted(f"alps_exp: {message}"), file=sys.stderr)
    return status
