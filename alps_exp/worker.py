"""One process of a team (`devices=N`): prunes with the others and ends; the finished blocks are left on the disk."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from .environment import peak_memory
from .errors import UserError
from .loop import prune_blocks
from .progress_store import ProgressStore
from .registry import build
from .resume import identity, open_store
from .run import dtype_of, job_of, layer_patterns
from .streams import settle
from .team import Team
from .workspace import Workspace


def main(request: Path) -> None:
    """Do what the file says: `config`, `config_hash`, `directory`, `device`."""
    _end_with(os.getppid())
    asked = json.loads(request.read_text(encoding="utf-8"))
    answer = request.with_name(f"answer-{os.environ['RANK']}.json")
    try:
        answer.write_text(json.dumps(_work(asked)), encoding="utf-8")
    except Exception as error:
        kind = "UserError" if isinstance(error, UserError) else type(error).__name__
        failure = {"error": kind, "message": str(error), "trace": traceback.format_exc()}
        answer.write_text(json.dumps(failure), encoding="utf-8")
        os._exit(1)  # leaving the others in order would mean waiting for them


def _work(asked: dict) -> dict:
    cfg, directory = asked["config"], Path(asked["directory"])
    team = Team.join(asked["device"])
    torch.manual_seed(cfg["seed"])
    workspace, patterns = Workspace(), layer_patterns(cfg)
    if not team.leads:
        dist.barrier()  # one process at a time fetches and converts files
    tokens, _ = workspace.calibration(cfg)
    model = workspace.model(cfg, team.device, dtype_of(cfg, team.device), directory)
    if team.leads:
        dist.barrier()
    same = identity(cfg, asked["config_hash"], team.device, model.model.dtype, tokens)
    store = open_store(directory, same) if team.leads else ProgressStore(directory, same)
    store.finished = team.tell(store.finished)
    prune_blocks(model, job_of(cfg, build(cfg["method"]), patterns, tokens, quiet=not team.leads), store, team=team)
    team.leave()
    return {"peak_device_bytes": peak_memory(team.device)["peak_device_bytes"]}


def _end_with(parent: int) -> None:
    """End when the process that started this one does, however it ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    settle()
    main(Path(sys.argv[1]))
