"""The block loop, shared by every layer method: capture → solve → write → propagate, one block at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..allocation.selection import Selection
from ..base.clock import Stopwatch
from ..base.errors import UserError
from ..base.progress import Progress
from ..calibration.capture import Accumulator, Collector
from ..calibration.ladder import Thrift, naming_the_step
from ..calibration.sharing import Group, StatisticsCache
from ..layer.problem import LayerProblem, Statistics
from ..model.blocks import BlockModel
from ..model.hidden import HiddenStates
from ..model.structure import block_linears, blocks_of, count, find_blocks
from ..numerics.precision import full_precision
from .job import PruneJob
from .rows import LayerRow, PruneResult
from .solve import out_major, solve_layers
from .store import FinishedBlock, ProgressStore
from .team import Team


def linear_shapes(model: nn.Module, selection: Selection) -> dict[str, tuple[int, int]]:
    """All linear layers of the decoder blocks, name → (out, in); works on the meta device.

    Raises:
        UserError: no decoder blocks, or a weight that cannot be pruned and is not excluded: one that is no linear
            layer's, or that several modules share.
    """
    prefix, blocks = find_blocks(model)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shapes = {}
    for index, block in enumerate(blocks):
        for name, module in block_linears(block, f"{prefix}.{index}", selection.excluded).items():
            shapes[name] = tuple(out_major(module).shape)
            shared = [owner for owner in owners.get(id(module.weight), []) if owner != f"{name}.weight"]
            if shared and not selection.excluded(name):
                raise UserError(
                    f"{name} shares its weight with {shared[0].removesuffix('.weight')}, and cannot be pruned by "
                    "itself: leave both dense (layers.exclude=[...])"
                )
    return shapes


def other_names(model: nn.Module) -> list[str]:
    """What else a user may name as excluded although it is never pruned: leaf modules and weights."""
    leaves = [name for name, module in model.named_modules() if next(module.children(), None) is None]
    return leaves + [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def prune_blocks(
    model: BlockModel,
    job: PruneJob,
    store: ProgressStore | None = None,
    cache: StatisticsCache | None = None,
    team: Team | None = None,
) -> PruneResult:
    """Prune the model in place, block by block; of a streamed model, into the store's shards.

    Blocks behind the last one that has layers to prune are neither read nor run.

    Args:
        model: the model.
        job: what to do.
        store: where finished blocks are kept; those that it holds are taken from there and not solved again.
        cache: statistics of other runs with the same inputs, for a process that works alone.
        team: the processes that prune the same model together, each calling this with the same job.

    Raises:
        UserError: NaN or infinite weights (of a model in memory before any layer is pruned) or activations (the layer
            or block is named), a model that is another one block by block (`faithful`), a layer that the method cannot
            solve, or a device whose memory does not suffice after every measure.
    """
    if not job.patterns:
        return PruneResult()
    if model.source is None:
        check_weights(model.model, job.patterns)
    return _Loop(model, job, store, cache, team).run()


def check_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UserError for the first of these layers that has NaN or infinite weights."""
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        if not all(torch.isfinite(bound) for bound in weight.aminmax()):  # one pass, without a copy
            bad = int((~torch.isfinite(weight)).sum())
            raise UserError(f"{name}: the weight has {bad} NaN or infinite entries: check the checkpoint")


