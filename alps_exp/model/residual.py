"""Where a block's layers write to the residual stream.

A *writer* is a linear layer whose output is added to the hidden states that travel through the block (o_proj,
down_proj and their like); the other layers are *readers*. No family needs code of its own: while a block runs, the
additions themselves are watched. The output of a layer is followed through views, copies, constant factors, and a norm
between the layer and its addition; what it is added to is the stream, which is followed from the block's input on,
through norms too, since in some models (OPT-350m) they stand in it. Where two writers are added to each other first
(attention and MLP in parallel), both write to what their sum is added to.

The experts of a mixture write together: what their module gives is followed like the output of a layer, under the name
of the first of their layers that write. Where it gives the output of each (Llama 4), the sum over them is. What else is
added to it on its way (a shared expert behind a gate of its own) counts as part of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .layers import ExpertLayer, Layer

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_FACTORS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor, torch.ops.aten.mul.Scalar)
_SUM = torch.ops.aten.sum.dim_IntList
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


@dataclass(frozen=True, eq=False)
class Addition:
    """A writer's output on its way to the stream.

    Attributes:
        stream: (…, out) what it is added to, with the writers of the same sum that come before it.
        factor: (…, out) or a number: what the output is multiplied by on its way.
    """

    stream: Tensor
    factor: Tensor | float


@dataclass(frozen=True, eq=False)
class _Term:
    """What was made of the outputs of some layers: their sum, or one of them multiplied by a factor."""

    tensor: Tensor  # keeps the memory, by whose address the term is known, from being used again
    parts: Mapping[str, Tensor]  # the summands by layer
    factor: Tensor | float
    beside: Tensor | None = None  # what was added that no layer has written


def writers_of(layers: Mapping[str, Layer]) -> dict[str, str]:
    """The layers that may write to the stream, and the name by which what they write is known: their own, or that of
    the first of the experts that write together.

    Args:
        layers: of a block, by name.
    """
    first: dict[nn.Module, str] = {}
    found = {}
    for name, layer in layers.items():
        if not isinstance(layer, ExpertLayer):
            found[name] = name
        elif not layer.reads_hidden:
            found[name] = first.setdefault(layer.module, name)
    return found


class Additions(TorchDispatchMode):
    """Watches a block's forward for what its layers' outputs are added to. Use as a context.

    Args:
        block: the block.
        layers: in it, by name; of those that share a sum, the earlier ones come first.
        hidden: what the block is called with.
        wanted: names of layers.
        full: called once every layer of `wanted` was added to the stream, such as to end the forward.
        parts: modules known to give the output of a layer as it is, and the layer's name. What they do is not watched;
            they need not call the layer.

    Attributes:
        found: what the layers write, by the names of `writers_of`.
        outputs: (tokens, out) the sums over the experts of a module, by the same.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: Mapping[str, Layer],
        hidden: Tensor,
        wanted: Iterable[str] = (),
        full: Callable[[], None] = lambda: None,
        parts: Mapping[nn.Module, str] | None = None,
    ) -> None:
        super().__init__()
        self.found: dict[str, Addition] = {}
        self.outputs: dict[str, Tensor] = {}
        self._block, self._layers = block, layers
        self._stream = {_address(hidden): hidden}
        self._wanted, self._full, self._parts = set(wanted), full, dict(parts or {})
        self._terms: dict[int, _Term] = {}
        self._apart: dict[int, tuple[Tensor, str]] = {}  # outputs of experts that are summed outside of their module
        self._handles: list = []

    def __enter__(self):
        self._experts = {
            key for name, key in writers_of(self._layers).items() if isinstance(self._layers[name], ExpertLayer)
        }
        own = {self._layers[key].module: key for key in writers_of(self._layers).values()}
        linears = own | self._parts
        for module in self._block.modules():
            if module in self._parts:
                self._handles.append(module.register_forward_pre_hook(self._rest))
                self._handles.append(module.register_forward_hook(self._resume, always_call=True))
            if module in linears:
                self._handles.append(module.register_forward_hook(self._written(linears[module])))
            elif "norm" in type(module).__name__.lower():
                self._handles.append(module.register_forward_hook(self._normed))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        self._terms.clear()
        self._apart.clear()
        self._stream.clear()
        return super().__exit__(*error)

    def _rest(self, *_) -> None:
        super().__exit__(None, None, None)

    def _resume(self, *_) -> None:
        super().__enter__()

    def _written(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output) -> None:
            output = output if isinstance(output, Tensor) else output[0]
            layer = self._layers[name]
            if module is layer.module and isinstance(layer, ExpertLayer) and not layer.experts.sums:
                self._apart[_address(output)] = output, name
            else:
                self._write(output, name)

        return hook

    def _write(self, output: Tensor, name: str) -> None:
        self._remember(_Term(output, {name: output}, 1.0))
        if name in self._experts and name in self._wanted:  # something may be added to it in place
            self.outputs[name] = output.clone()

    def _normed(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """A norm between a layer and its addition multiplies each token by something of its own."""
        if not args or not isinstance(output, Tensor) or not isinstance(args[0], Tensor):
            return
        if self._in_stream(args[0]):
            self._stream[_address(output)] = output
        if (term := self._term(args[0])) is None:
            return
        if len(term.parts) == 1 and output.shape == args[0].shape:
            factor = output.float() / args[0].float()
            beside = None if term.beside is None else term.beside * factor
            self._remember(_Term(output, dict.fromkeys(term.parts, output), _times(term.factor, factor), beside))

    def whole(self, value: Tensor) -> frozenset[str]:
        """The layer whose output this is, as it is; none or several where it is something else."""
        term = self._term(value)
        plain = term is not None and term.beside is None and _plain(term.factor)
        return frozenset(term.parts) if plain else frozenset()

    def _remember(self, term: _Term) -> None:
        self._terms[_address(term.tensor)] = term

    def _in_stream(self, value: Tensor) -> bool:
        return _address(value) in self._stream

    def _term(self, value) -> _Term | None:
        return self._terms.get(_address(value)) if isinstance(value, Tensor) else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _ADDITIONS and isinstance(args[1], Tensor) and kwargs.get("alpha", 1) == 1:
            return self._added(function, args, kwargs)
        output = function(*args, **kwargs)
        if function in _COPIES and (term := self._term(args[0])) is not None:
            self._remember(_Term(output, term.parts, term.factor, term.beside))
        elif function in _COPIES and self._in_stream(args[0]):
            self._stream[_address(output)] = output
        elif function in _FACTORS:
            self._scaled(args, output)
        elif function is _SUM and list(args[1]) == [0]:
            _, name = self._apart.get(_address(args[0]), (None, None))
            if name is not None and args[0].shape[0] == self._layers[name].experts.count:
                self._write(output, name)
        return output

    def _scaled(self, args: tuple, output: Tensor) -> None:
        for one, other in (args[:2], args[1::-1]):
            constant = not isinstance(other, Tensor) or other.numel() == 1
            if constant and (term := self._term(one)) is not None and len(term.parts) == 1:
                factor = float(other)
                parts = {name: output for name in term.parts}
                beside = None if term.beside is None else term.beside * factor
                self._remember(_Term(output, parts, _times(term.factor, factor), beside))

    def _added(self, function, args: tuple, kwargs: dict) -> Tensor:
        one, other = args[:2]
        terms = [self._term(one), self._term(other)]
        alike = one.numel() == other.numel() and one.shape[-1:] == other.shape[-1:]
        if not alike or terms == [None, None]:
            return function(*args, **kwargs)
        inplace = function is torch.ops.aten.add_.Tensor
        if None not in terms:
            parts = {name: value.clone() for term in terms for name, value in term.parts.items()}
            output = function(*args, **kwargs)
            if all(_plain(term.factor) for term in terms):
                besides = [term.beside for term in terms if term.beside is not None]
                self._remember(_Term(output, parts, 1.0, sum(besides) if besides else None))
            return output
        term, stream = (terms[0], other) if terms[0] is not None else (terms[1], one)
        if not self._in_stream(stream):
            if self._experts.isdisjoint(term.parts) or not _plain(term.factor):
                return function(*args, **kwargs)
            beside = stream.clone() if term.beside is None else term.beside + stream
            output = function(*args, **kwargs)
            self._remember(_Term(output, term.parts, 1.0, beside))
            return output
        self._close(term, stream.clone() if inplace and stream is one else stream)
        output = function(*args, **kwargs)
        self._terms.pop(_address(output), None)
        self._stream[_address(output)] = output
        if self._wanted and self._wanted <= self.found.keys():
            self._full()
        return output

    def _close(self, term: _Term, stream: Tensor) -> None:
        stream = stream if term.beside is None else stream + term.beside.to(stream.dtype).reshape(stream.shape)
        for name in self._layers:
            if name in term.parts and name not in self.found:
                self.found[name] = Addition(stream, term.factor)
                stream = stream + term.parts[name].reshape(stream.shape) if len(term.parts) > 1 else stream


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _plain(factor: Tensor | float) -> bool:
    return not isinstance(factor, Tensor) and factor == 1.0


def _times(one: Tensor | float, other: Tensor | float) -> Tensor | float:
    return one * other
