"""One process of a team (`devices=N`): prunes with the others and ends; the finished blocks are left on the disk."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main(request: Path) -> None:
    """Do what the file says: `config`, `directory`, `device`."""
    from ..base.errors import UserError
    from ..base.files import read_json

    asked = read_json(request)
    answer = request.with_name(f"answer-{os.environ['RANK']}.json")
    try:
        answer.write_text(json.dumps(_work(asked, request.parent)), encoding="utf-8")
    except Exception as error:
        kind = "UserError" if isinstance(error, UserError) else type(error).__name__
        failure = {"error": kind, "message": str(error), "trace": traceback.format_exc()}
        answer.write_text(json.dumps(failure), encoding="utf-8")
        os._exit(1)  # leaving the others in order would mean waiting for them


def _work(asked: dict, folder: Path) -> dict:
    import torch
    import torch.distributed as dist
    from transformers.utils import logging as transformers_logging

    from ..base.fallbacks import told
    from ..procedure.prune import prune_blocks
    from ..pruning.store import ProgressStore
    from ..pruning.team import Team
    from ..pruning.tools import Tools
    from .provenance import identity, peak_memory
    from .resume import open_store
    from .run import job_of
    from .settings import resolve
    from .together import FRESH
    from .workspace import Workspace

    directory, team = Path(asked["directory"]), Team.join(asked["device"])
    if not (team.leads and sys.stderr.isatty()):  # a bar of each process would be one among those of all others
        transformers_logging.disable_progress_bar()
    torch.manual_seed(asked["config"]["seed"])
    settings, workspace = resolve(asked["config"], whole=False), Workspace()
    if not team.leads:
        dist.barrier()  # one process at a time fetches and converts files
    tokens, _ = workspace.calibration(settings)
    text = folder / FRESH
    fresh = torch.load(text, weights_only=True) if text.is_file() else None
    model = workspace.model(settings, team.device, directory)
    if team.leads:
        dist.barrier()
    same = identity(settings, team.device, model.model.dtype, tokens, fresh)
    store = open_store(directory, same) if team.leads else ProgressStore(directory, same, writes=False)
    store.finished = team.tell(store.finished)
    job = job_of(settings, tokens, fresh, quiet=not team.leads)
    prune_blocks(model, job, Tools(store, team=team))
    team.leave()
    return {"peak_device_bytes": peak_memory(team.device)["peak_device_bytes"], "fallbacks": told()}


def _end_with(parent: int) -> None:
    """End when the process that started this one does, however and whenever it ends."""
    if sys.platform == "linux":  # at once, also while a library that is being loaded keeps threads from running
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() != parent:  # it has ended already
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))  # before anything is imported that takes seconds
    from ..base import garbage
    from ..base.terminal import settle

    settle()
    garbage.begin()
    main(Path(sys.argv[1]))
