"""Work on one block: what a stage is, and the one that solves the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..base.errors import UserError
from ..calibration.capture import Accumulator, Collector, Group
from ..layer.inputs import Inputs, Statistics
from ..layer.problem import LayerProblem
from ..numerics.precision import full_precision
from .block import BlockProblem
from .solve import solve_layers


class Stage(ABC):
    """Work on one block. It leaves the block either done or as it was."""

    @abstractmethod
    def run(self, block: BlockProblem) -> None:
        """Do it."""


@dataclass(frozen=True)
class Solve(Stage):
    """Capture the layers' inputs, and prune each group of layers that share one by the job's solver."""

    def run(self, block: BlockProblem) -> None:
        groups = _capture(block)
        block.begin_changing()
        block.watch.lap("calibrate")
        _solve(block, groups)
        block.exchange()
        block.watch.lap("solve")


def _capture(block: BlockProblem) -> list[Group]:
    """The groups of layers that share an input, with what is known of it: those that this process solves."""
    tools, layers = block.tools, block.layers
    if not block.job.statistics or not layers:
        return _own(block, [([name], None) for name in layers])
    if (groups := _from_others(block)) is not None:
        return _thriftily(block, groups)
    while (groups := _collect(block)) is None:
        if tools.team.size > 1:
            raise UserError(
                f"{block.name}: its statistics do not fit on each of {tools.team.size} devices: run on "
                "one (devices=1), which takes smaller steps then"
            )
        tools.ladder.for_statistics(block.name, block.streams.states, len(layers))
    if not tools.ladder.notes:
        tools.sharing.keep(block.index, groups)
    return groups


def _from_others(block: BlockProblem) -> list[Group] | None:
    """The block's groups as an earlier run has collected them; None without such, where windows have come."""
    sharing, needed = block.tools.sharing, not block.streams.reach(block.index)
    try:
        groups = sharing.load(block.index, block.model.device, needed)
    except torch.OutOfMemoryError:  # each group visits the device when its layers are solved
        groups = sharing.load(block.index, torch.device("cpu"), needed)
    block.cached = groups is not None
    return groups


def _collect(block: BlockProblem) -> list[Group] | None:
    """None when the device's memory does not suffice."""
    names, groups = list(block.layers), []
    needed = block.tools.sharing.collected(block.index, block.job.statistics)
    step = -(-len(names) // block.tools.ladder.passes)
    for begin in range(0, len(names), step):
        collector = Collector({name: block.layers[name].module for name in names[begin : begin + step]}, needed)
        try:
            for batch in block.streams.calibration:
                collector.begin(batch)
                block.forward(batch)
            own = _own(block, collector.finish())
            groups += _thriftily(block, _with_held_out(block, own))
        except torch.OutOfMemoryError:
            return None
        finally:
            collector.remove()
    return groups


def _with_held_out(block: BlockProblem, groups: list[Group]) -> list[Group]:
    """The same groups with the Gram matrix of the held-out windows, where there are such."""
    if block.streams.held_out is None:
        return groups
    leaders = {names[0]: block.layers[names[0]].module for names, _ in groups}
    collector = Collector(leaders, Statistics.GRAM)
    try:
        for batch in block.streams.held_out:
            collector.begin(batch)
            block.forward(batch)
        grams = {names[0]: sums.inputs(names[0]).gram for names, sums in collector.finish()}
    finally:
        collector.remove()
    return [Group(names, inputs.replaced(held_out=grams[names[0]])) for names, inputs in groups]


def _own(block: BlockProblem, groups: Sequence[tuple[list[str], Accumulator | None]]) -> list[Group]:
    """The groups that this process solves: of a team its part, with the sums of all."""
    team, solver = block.tools.team, block.job.solver
    costs = [sum(1 + solver.flops(*block.layers[name].shape) for name in names) for names, _ in groups]
    own = team.divide(groups, costs, solver.parts())
    found = [
        Group(names, sums.inputs(names[0]) if sums is not None else Inputs(name=names[0]))
        for names, sums in (groups[index] for index in own)
    ]
    if team.heavy in own:
        place = own.index(team.heavy)
        inputs = found[place].inputs
        found[place] = found[place]._replace(inputs=inputs.replaced(elsewhere=team.elsewhere(inputs.gram)))
    elif team.heavy is not None:
        _help(block, *groups[team.heavy])
    return found


def _help(block: BlockProblem, names: list[str], sums: Accumulator) -> None:
    """Make this process's share of the work on another's group before its own groups."""
    team = block.tools.team
    if team.share:
        inputs = sums.inputs(names[0])
        problem = LayerProblem(inputs.gram.new_zeros(1, inputs.width), inputs, names[0])
        with full_precision():
            team.hand_over(block.job.solver.make_parts(problem, team.share), names)


def _thriftily(block: BlockProblem, groups: Sequence[Group]) -> list[Group]:
    """The same groups, as the measures against lack of memory have them: in host memory, layers one by one."""
    ladder = block.tools.ladder
    if ladder.statistics_on_host:
        groups = [Group(names, inputs.to(torch.device("cpu"))) for names, inputs in groups]
    if ladder.one_by_one:
        groups = [Group([name], inputs) for names, inputs in groups for name in names]
    return list(groups)


def _solve(block: BlockProblem, groups: list[Group]) -> None:
    """Solve the groups and write the weights; a group's statistics are freed when it is done."""
    while groups:
        names, inputs = groups[0]
        try:
            block.settle(solve_layers([block.layers[name] for name in names], inputs.to(block.model.device), block.job))
        except torch.OutOfMemoryError:
            solved = False
        else:
            solved = True
        del inputs
        if solved:
            del groups[0]
            continue
        block.tools.ladder.for_solving(block.name, block.streams.states, len(names))
        groups[:] = _thriftily(block, groups)
