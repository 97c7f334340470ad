"""One block on the device, with what a stage needs to work on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..base.clock import Stopwatch
from ..base.fallbacks import taken
from ..calibration.replay import Replay
from ..calibration.streams import Streams
from ..layer.inputs import Inputs
from ..layer.problem import LayerProblem
from ..layer.solver import Solution
from ..model.blocks import BlockModel
from ..model.layers import ExpertLayer, Layer
from ..model.structure import block_layers
from .job import PruneJob
from .joint import JointLosses
from .rows import LayerRow
from .solve import Solved, measured
from .store import FinishedBlock
from .tools import Tools


class BlockProblem:
    """A block to prune.

    Args:
        model: the model, of which this is a block.
        index: which one.
        module: the block, on the device.
        job: what is asked.
        streams: the hidden states before it.
        tools: what a model method works with.
        watch: the block's seconds by phase, begun before it was brought to the device.
        settled: a layer's weight is final once it was solved, so that its row is measured then and its statistics are
            freed; otherwise both wait for the last stage.

    Attributes:
        name: of the block.
        every: the block's linear layers by name, in the model's order.
        layers: those of them to prune.
        watched: somebody's hooks or replaced forwards see its modules run, so that no forward may be cut short.
        writers: those of them whose outputs are added to the residual stream, where a target asks for it.
        open: those of `layers` whose weights are still to be found.
        replay: what is kept of forwards for later ones.
        cached: its statistics were another run's.
        finished: what its finishing did (`Training`); empty without.
    """

    def __init__(
        self,
        model: BlockModel,
        index: int,
        module: nn.Module,
        job: PruneJob,
        streams: Streams,
        tools: Tools,
        watch: Stopwatch,
        settled: bool = True,
    ) -> None:
        watch.lap("transfer")
        self.model, self.index, self.module = model, index, module
        self.job, self.streams, self.tools = job, streams, tools
        self.name = model.name(index)
        self.every = block_layers(module, self.name, job.selection.excluded)
        self.layers: dict[str, Layer] = {name: self.every[name] for name in self.every if name in job.patterns}
        self.writers: frozenset[str] = frozenset()
        self.open = set(self.layers)
        self.replay = Replay()
        self.watched = any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            for module in module.modules()
        )
        self.watch = watch
        self.cached = False
        self.finished: dict = {}
        self._sizes: dict[str, list[int]] = {}
        self._settled = settled
        self._solved: list[Solved] = []
        self._rows: list[LayerRow] = []
        self._changing = False
        self._joint: JointLosses | None = None
        self._dense: dict[str, Tensor] | None = None
        self._tensors: dict[str, Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output for `hidden` (windows, seqlen, width)."""
        return self.model.forward_block(self.index, self.module, hidden)

    def begin_changing(self) -> None:
        """To be called before the first weight changes: what needs the dense block happens now, or keeps a copy."""
        if self._changing:
            return
        self._changing = True
        # Windows through the dense model stay in front of the block until its last group was captured.
        if self.job.beside or (self.job.in_order and self.job.propagate == "dense"):
            self._dense = {name: tensor.detach().clone() for name, tensor in self.module.named_parameters()}
        else:
            self._sizes |= self.streams.advance(self.index, self.module, dense=True)

    @contextmanager
    def dense(self) -> Iterator[nn.Module]:
        """The block with its dense weights for the length of the context."""
        if self._dense is None:
            yield self.module
            return
        pruned = {name: parameter.data for name, parameter in self.module.named_parameters()}
        try:
            for name, parameter in self.module.named_parameters():
                parameter.data = self._dense[name]
            yield self.module
        finally:
            for name, parameter in self.module.named_parameters():
                parameter.data = pruned[name]

    def advance_dense(self) -> None:
        """Bring the dense model's hidden states behind the block now; its dense weights are of no use afterwards."""
        self.begin_changing()
        if self._dense is not None:
            with self.dense() as module:
                self._sizes |= self.streams.advance(self.index, module, True, self.replay)
            self._dense = None
        if not self._settled:  # a later stage changes what was kept of the pruned block
            self.replay.drop()

    def solved(self, name: str, inputs: Inputs, solution: Solution, seconds: float = 0.0) -> Solved:
        """What a method of block scope hands to `settle` for one layer.

        Args:
            name: of the layer.
            inputs: what was captured of its inputs.
            solution: its pruned weight.
            seconds: wall time that it took.
        """
        layer = self.layers[name]
        problem = LayerProblem(layer.weight.to(torch.float32, copy=True), inputs.to(self.model.device), name)
        return Solved(layer, problem, problem, self.job.patterns[name], solution, seconds)

    def settle(self, solved: list[Solved]) -> None:
        """Write the weights of layers that were solved together; their rows are measured now or at the end."""
        weights = [found.weight for found in solved]
        if self._joint is not None and all(found.layer.name in self._joint.names for found in solved):
            self._joint.solved += solved
        elif self._settled:
            pairs = zip(solved, weights, strict=True)
            self._rows += [measured(self.index, found, weight, self.job) for found, weight in pairs]
        else:
            self._solved += solved
        self.begin_changing()
        for found, weight in zip(solved, weights, strict=True):
            found.layer.write(weight)

    def measure_jointly(self, names: Sequence[str], inputs: Inputs) -> None:
        """Let all processes of the team measure the losses of these layers, which one of them is about to solve, once
        their weights are exchanged; not where a later stage changes them, nor of experts.

        Args:
            names: of the layers.
            inputs: of theirs, with the sums of all.
        """
        if self._settled and not any(isinstance(self.layers[name], ExpertLayer) for name in names):
            self._joint = JointLosses(self.tools.team, names, inputs)

    def exchange(self, names: Sequence[str]) -> None:
        """Give the other processes of a team the weights of these layers that this one has solved, and take theirs; all
        are final then."""
        if self.tools.team.size > 1:
            joint, self._joint = self._joint, None
            if joint is not None:
                joint.prepare(self.layers)
            # What is sent lies in one piece, and an expert's weight may be every other column of a parameter.
            sent = {name: self.layers[name].weight.contiguous() for name in names}
            self.tools.team.exchange(sent)
            for name, weight in sent.items():
                self.layers[name].write(weight)
            if joint is not None:
                losses = joint.losses(self.layers)
                for found in joint.solved:
                    layer = found.layer
                    self._rows.append(measured(self.index, found, layer.weight, self.job, losses[layer.name]))
        self.open.difference_update(names)

    def finish(self) -> FinishedBlock:
        """Measure the layers, which no stage changes any more, and bring the hidden states behind the block."""
        late = [measured(self.index, found, found.layer.weight, self.job) for found in self._solved]
        order = {name: place for place, name in enumerate(self.layers)}
        rows = sorted(self.tools.team.gather(self._rows + late), key=lambda row: order[row.name])
        self._solved.clear()
        self.watch.lap("solve")
        self.advance_dense()
        self._sizes |= self.streams.advance(self.index, self.module, False, self.replay)
        drift = self.streams.drift(self.tools.team.gather)
        self.watch.lap("propagate")
        if self.model.source is not None:  # of a model in memory they are back there soon, and not brought twice
            self._tensors = self._own_tensors()
        fallbacks = list(dict.fromkeys(self.tools.team.gather(taken())))
        return FinishedBlock(rows, self.watch.seconds, self._sizes, drift, self.finished, fallbacks)

    def tensors(self) -> dict[str, Tensor]:
        """What the store is given of a finished block, in host memory; nothing in a process that does not write."""
        found = self._tensors if self._tensors is not None else self._own_tensors()
        self.watch.lap("transfer")
        return found

    def _own_tensors(self) -> dict[str, Tensor]:
        state = self.module.state_dict() if self.tools.store.writes else {}
        return {f"{self.name}.{own}": tensor.detach().cpu() for own, tensor in state.items()}
