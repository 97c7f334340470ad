"""The block loop, shared by every method of layer and block scope: capture → stages → measure → write → advance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safetensors.torch import load_file

from ..base.clock import Stopwatch
from ..base.progress import Progress
from ..calibration.ladder import CALIBRATION
from ..calibration.streams import FRESH, HELD_OUT, Streams
from ..model.blocks import BlockModel
from ..model.structure import blocks_of
from .block import BlockProblem
from .job import PruneJob
from .method import ModelMethod
from .rows import PruneResult
from .stages import Solve, Stage
from .store import FinishedBlock
from .tools import Tools


@dataclass(frozen=True)
class BlockLoop(ModelMethod):
    """One block after the other goes through the stages.

    The loop stops after the last block with a layer to prune. Blocks that the store holds are taken from there and not
    pruned again.
    """

    stages: Sequence[Stage] = (Solve(),)

    def run(self, model: BlockModel, job: PruneJob, tools: Tools) -> PruneResult:
        result, finished, watch = PruneResult(), tools.store.finished, Stopwatch(model.device)
        end = max(blocks_of(job.patterns, model.prefix)) + 1
        streams = _open(model, job, tools)
        watch.lap("calibrate")
        # Where all were pruned by an earlier attempt, or by the processes of a team, they are only taken over.
        progress = Progress(range(end), "pruning blocks", quiet=job.quiet or len(finished) >= end)
        for index in progress:
            if index < len(finished):
                _replay(model, index, finished[index], streams, tools)
                result.add(finished[index])
                watch.lap("restore")
            else:
                if index == len(finished):
                    streams.rechunk(tools.team.batches(tools.ladder.sizes))
                spent = Stopwatch(model.device)
                with model.block(index, ahead=index + 1 < end) as module:
                    block = BlockProblem(model, index, module, job, streams, tools, spent, len(self.stages) == 1)
                    for stage in self.stages:
                        stage.run(block)
                    done = block.finish()
                tensors = block.tensors()
                watch.lap("blocks")
                tools.store.finish(index, tensors, done)
                watch.lap("write")
                if model.source is not None and tools.store.writes:
                    model.source.replace(index, tools.store.shard(index))
                result.add(done)
                result.cached_blocks += [index] if block.cached else []
            progress.note(result.line())
        tools.store.wait()
        watch.lap("write")
        watch.seconds.pop("blocks", None)  # the blocks have booked theirs
        result.add_seconds(watch.seconds)
        result.notes = [*tools.ladder.notes, *tools.sharing.notes, *result.notes]
        result.hidden_states = streams.place
        return result


def _open(model: BlockModel, job: PruneJob, tools: Tools) -> Streams:
    """The hidden states before the first block, where any block needs them."""
    beside = job.beside
    indices = blocks_of(job.patterns, model.prefix) if job.statistics or beside else []
    unfinished = [index for index in indices if index >= len(tools.store.finished)]
    last = max((index for index in unfinished if beside or not tools.sharing.holds(index)), default=-1)
    if last < 0:
        return Streams(model, tools.ladder)
    windows = {CALIBRATION: tools.team.windows(job.tokens)}
    windows |= {HELD_OUT: job.held_out} if job.held_out is not None else {}
    windows |= {FRESH: tools.team.windows(job.fresh)} if job.fresh_blocks else {}
    # Beside the dense model, windows go through the last block too, to tell how far the two have come apart.
    blocks = last + 1 + beside
    return Streams.open(model, windows, job.batch_size, blocks, tools.ladder, job.propagate, beside)


def _replay(model: BlockModel, index: int, done: FinishedBlock, streams: Streams, tools: Tools) -> None:
    """Take over a finished block, and bring the hidden states behind it."""
    shard = tools.store.shard(index)
    if model.source is not None:
        model.source.replace(index, shard)
    streams.rechunk(tools.team.batches(done.sizes))
    if streams.any(dense=True):
        with model.block(index, dense=True, changing=False, ahead=not streams.any(dense=False)) as module:
            streams.advance(index, module, dense=True)
    if model.source is None:
        names = {name.removeprefix(f"{model.name(index)}."): tensor for name, tensor in load_file(shard).items()}
        model.blocks[index].load_state_dict(names)
    if streams.any(dense=False):
        with model.block(index, changing=False) as module:
            streams.advance(index, module, dense=False)
