"""Blocks' forward and backward passes as CUDA graphs, for models so small that launching a kernel takes longer than the
kernel.

What a training does in its blocks is the same in every step but for the numbers in memory: from the first one's input
to the last one's output, and from the gradient of that to gradients in the masters. The first pass finds out how blocks
are called; the next step runs as it is, and is recorded, replayed and compared with itself; from there on passes are
replayed. What is around the blocks (embedding, norm, head and loss) runs as it is, since models look at numbers there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from threading import get_ident

import torch
from torch import Tensor, nn

from ..numerics.graphs import recorded, stream_of
from .masters import Masters

# Weights of a block times tokens of a pass, from which on kernels take longer than launches.
_SMALL = 1 << 38
# By how much the loss and a gradient of a replayed step may differ from those of the same step as it runs: fused
# attention adds up in any order, which is rounding; what is wrong differs by its own size.
_LOSS, _GRADIENT = 1e-3, 0.05
_NOT = "steps are not replayed as CUDA graphs"


class Replayed:
    """Blocks whose passes are recorded and replayed for the length of a context.

    Args:
        blocks: each takes the hidden states that the one before returned, and nothing else that differs from pass to
            pass.
        masters: of the weights that are trained, in one process.

    Attributes:
        on: whether passes may be recorded or replayed; not on a CPU, of large models, and of those that cannot.
        due: whether a pass ran as it is that could have been recorded: `prove` is to be called before weights change.
        windows: that a pass must have to be recorded, and to be replayed.
        passes: that were replayed, since somebody set it to 0.
        notes: why passes that might have been recorded were not.
    """

    def __init__(self, blocks: Sequence[nn.Module], masters: Masters) -> None:
        self._blocks, self._masters = list(blocks), masters
        self.on = bool(self._blocks) and masters.device.type == "cuda"
        self.due, self.windows, self.passes = False, 0, 0
        self.notes: list[str] = []
        self._now = ""  # what becomes of this pass: "noted", "replayed", or it runs as it is
        self._proving = self._written = False
        self._form: tuple = ()  # shape and more of the first block's input, in passes that are recorded
        self._calls: list[tuple[tuple, dict]] = []  # the blocks' other arguments
        self._outputs: list[Callable[[Tensor], object]] = []
        self._forwards: list[Callable] = []
        self._kept: list[tuple[dict, Callable | None]] = []
        self._graphs: Graphs | None = None

    def __enter__(self) -> Replayed:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        modules = [part for block in self._blocks for part in block.modules()]
        self._hooked = any(getattr(part, kind) for part in modules for kind in kinds)
        for index, block in enumerate(self._blocks if self.on else ()):
            own = vars(block)
            self._kept.append((own, own.get("forward")))
            self._forwards.append(block.forward)
            own["forward"] = self._around(index)
        return self

    def __exit__(self, *error) -> None:
        for own, forward in self._kept:
            del own["forward"]
            if forward is not None:
                own["forward"] = forward
        self._kept, self._forwards = [], []
        self.drop()
        self.on = False

    def drop(self, why: str | None = None) -> bool:
        """Forget how blocks are called, and give recordings back; returns whether there were any. There will not be
        others then, or where a reason is given, which is noted."""
        held, self._graphs = self._graphs is not None, None
        self.on = self.on and not held and why is None
        self.due, self._calls, self._outputs, self._tensors = False, [], [], []
        self._last: Tensor | None = None  # what the block before returned
        if why is not None:
            self.notes.append(f"{_NOT}: {why}")
        if held:
            self._masters.forget()  # gradients are in the graphs' memory
            _give_back(self._masters.device)
        return held

    def prove(self, loss: Tensor, again: Callable[[], Tensor | None]) -> None:
        """Record the step whose gradients are in the masters, replay it, and keep the recording if it does the same.

        Args:
            loss: of the step.
            again: makes the step's gradients once more and returns its loss; None when device memory did not suffice.
        """
        values = list(self._masters.values.values())
        gradients = [value.grad for value in values]
        self._masters.forget()
        self.due, self._proving = False, True
        try:
            other = again()
        finally:
            self._proving = False
        if self.on and other is None:
            self.drop("the device's memory does not suffice")
        elif self._graphs is not None:
            apart = _apart([other], [loss]), _apart([value.grad for value in values], gradients)
            if not (apart[0] <= _LOSS and apart[1] <= _GRADIENT):  # nor if they are no numbers
                self.drop(
                    f"a replayed step's loss differs by {apart[0]:.2g} of itself from that of the same step as it "
                    f"runs, and a gradient by {apart[1]:.2g}"
                )
        self._masters.forget()
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        self.passes, self._written = 0, False

    def write(self) -> None:
        """What `Masters.write` does."""
        if self._graphs is None:
            return self._masters.write()
        self._graphs.write()
        if not self._written:
            made = [weight.clone() for weight in self._masters.weights]
            self._masters.write()
            if not all(torch.equal(*pair) for pair in zip(made, self._masters.weights, strict=True)):
                self.drop("weights that a replay has written are not those of the masters")
            self._written = True

    def _around(self, index: int) -> Callable:
        def around(*args, **kwargs):
            hidden, *more = args or (kwargs.pop("hidden_states"),)
            if index == 0:
                self._begin(hidden)
            now = self._now
            if index == len(self._blocks) - 1:
                self._now = ""
            if now == "noted":
                return self._noted(index, hidden, tuple(more), kwargs)
            if now != "replayed":
                return self._forwards[index](hidden, *more, **kwargs)
            if index == 0:
                hidden = _Replay.apply(hidden, self._anchor, self)
            return self._outputs[index](hidden)

        return around

    def _begin(self, hidden: Tensor) -> None:
        """What becomes of the pass that begins with these hidden states (windows, seqlen, width)."""
        self._now = ""
        if not (self.on and torch.is_grad_enabled() and len(hidden) == self.windows):
            return
        form = hidden.shape, hidden.dtype, hidden.requires_grad
        if len(self._calls) < len(self._blocks):
            weights = max(sum(weight.numel() for weight in block.parameters()) for block in self._blocks)
            self.on = weights * hidden[..., 0].numel() <= _SMALL
            self._form, self._calls, self._outputs = form, [], []
            self._now = "noted" if self.on and not self._hooked else ""
            if self.on and self._hooked:
                self.drop("a module has hooks, which would run once")
        elif form != self._form:
            return
        elif self._graphs is None and not self._proving:
            self.due = True
        elif self._graphs is None:
            self._record(hidden)
        elif [tensor.data_ptr() for tensor in self._tensors] != self._homes:
            self.drop("weights have moved")
        else:
            self._now = "replayed"

    def _noted(self, index: int, hidden: Tensor, args: tuple, kwargs: dict):
        """The block's output, in a pass that finds out how blocks are called and whether they can be recorded."""
        with _waiting() as waits:
            output = self._forwards[index](hidden, *args, **kwargs)
        parts = (output,) if isinstance(output, Tensor) else output
        why = None
        if waits:
            why = "a block waits for the device"
        elif any(part is not None for part in parts[1:]):
            why = "a block returns more than hidden states"
        elif index != len(self._calls) or (index and hidden is not self._last):
            why = "blocks are not called one after the other with nothing in between"
        if why is not None:
            self._now = ""
            self.drop(why)
            return output
        self._last = parts[0] if index < len(self._blocks) - 1 else None
        self._calls.append((args, kwargs))
        self._outputs.append(_form(output))
        return output

    def _chain(self, hidden: Tensor) -> Tensor:
        for forward, (args, kwargs) in zip(self._forwards, self._calls, strict=True):
            output = forward(hidden, *args, **kwargs)
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden

    def _record(self, hidden: Tensor) -> None:
        failed = None
        try:
            self._anchor = torch.zeros((), device=hidden.device, requires_grad=True)  # asks for a backward pass
            self._graphs = Graphs(self._chain, hidden, self._masters)
        except RuntimeError as error:  # of which running out of memory is one
            failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if failed is not None:  # outside the handler, whose traceback would hold on to tensors
            self._masters.forget()
            self.drop(failed)
            _give_back(hidden.device)
            return
        held = chain.from_iterable((*block.parameters(), *block.buffers()) for block in self._blocks)
        self._tensors = [*held, *self._masters.values.values()]  # what a recording reads and writes, and where it lies
        self._homes, self._now = [tensor.data_ptr() for tensor in self._tensors], "replayed"

    def forward(self, hidden: Tensor) -> Tensor:
        """The last block's output for the first one's input."""
        self.passes += 1
        return self._graphs.forward(hidden)

    def backward(self, gradient: Tensor) -> Tensor | None:
        """Gradients are added to the masters'; that of the first block's input, if it is asked for."""
        made = self._graphs.made
        before = [value.grad.clone() if value.grad is own else value.grad for value, own in made]
        first = self._graphs.backward(gradient)
        for (value, own), gone in zip(made, before, strict=True):
            value.grad = own if gone is None else gone.add_(own)  # of an earlier pass, or another use of the weight
        return first


