"""What a block's layers are fed, collected group by group, under the measures against lack of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from ..base.errors import UserError
from ..calibration.capture import Accumulator, Collector, Enough, Group
from ..calibration.ladder import CALIBRATION, naming_the_step
from ..calibration.replay import Parts, Replay
from ..calibration.streams import DENSE, HELD_OUT
from ..layer.inputs import Inputs, Statistics
from ..layer.solver import Solver
from ..model.layers import ExpertLayer
from ..model.residual import Addition, Additions, writers_of
from ..numerics.precision import full_precision
from .block import BlockProblem


def order(block: BlockProblem) -> list[list[str]]:
    """The layers to prune as they are called, those that share an input together; found with one window.

    Also finds which of them write to the residual stream (`block.writers`), where the target asks for it.

    Raises:
        UserError: the target asks, and none does.
    """
    hidden = block.streams.calibration.at(0, 1)
    collector = Collector(block.layers, Statistics.NONE)
    collector.begin(hidden)
    try:
        with (
            naming_the_step(block.name),
            Additions(block.module, block.every, hidden) as additions,
            Parts(block.module, block.every, hidden, additions) as parts,
        ):
            block.forward(hidden)
    finally:
        collector.remove()
    if block.job.target.beside:
        if not additions.found:
            raise UserError(
                f"{block.name}: no layer is seen to add its output to the hidden states, which target=stream needs: "
                "give target=layer"
            )
        keys = writers_of(block.every)
        for name in block.layers:
            if isinstance(block.layers[name], ExpertLayer) and keys.get(name, name) not in {name, *additions.found}:
                raise UserError(
                    f"{name}: its experts are not seen to add their sum to the hidden states, which target=stream "
                    "needs: give target=layer, or leave them dense (layers.exclude=['*experts*'])"
                )
        block.writers = frozenset(name for name, key in keys.items() if key in additions.found)
    if not block.watched:
        held_out = block.streams.held_out
        size = block.streams.calibration.nbytes + (held_out.nbytes if held_out is not None else 0)
        block.replay = Replay(parts, size, block.model.device)
    collector.finish()
    groups = collector.order()
    for names in groups:
        apart = [name for name in names if not isinstance(block.layers[name], ExpertLayer)]
        if len(apart) > 1 and (writers := block.writers.intersection(apart)):
            raise UserError(
                f"{min(writers)} writes to the hidden states and shares its input with {len(names) - 1} other layers, "
                "which target=stream cannot fit: give target=layer, or exclude it (layers.exclude=[...])"
            )
    return groups


def capture(block: BlockProblem, names: Sequence[str]) -> list[Group]:
    """The groups of layers that share an input, with what is known of it: those that this process solves.

    Args:
        block: the block.
        names: of the layers.
    """
    tools = block.tools
    if not block.job.statistics:
        return _own(block, [([name], None) for name in names])
    if (groups := _from_others(block)) is not None:
        return thriftily(block, groups)
    while (groups := _collect(block, names)) is None:
        if block.replay.drop():
            continue
        if tools.team.size > 1:
            raise UserError(
                f"{block.name}: its statistics do not fit on each of {tools.team.size} devices: run on "
                "one (devices=1), which takes smaller steps then"
            )
        tools.ladder.for_statistics(block.name, block.streams.states, len(names))
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


def _collect(block: BlockProblem, names: Sequence[str]) -> list[Group] | None:
    """None when the device's memory does not suffice."""
    groups: list[Group] = []
    needed = block.tools.sharing.collected(block.index, block.job.statistics)
    step = -(-len(names) // block.tools.ladder.passes)
    for begin in range(0, len(names), step):
        layers = {name: block.layers[name] for name in names[begin : begin + step]}
        together = {name: block.layers[name] for name in names}
        collector = Collector(layers, needed, block.job.weighting, together)
        try:
            for first, last in block.streams.calibration.spans():
                _forward(block, collector, first, last)
            own = _own(block, collector.finish())
            groups += thriftily(block, _with_held_out(block, own))
        except torch.OutOfMemoryError:
            return None
        finally:
            collector.remove()
    return groups


class _Watch:
    """Hooks on writers that keep their last input, and watch what their outputs are added to, during one forward.

    Args:
        block: the block.
        writers: names of layers, those of `writers_of`.
        hidden: what it is called with.
        ending: whether the forward ends now, where all writers were added; never where somebody watches it.
        parts: modules that give a writer's output as it is, and its name.
    """

    def __init__(
        self,
        block: BlockProblem,
        writers: Sequence[str],
        hidden: Tensor,
        ending: Callable[[], bool],
        parts: Mapping[nn.Module, str],
    ) -> None:
        self._modules = {name: block.every[name].module for name in writers}
        self.inputs: dict[str, tuple[tuple, dict]] = {}
        self._ending = _never if block.watched else ending
        self.additions = Additions(block.module, block.every, hidden, writers, self._end, parts)

    def __enter__(self) -> _Watch:
        self._stack = ExitStack()
        for name, module in self._modules.items():
            handle = module.register_forward_pre_hook(self._keep(name), with_kwargs=True)
            self._stack.callback(handle.remove)
        self._stack.enter_context(self.additions)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _keep(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.inputs[name] = args, kwargs

        return hook

    def input(self, name: str) -> Tensor:
        """(…, in) of a linear layer."""
        args, kwargs = self.inputs[name]
        return args[0] if args else kwargs["input"]

    def _end(self) -> None:
        if self._ending():
            raise Enough


def _never() -> bool:
    return False


def _forward(block: BlockProblem, collector: Collector, first: int, last: int) -> None:
    """One batch of windows, by the numbers of the first and behind the last, through the block as far as it is needed;
    where a target compares with the dense model, through the dense block too."""
    hidden = block.streams.calibration.at(first, last)
    names, replay, windows = collector.names, block.replay, (CALIBRATION, first, last)
    writers = [name for name in names if name in block.writers]
    collector.begin(hidden, ending=not writers and not block.watched)
    if not writers:
        with suppress(Enough), replay.forward(windows, names, block.open):
            block.forward(hidden)
        return
    collector.resting = True
    keys = writers_of(block.every)
    written = list(dict.fromkeys(keys[name] for name in writers))
    dense = _forward_dense(block, writers, written, first, last)
    collector.resting = False
    with (
        suppress(Enough),
        replay.forward(windows, names, block.open),
        _Watch(block, written, hidden, lambda: collector.full, replay.writers) as pruned,
    ):
        block.forward(hidden)
    for name in written:
        layer = block.every[name]
        one, other = (watch.additions.found[name] for watch in (dense, pruned))
        if isinstance(layer, ExpertLayer):
            wanted = (dense.additions.outputs[name] - pruned.additions.outputs[name]).flatten(0, -2)
            wanted = wanted + _error(one, other).reshape(wanted.shape)
            collector.correct_experts(layer.module, *pruned.inputs[name], wanted)
            continue
        x = pruned.input(name)
        wanted = torch.nn.functional.linear(dense.input(name) - x, layer.weight)
        collector.of(name).correct(wanted + _error(one, other).reshape(wanted.shape), x)


def _forward_dense(
    block: BlockProblem, writers: Sequence[str], written: Sequence[str], first: int, last: int
) -> _Watch:
    """One batch of windows through the dense block, as far as it is needed; the last time to its end."""
    hidden, replay = block.streams.beside.at(first, last), block.replay
    windows = (f"{DENSE} {CALIBRATION}", first, last)
    others = block.open.difference(writers)
    more = not others.isdisjoint(block.writers)
    later = others if more else None
    with (
        block.dense(),
        suppress(Enough),
        replay.forward(windows, writers, later),
        _Watch(block, written, hidden, lambda: more, replay.writers) as watch,
    ):
        replay.finish(windows, block.forward(hidden))
    return watch


def _error(dense: Addition, pruned: Addition) -> Tensor:
    """h_d - h_p in units of the writer's output: without what that is multiplied by in the pruned model.

    A norm lets some outputs through a thousand times less than others (Gemma 3). To make up for what the stream lacks
    in them, they would have to grow until they are all that the norm sees: so an output is asked for the less, the
    less of it passes, e f / (f² + m²) in place of e / f, with m the mean of |f| over a token's outputs.
    """
    error = dense.stream - pruned.stream
    if not isinstance(pruned.factor, Tensor):
        return error / pruned.factor if pruned.factor != 1.0 else error
    factor = pruned.factor.reshape(error.shape)
    factor = torch.where(torch.isfinite(factor), factor, 0)
    passing = factor.square() + factor.abs().mean(-1, keepdim=True).square()
    return torch.where(passing > 0, error * factor / passing, 0).to(error.dtype)


def _with_held_out(block: BlockProblem, groups: list[Group]) -> list[Group]:
    """The same groups with the Gram matrix of the held-out windows, where there are such."""
    if block.streams.held_out is None or not block.job.losses or not groups:
        return groups
    leaders = {names[0]: block.layers[names[0]] for names, _ in groups}
    collector = Collector(leaders, Statistics.GRAM, block.job.weighting)
    called = [name for names, _ in groups for name in names]
    try:
        for first, last in block.streams.held_out.spans():
            hidden = block.streams.held_out.at(first, last)
            collector.begin(hidden, ending=not block.watched)
            with suppress(Enough), block.replay.forward((HELD_OUT, first, last), called, block.open):
                block.forward(hidden)
        grams = {names[0]: sums.inputs(names[0]).gram if sums.tokens else None for names, sums in collector.finish()}
    finally:
        collector.remove()
    return [Group(names, inputs.replaced(held_out=grams[names[0]])) for names, inputs in groups]


def _own(block: BlockProblem, groups: Sequence[tuple[list[str], Accumulator | None]]) -> list[Group]:
    """The groups that this process solves: of a team its part, with the sums of all."""
    team, solver = block.tools.team, block.job.solver
    pools = _pools(block, {sums.pool: names[0] for names, sums in reversed(groups) if sums is not None})
    costs = [sum(1 + solver.flops(*block.layers[name].shape) for name in names) for names, _ in groups]
    own = team.divide(groups, costs, solver.parts(block.model.device) if isinstance(solver, Solver) else 0)
    found = [
        Group(names, _inputs(names[0], sums, pools) if sums is not None else Inputs(name=names[0]))
        for names, sums in (groups[index] for index in own)
    ]
    if team.heavy is not None and (sums := groups[team.heavy][1]) is not None and Statistics.GRAM in sums.needed:
        names = groups[team.heavy][0]
        if team.heavy in own:
            place = own.index(team.heavy)
            inputs = found[place].inputs
            found[place] = found[place]._replace(inputs=inputs.replaced(elsewhere=team.elsewhere(inputs.gram)))
        else:
            inputs = _inputs(names[0], sums, pools)
            _help(block, names, inputs)
        block.measure_jointly(names, inputs)
    return found


def _pools(block: BlockProblem, first: Mapping[Accumulator | None, str]) -> dict[Accumulator, Inputs]:
    """What all experts of a module are handed together, in every process the sums of all.

    Args:
        block: the block.
        first: such sums → name of the first layer that is one of them; what belongs to no experts is None.

    Raises:
        UserError: they are handed nothing.
    """
    found = {}
    for pool, name in first.items():
        if pool is None:
            continue
        counts = torch.tensor([pool.tokens, pool.sequences], device=block.model.device)
        block.tools.team.add([*pool.tensors(), counts])
        pool.tokens, pool.sequences = counts.tolist()
        if not pool.tokens:
            raise UserError(
                f"{block.name}: its experts received no calibration tokens: use more windows (nsamples), or leave them "
                "dense (layers.exclude=['*experts*'])"
            )
        found[pool] = pool.inputs(f"all experts beside {name}")
    return found


def _inputs(name: str, sums: Accumulator, pools: Mapping[Accumulator, Inputs]) -> Inputs:
    found = sums.inputs(name)
    return found if sums.pool is None else found.beside(pools[sums.pool])


def _help(block: BlockProblem, names: list[str], inputs: Inputs) -> None:
    """Make this process's share of the work on another's group before its own groups."""
    team = block.tools.team
    if team.share:
        with full_precision():
            team.hand_over(block.job.solver.make_parts(inputs.shrunk(block.job.shrinkage), team.share), names)


def thriftily(block: BlockProblem, groups: Sequence[Group]) -> list[Group]:
    """The same groups, as the measures against lack of memory have them: in host memory, layers one by one."""
    ladder = block.tools.ladder
    if ladder.statistics_on_host:
        host = torch.device("cpu")
        priors = {inputs.prior: inputs.prior.to(host) for _, inputs in groups if inputs.prior is not None}
        groups = [Group(names, inputs.beside(priors.get(inputs.prior)).to(host)) for names, inputs in groups]
    if ladder.one_by_one:
        groups = [Group([name], inputs) for names, inputs in groups for name in names]
    return list(groups)
