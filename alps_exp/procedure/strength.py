"""`target.strength=auto`: how far the residual stream is drawn, chosen by the loss on held-out windows.

The model is pruned once with each of a few strengths, on a part of the calibration windows and without finishing, and
put back. The strength whose model has the smallest next-token loss on the held-out windows is the run's. It costs about
as much as pruning with all of them on that part: the solvers' work for each of them in full.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

from ..base.errors import UserError
from ..base.progress import Progress
from ..methods.target import StreamTarget
from ..model.blocks import BlockModel
from ..model.loss import next_token_loss
from ..pruning.job import PruneJob
from ..pruning.method import ModelMethod
from ..pruning.tools import Tools
from ..training.finish import Finish

STRENGTHS = (0.35, 0.5, 0.7)
WINDOWS = 16

_NAME = "strength"


def check_strength(held_out: int, devices: int, streamed: bool) -> None:
    """Raise UserError where no strength can be chosen.

    Args:
        held_out: number of held-out windows.
        devices: number of processes.
        streamed: the blocks are read from files one at a time.
    """
    if not held_out:
        raise UserError(
            "target.strength=auto chooses by the loss on held-out windows, and there are none: give data.holdout "
            "(8, say), or a number (target.strength=0.5)"
        )
    if devices > 1 or streamed:
        what = f"devices={devices}" if devices > 1 else "a model that is read from its files block by block"
        raise UserError(
            f"target.strength=auto prunes the model in memory several times in one process, which does not go with "
            f"{what}: give a number (target.strength=0.5)"
        )


def chosen(model: BlockModel, job: PruneJob, tools: Tools, method: ModelMethod) -> tuple[PruneJob, dict]:
    """The job with a number for the strength, and what it was chosen by; both as they are where a number is given.

    Args:
        model: the dense model, which is dense again afterwards.
        job: what is asked.
        tools: what an earlier attempt has chosen is taken from their store.
        method: prunes the model.
    """
    if not isinstance(job.target, StreamTarget) or job.target.strength != "auto":
        return job, {}
    check_strength(0 if job.held_out is None else len(job.held_out), tools.team.size, model.source is not None)
    if (kept := tools.store.recall(_NAME)) is None:
        found = _tried(model, job, method)
        tools.store.remember(_NAME, {}, json.dumps(found))
    else:
        found = json.loads(kept[1])
    return replace(job, target=replace(job.target, strength=found["chosen"])), found


def _tried(model: BlockModel, job: PruneJob, method: ModelMethod) -> dict:
    # All of the blocks, since a method may change more than the layers' weights.
    dense = {name: tensor.to("cpu", copy=True) for name, tensor in model.blocks.state_dict().items()}
    tokens, losses = job.tokens[:WINDOWS], {}
    trial = replace(job, tokens=tokens, held_out=None, fresh=None, finish=Finish(), losses=False, quiet=True)
    for strength in Progress(STRENGTHS, "choosing target.strength", quiet=job.quiet):
        try:
            method.run(model, replace(trial, target=replace(job.target, strength=strength)), Tools())
            loss = next_token_loss(model, job.held_out, job.batch_size, "", quiet=True)
        finally:
            model.blocks.load_state_dict(dense)
        losses[strength] = loss if math.isfinite(loss) else math.inf
    best = min(losses, key=losses.get)
    if losses[best] == math.inf:
        raise UserError(
            "target.strength=auto: the pruned model's loss on the held-out windows overflows with every strength: give "
            "dtype=float32, or a number (target.strength=0.5)"
        )
    return {
        "chosen": best,
        "held_out_loss": {f"{strength:g}": loss for strength, loss in losses.items()},
        "windows": len(tokens),
        "held_out_windows": len(job.held_out),
    }
