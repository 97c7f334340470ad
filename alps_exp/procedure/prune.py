"""A model is pruned: what the dense model tells first, then the method, then gradients on what it has left."""

from __future__ import annotations

from ..allocation.allocations import Uniform
from ..allocation.prunable import check_weights
from ..base.clock import Stopwatch
from ..base.errors import UserError
from ..base.fallbacks import taken
from ..layer.method import Method
from ..methods.recorded import forget
from ..model.blocks import BlockModel
from ..model.structure import count
from ..patterns import NM
from ..pruning.job import PruneJob
from ..pruning.loop import BlockLoop
from ..pruning.method import ModelMethod
from ..pruning.rows import PruneResult
from ..pruning.stages import Solve, Stage
from ..pruning.tools import Tools
from ..training.finish import Finish
from .distil import Teacher, distil
from .finish_block import FinishBlock
from .strength import chosen
from .weighing import notes_of_choices, reads, weighed

_UNFINISHED = Finish()


def lifted(method: Method, finish: Finish = _UNFINISHED) -> ModelMethod:
    """The method that prunes a whole model by this one: itself, or a block loop whose stage it is or is called by.

    Args:
        method: of any scope.
        finish: what is done to each block after that.
    """
    if isinstance(method, ModelMethod):
        return method
    after = (FinishBlock(finish.block, finish.block_minutes),) if finish.block is not None else ()
    return BlockLoop((method if isinstance(method, Stage) else Solve(), *after))


def prune_blocks(model: BlockModel, job: PruneJob, tools: Tools | None = None) -> PruneResult:
    """Prune the model by the job's method, whatever its scope; see `ModelMethod.run`."""
    if not job.patterns:
        return PruneResult()
    tools = tools or Tools()
    taken()  # what other runs of the process did
    if model.source is not None and not tools.store.keeps:
        raise UserError("a streamed model's pruned blocks go to the run's directory: give resumable=true")
    if model.source is None:
        check_weights(model.model, job.patterns)
    watch = Stopwatch(model.device)
    teacher = Teacher(model, job, tools) if job.finish.distil is not None else None
    watch.lap("teach")
    read, asked = reads(job), job.allocation.target_of(job.shared)
    job = weighed(model, job, tools)
    watch.lap("weigh")
    job, strength = chosen(model, job, tools, lifted(job.solver))
    watch.lap("strength")
    try:
        result = lifted(job.solver, job.finish).run(model, job, tools)
    finally:
        forget()  # of the layers' shapes, recordings hold memory
    if strength:
        result.strength = strength
        result.add_seconds({"strength": watch.seconds["strength"]})
    result.block_weights = count(model.blocks.parameters())
    if read:
        result.add_seconds({"weigh": watch.seconds["weigh"]})
    result.cached_passes, result.notes = list(tools.passes.shared), [*result.notes, *tools.passes.notes]
    if teacher is not None:
        distil(model, job, tools, teacher, result)
    result.notes += [line for line in taken() if line not in result.notes]
    if job.target.beside and all(row.target == "layer" for row in result.layers):
        result.notes.append("none was fitted to the stream: no layer that writes to the hidden states is pruned")
    if job.sensitivity.used and not read:
        result.notes.append("no backward pass was made: no rows compete, and no allocation reads the sensitivity")
    if isinstance(asked, NM):
        result.notes += notes_of_choices(asked, [row for row in result.layers if row.name in job.shared])
    if not isinstance(job.allocation, Uniform) and asked is None:
        kept = ", ".join(dict.fromkeys(pattern.written for pattern in job.patterns.values()))
        result.notes.append(
            f"the allocation divides unstructured sparsity, and N:M by allocation.choices, and leaves {kept} as it was "
            "asked for"
        )
    return result