class Graphs:
    """A pass through blocks, its backward pass, and the writing of weights, recorded.

    Args:
        passing: the first block's input → the last one's output.
        hidden: such an input.
        masters: to which gradients go.

    Attributes:
        made: masters' parameters that get gradients, with these, which the next backward pass overwrites.
    """

    def __init__(self, passing: Callable[[Tensor], Tensor], hidden: Tensor, masters: Masters) -> None:
        device = hidden.device
        self._graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
        forward, backward, writing = self._graphs
        pool, stream = torch.cuda.graph_pool_handle(), stream_of(get_ident(), device)
        self._in = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        torch.clear_autocast_cache()
        torch.cuda.synchronize(device)
        free, there = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if unused > there / 32 or free < there / 4:  # what earlier passes have left is of no use to a graph
            torch.cuda.empty_cache()
        with torch.cuda.stream(stream):
            _warm(device)
            with recorded(forward, pool):
                out = passing(self._in)
            self._gradient = torch.empty_like(out)
            with recorded(backward, pool), torch.autocast(device.type, enabled=False):
                out.backward(self._gradient)
            with recorded(writing, pool):
                masters.write()
        torch.clear_autocast_cache()
        self._out = out.detach()
        self.made = [(value, value.grad) for value in masters.values.values() if value.grad is not None]
        masters.forget()
        torch.cuda.synchronize(device)

    def forward(self, hidden: Tensor) -> Tensor:
        """The output, which the next pass overwrites."""
        self._in.detach().copy_(hidden)
        self._graphs[0].replay()
        return self._out.detach()

    def backward(self, gradient: Tensor) -> Tensor | None:
        """Fill what is `made`; the gradient of the input, if it is asked for."""
        self._gradient.copy_(gradient)
        self._graphs[1].replay()
        return self._in.grad

    def write(self) -> None:
        """Give weights the masters' values."""
        self._graphs[2].replay()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, anchor: Tensor, replayed: Replayed) -> Tensor:
        ctx.replayed = replayed
        return replayed.forward(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.replayed.backward(gradient), None, None


def _form(output: Tensor | tuple | list) -> Callable[[Tensor], object]:
    """How a block returns hidden states: alone, or first of a tuple or list of which the rest is None."""
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    kind, rest = type(output), [None] * (len(output) - 1)
    return lambda hidden: kind([hidden, *rest])


def _apart(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """The largest of ‖a - b‖ / ‖b‖, where what is small beside all of them counts as a hundredth of it."""
    if [one is None for one in ours] != [other is None for other in theirs]:
        return math.inf
    pairs = [(one.float(), other.float()) for one, other in zip(ours, theirs, strict=True) if one is not None]
    norms = torch.stack([torch.stack([(one - other).norm(), other.norm()]) for one, other in pairs])
    apart, size = norms.unbind(1)
    shares = apart / (size + 0.01 * size.norm()).clamp_min(torch.finfo(torch.float32).tiny)
    return float(shares.max())  # NaN where there is one


def _give_back(device: torch.device) -> None:
    """Memory of graphs that are no more."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@contextmanager
def _waiting() -> Iterator[list[str]]:
    """In what is run here the host waits for the GPU so often."""
    waits: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits += [str(one.message) for one in caught if "called a synchronizing" in str(one.message)]
    for one in caught:
        if "synchronizing" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _warm(device: torch.device) -> None:
    """Have libraries take their working memory for this stream, which no graph may own, in both directions' threads."""
    for dtype in (torch.float32, torch.bfloat16):
        made = torch.zeros(16, 16, dtype=dtype, device=device, requires_grad=True)
        with torch.autocast(device.type, enabled=False):
            torch.mm(made, made).sum().backward()
    torch.cuda.synchronize(device)