class _Loop:
    """The state of one pass over the blocks."""

    def __init__(
        self,
        model: BlockModel,
        job: PruneJob,
        store: ProgressStore | None,
        cache: StatisticsCache | None,
        team: Team | None,
    ) -> None:
        if model.source is not None and store is None:
            raise UserError("a streamed model's pruned blocks go to the run's directory: give resumable=true")
        self.model, self.job, self.store, self.cache, self.team = model, job, store, cache, team
        self.writes = store is not None and (team is None or team.leads)
        self.thrift = Thrift(**store.thrift) if store is not None else Thrift()
        self.hidden: HiddenStates | None = None
        self.held_out: HiddenStates | None = None
        self.result = PruneResult()
        self.indices = blocks_of(job.patterns, model.prefix)
        self.end = self.indices[-1] + 1
        self.last = -1  # the last block through which the windows go

    def run(self) -> PruneResult:
        finished = self.store.finished if self.store is not None else []
        watch = Stopwatch(self.model.device)
        if self.job.statistics:
            open_blocks = [index for index in self.indices if index >= len(finished)]
            self.last = max((i for i in open_blocks if not (self.cache and self.cache.holds(i))), default=-1)
        if self.last >= 0:
            self._embed()
            watch.lap("calibrate")
        progress = Progress(range(self.end), "pruning blocks", quiet=self.job.quiet)
        for index in progress:
            if index < len(finished):
                block = finished[index]
                self._restore(index, block)
                watch.lap("restore")
            else:
                if index == len(finished) and self.team is None:
                    self._rechunk(self.thrift.sizes, self.thrift.held_out_sizes)
                block, tensors = self._prune(index)
                watch.lap("blocks")
                self._keep(index, block, tensors)
                watch.lap("write")
            self._book(block)
            if losses := [row.relative_loss for row in block.rows if row.relative_loss is not None]:
                progress.note(f"mean relative loss {math.fsum(losses) / len(losses):.4g}")
        if self.store is not None:
            self.store.wait()
            watch.lap("write")
        watch.seconds.pop("blocks", None)  # the blocks have booked theirs
        self._add(watch.seconds)
        self.result.block_weights = count(self.model.blocks.parameters())
        self.result.notes = [*self.thrift.notes, *(self.cache.notes if self.cache is not None else [])]
        self.result.hidden_states = self.hidden.place if self.hidden is not None else None
        return self.result

    def _embed(self) -> None:
        with naming_the_step("embedding"):
            tokens = self.job.tokens if self.team is None else self.team.windows(self.job.tokens)
            options = (self.job.batch_size, self.thrift.place, self.last + 1)
            self.hidden = HiddenStates(self.model, tokens, *options)
            if self.job.held_out is not None:
                self.held_out = HiddenStates(self.model, self.job.held_out, *options)
        self._take_over("embedding")

    @property
    def _streams(self) -> list[HiddenStates]:
        """Of the windows that go through the blocks: those to calibrate on, and those held out."""
        return [stream for stream in (self.hidden, self.held_out) if stream is not None]

    def _rechunk(self, sizes: list[int], held_out_sizes: list[int]) -> None:
        """Forward the windows in the batches of an earlier attempt, where it has left such."""
        if self.hidden is not None and sizes:
            self.hidden.rechunk(sizes)
        if self.held_out is not None and held_out_sizes:
            self.held_out.rechunk(held_out_sizes)

    def _book(self, block: FinishedBlock) -> None:
        self.result.layers += block.rows
        self.result.block_seconds.append(sum(block.seconds.values()))
        self._add(block.seconds)

    def _add(self, seconds: Mapping[str, float]) -> None:
        for phase, spent in seconds.items():
            self.result.seconds[phase] = self.result.seconds.get(phase, 0.0) + spent

    def _take_over(self, where: str) -> None:
        if self.thrift.take_over(where, self._streams):
            self._remember_thrift()

    def _remember_thrift(self) -> None:
        if self.writes:
            self.store.keep_thrift(dataclasses.asdict(self.thrift))

    def _restore(self, index: int, block: FinishedBlock) -> None:
        """Take over a finished block, and bring the hidden states behind it."""
        dense = self.job.propagate == "dense"
        if self.model.source is not None:
            self.model.source.replace(index, self.store.shard(index))
        if self.hidden is not None:
            if self.team is None:  # a team's processes have each its own
                self._rechunk(block.sizes, block.held_out_sizes)
            with self.model.block(index, dense, ahead=index < self.end - 1) as module:
                if not dense:
                    self._load(index, module)
                self._advance(index, module)
        if dense or self.hidden is None:
            self._load(index, self.model.blocks[index])

    def _load(self, index: int, module: nn.Module) -> None:
        """Put a finished block's weights into a model that is in memory as a whole."""
        if self.model.source is None:
            prefix = f"{self.model.name(index)}."
            shard = load_file(self.store.shard(index))
            module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in shard.items()})

    def _prune(self, index: int) -> tuple[FinishedBlock, dict[str, Tensor]]:
        """Solve a block and advance the hidden states; the block's tensors are returned in host memory."""
        model, job = self.model, self.job
        watch, name = Stopwatch(model.device), model.name(index)
        propagating = self.hidden is not None and index < self.last
        sizes: list[list[int]] = []
        with model.block(index, ahead=index < self.end - 1) as block:
            watch.lap("transfer")
            linears = {
                layer: module
                for layer, module in block_linears(block, name, job.selection.excluded).items()
                if layer in job.patterns
            }
            groups = self._capture(index, block, linears)
            if propagating and job.propagate == "dense":
                sizes = self._advance(index, block)
            watch.lap("calibrate")
            rows = self._solve(index, linears, groups)
            if self.team is not None:
                rows = self.team.exchange({layer: module.weight.data for layer, module in linears.items()}, rows)
            rows.sort(key=lambda row: list(linears).index(row.name))
            watch.lap("solve")
            if propagating and job.propagate == "pruned":
                sizes = self._advance(index, block)
            watch.lap("propagate")
            if model.source is not None:
                tensors = self._own_tensors(name, block)
        if model.source is None:  # they are back in host memory, and need not be brought there twice
            tensors = self._own_tensors(name, model.blocks[index])
        watch.lap("transfer")
        return FinishedBlock(rows, watch.seconds, *sizes), tensors

    def _own_tensors(self, name: str, block: nn.Module) -> dict[str, Tensor]:
        """What the store is given of a block."""
        state = block.state_dict() if self.writes else {}
        return {f"{name}.{own}": tensor.detach().cpu() for own, tensor in state.items()}

    def _keep(self, index: int, block: FinishedBlock, tensors: dict[str, Tensor]) -> None:
        if not self.writes:
            return
        self.store.finish(index, tensors, block)
        if self.model.source is not None:
            self.model.source.replace(index, self.store.shard(index))

    def _advance(self, index: int, block: nn.Module) -> list[list[int]]:
        """Replace the hidden states by the block's output; the windows of each forward, for each stream."""
        with naming_the_step(self.model.name(index)):
            for stream in self._streams:
                stream.advance(self.model, index, block)
        self._take_over(self.model.name(index))
        return [list(stream.sizes) for stream in self._streams]

    def _capture(self, index: int, block: nn.Module, linears: Mapping[str, nn.Module]) -> list[Group]:
        """Groups of layers that share an input, each with the fields of their problems' statistics."""
        if not self.job.statistics or not linears:
            return self._own([([name], None) for name in linears], linears)
        if (groups := self._from_cache(index)) is not None:
            return self._thriftily(groups)
        while (groups := self._collect(index, block, linears)) is None:
            if self.team is not None:
                raise UserError(
                    f"{self.model.name(index)}: its statistics do not fit on each of {self.team.size} devices: run on "
                    "one (devices=1), which takes smaller steps then"
                )
            self.thrift.for_statistics(self.model.name(index), self._streams, len(linears))
            self._remember_thrift()
        if self.cache is not None and not self.thrift.notes:
            self.cache.keep(index, groups)
        return groups

    def _from_cache(self, index: int) -> list[Group] | None:
        """A block's groups as an earlier run has collected them; None without such, where windows have come."""
        if self.cache is None:
            return None
        try:
            groups = self.cache.load(index, self.model.device, needed=index > self.last)
        except torch.OutOfMemoryError:  # each group visits the device when its layers are solved
            groups = self.cache.load(index, torch.device("cpu"), needed=index > self.last)
        self.result.cached_blocks += [index] if groups is not None else []
        return groups

    def _collect(self, index: int, block: nn.Module, linears: Mapping[str, nn.Module]) -> list[Group] | None:
        """None when the device's memory does not suffice."""
        names, groups = list(linears), []
        needed = self.cache.collected(index) if self.cache is not None else self.job.statistics
        step = -(-len(names) // self.thrift.passes)
        for begin in range(0, len(names), step):
            collector = Collector({name: linears[name] for name in names[begin : begin + step]}, needed)
            try:
                for batch in self.hidden:
                    collector.begin(batch)
                    self.model.forward_block(index, block, batch)
                own = self._own(collector.finish(), linears)
                if self.held_out is not None:
                    self._add_held_out(own, index, block, linears)
                groups += self._thriftily(own)
            except torch.OutOfMemoryError:
                return None
            finally:
                collector.remove()
        return groups

    def _add_held_out(
        self, groups: list[Group], index: int, block: nn.Module, linears: Mapping[str, nn.Module]
    ) -> None:
        """Put the Gram matrix of the held-out windows beside each group's statistics."""
        collector = Collector({names[0]: linears[names[0]] for names, _ in groups}, Statistics.GRAM)
        try:
            for batch in self.held_out:
                collector.begin(batch)
                self.model.forward_block(index, block, batch)
            grams = {names[0]: sums.problem_fields()["gram"] for names, sums in collector.finish()}
        finally:
            collector.remove()
        for names, fields in groups:
            fields["held_out"] = grams[names[0]]

    def _own(self, groups: list[tuple[list[str], Accumulator | None]], linears: Mapping[str, nn.Module]) -> list[Group]:
        """The groups that this process solves: of a team its part, with the sums of all."""
        own = range(len(groups))
        if self.team is not None:
            flops = self.job.solver.flops
            costs = [sum(1 + flops(*out_major(linears[name]).shape) for name in names) for names, _ in groups]
            own = self.team.divide(groups, costs, self.job.solver.parts())
        found = [(names, sums.problem_fields() if sums is not None else {}) for names, sums in (groups[i] for i in own)]
        if self.team is not None and self.team.heavy is not None:
            if self.team.heavy in own:
                fields = found[list(own).index(self.team.heavy)][1]
                fields["elsewhere"] = self.team.elsewhere(fields["gram"])
            else:
                self._help(*groups[self.team.heavy])
        return found

    def _help(self, names: list[str], sums: Accumulator) -> None:
        """Make this process's share of the work on another's group before its own groups."""
        if self.team.share:
            fields = sums.problem_fields()
            problem = LayerProblem(fields["gram"].new_zeros(1, len(fields["gram"])), gram=fields["gram"], name=names[0])
            with full_precision():
                self.team.hand_over(self.job.solver.make_parts(problem, self.team.share), names)

    def _thriftily(self, groups: list[Group]) -> list[Group]:
        """The same groups, as the measures against lack of memory have them: in host memory, layers one by one."""
        if self.thrift.statistics_on_host:
            groups = [(names, _moved(fields, torch.device("cpu"))) for names, fields in groups]
        if self.thrift.one_by_one:
            groups = [([name], fields) for names, fields in groups for name in names]
        return groups

    def _solve(self, index: int, linears: Mapping[str, nn.Module], groups: list[Group]) -> list[LayerRow]:
        """Solve the groups and write the weights; a group's statistics are freed when it is done."""
        rows = []
        while groups:
            names, fields = groups[0]
            try:
                rows += solve_layers(
                    index, {name: linears[name] for name in names}, _moved(fields, self.model.device), self.job
                )
            except torch.OutOfMemoryError:
                solved = False
            else:
                solved = True
            del fields
            if solved:
                del groups[0]
                continue
            self.thrift.for_solving(self.model.name(index), self._streams, len(names))
            self._remember_thrift()
            groups[:] = self._thriftily(groups)
        return rows


def _moved(fields: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()}
