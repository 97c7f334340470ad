"""What a block's forwards have in common is computed once.

A block whose groups of layers are captured in order is run several times over the same windows, and beside the dense
model as often again. Between two of these runs only some of its layers have changed: the attention, once its layers are
pruned, gives what it gave before. Its output is kept, and put in its place. While its last layer is captured, that
layer's input is kept instead: once its weight is found, the output is its product with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.memory import free_device
from ..model.blocks import hidden_of
from ..model.layers import ExpertLayer, Layer
from ..model.residual import Additions

# Windows of one stream of hidden states: its name, the first window, and the one after the last.
Windows = tuple[str, int, int]

# A last layer's input is kept up to this multiple of the hidden states. The attention's is one to two of them; a
# feed-forward part's is three to four, and what it would spare is less.
_LARGEST = 2


@dataclass(frozen=True, eq=False)
class Last:
    """The layer that a part ends with.

    Attributes:
        name: of the layer.
        module: it, called with one tensor.
        size: of that tensor, in those of the hidden states.
        returned: what the part gives, of the layer's output.
    """

    name: str
    module: nn.Module
    size: float
    returned: Callable[[Tensor], object]


class Parts:
    """The modules in a block whose outputs may stand for them: each called once, and giving hidden states.

    Found during one forward, as a context. Where a part writes to the residual stream, its output must be that of its
    one writer, as it is; and what comes behind a part must not write over its output. Where the input of the layer that
    a part ends with is to stand for the others, the part must not write over that layer's output either.

    Args:
        block: the block.
        layers: its linear layers by name.
        hidden: what it is called with.
        additions: watches the same forward.

    Attributes:
        layers: names of the layers in each.
        front: names of these and of all layers that are called before a part ends.
        writers: the layer whose output is that of a part, where it writes to the residual stream, by name.
        lasts: the same, where its input may stand for the part's other layers.
    """

    def __init__(self, block: nn.Module, layers: Mapping[str, Layer], hidden: Tensor, additions: Additions) -> None:
        self.layers: dict[nn.Module, frozenset[str]] = {}
        self.front: dict[nn.Module, frozenset[str]] = {}
        self.writers: dict[nn.Module, str] = {}
        self.lasts: dict[nn.Module, Last] = {}
        self._layers = layers
        self._additions, self._size = additions, hidden.nbytes
        self._calls: dict[nn.Module, int] = {}
        self._names: dict[nn.Module, list[str]] = {}
        for name, layer in layers.items():
            self._names.setdefault(layer.module, []).append(name)
        names = self._names
        self._candidates = {
            child: own
            for child in block.children()
            if child not in names and (own := frozenset(n for m in child.modules() for n in names.get(m, ())))
        }
        self._seen: dict[nn.Module, tuple[frozenset[str], object, list[tuple[Tensor, int]]]] = {}
        self._passed: set[str] = set()
        self._called: dict[nn.Module, list[tuple[list[Tensor], list[tuple[Tensor, int]]]]] = {}

    def __enter__(self) -> Parts:
        self._handles = [child.register_forward_hook(self._look) for child in self._candidates]
        self._handles += [module.register_forward_hook(self._listen, with_kwargs=True) for module in self._names]
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()
        for part, (names, output, given) in self._seen.items():
            wrote = self._candidates[part] & self._additions.found.keys()
            if _untouched(given) and self._calls[part] == 1 and wrote == names and len(names) < 2:
                self.layers[part] = self._candidates[part]
                for name in names:
                    self.writers[part] = name
                    if (last := self._last(name, output)) is not None:
                        self.lasts[part] = last
        self._seen.clear()
        self._called.clear()

    def _look(self, part: nn.Module, args: tuple, output) -> None:
        self._calls[part] = self._calls.get(part, 0) + 1
        given = _tensors(output)
        if any(tensor.is_inference() for tensor in given):  # which do not tell whether they are written over
            return
        if given and given[0] is hidden_of(output) and sum(tensor.nbytes for tensor in given) == self._size:
            self._seen[part] = self._additions.whole(given[0]), output, _versions(given)
            self.front[part] = self._candidates[part] | self._passed

    def _listen(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        self._passed.update(self._names[module])
        given, made = _tensors((*args, *kwargs.values())), _tensors(output)
        if not any(tensor.is_inference() for tensor in made):
            self._called.setdefault(module, []).append((given, _versions(made)))

    def _last(self, name: str, output) -> Last | None:
        """What a part with this output ends with, where its layer's output is returned alone or before empty places."""
        module, given, kind = self._layers[name].module, hidden_of(output), type(output)
        rest, calls = () if output is given else output[1:], self._called.get(module, ())
        if isinstance(self._layers[name], ExpertLayer) or kind not in (tuple, list, type(given)):
            return None
        if len(calls) != 1 or any(value is not None for value in rest):
            return None
        inputs, made = calls[0]
        if len(inputs) != 1 or len(made) != 1 or not _untouched(made):
            return None
        own = made[0][0]
        if own.data_ptr() != given.data_ptr() or own.shape != given.shape or own.stride() != given.stride():
            return None
        returned = (lambda out: out) if output is given else lambda out: kind([out, *rest])
        return Last(name, module, inputs[0].nbytes / self._size, returned)


class Replay:
    """The outputs of parts that have not changed since, by the windows that they were computed for.

    A part that is kept must be given what it was given before: nothing in front of it may change any more. It is so,
    because groups of layers are captured and pruned in the order in which the block calls them
    (`pruning.capture.order`), and a part is kept once all layers that are called before it ends are pruned. Copies are
    kept: a module may use one piece of memory again and again.

    Args:
        parts: what may be kept; nothing if not given.
        size: bytes of the hidden states of all windows, each kept output's size.
        device: where they are kept, as far as they take no more than a quarter of what is free there.
    """

    def __init__(self, parts: Parts | None = None, size: int = 0, device: torch.device | None = None) -> None:
        # The attention's in the dense block and in the pruned one.
        room = 0.0 if parts is None else 0.25 * free_device(device)
        self._parts = parts if 2 * size <= room else None
        self._lasts: dict[nn.Module, Last] = {}
        if self._parts is not None:
            fits = {part: last for part, last in parts.lasts.items() if (2 + last.size) * size <= room}
            self._lasts = {part: last for part, last in fits.items() if last.size <= _LARGEST}
        self._kept: dict[Windows, dict[nn.Module, Callable]] = {}
        self._outputs: dict[Windows, Tensor] = {}

    def drop(self) -> bool:
        """Keep nothing any more; False where nothing was kept."""
        held = bool(self._kept or self._outputs)
        self._parts = None
        self._lasts = {}
        self._kept.clear()
        self._outputs.clear()
        return held

    @property
    def writers(self) -> dict[nn.Module, str]:
        """The parts whose output is that of a layer which writes to the residual stream, with its name."""
        return {} if self._parts is None else self._parts.writers

    @contextmanager
    def forward(
        self, windows: Windows, called: Iterable[str] = (), later: Iterable[str] | None = None
    ) -> Iterator[None]:
        """The block's forward within it leaves out what was kept for these windows.

        Args:
            windows: what it is run on.
            called: layers whose parts are to be run.
            later: layers whose weights will change; nothing is kept if not given. The output of a part is kept where
                none of them is called before the part ends; the input of the layer that the part ends with where only
                this one is, and it is among `called`.
        """
        left_out = self._left_out(windows, called)
        kept = self._kept.setdefault(windows, {}) if self._parts is not None else {}
        with ExitStack() as stack:
            for part in left_out:
                part.forward = kept[part]
                stack.callback(part.__dict__.pop, "forward")
            if self._parts is not None and later is not None:
                for part in self._parts.layers:
                    changing, last = self._parts.front[part].intersection(later), self._lasts.get(part)
                    if not changing:
                        stack.callback(part.register_forward_hook(_keeping(kept)).remove)
                    elif last is not None and changing == {last.name} and last.name in called:
                        hook = _keeping_input(kept, part, last)
                        stack.callback(
                            last.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove
                        )
            yield

    def _left_out(self, windows: Windows, called: Iterable[str]) -> list[nn.Module]:
        return [part for part in self._kept.get(windows, ()) if self._parts.layers[part].isdisjoint(called)]

    def finish(self, windows: Windows, output: Tensor) -> None:
        """Keep the block's output for these windows, in place of its parts'."""
        if self._parts is not None:
            self._kept.pop(windows, None)
            self._outputs[windows] = output.clone()

    def output(self, stream: str, begin: int, end: int, run: Callable[[], Tensor]) -> Tensor:
        """The block's output for these windows, of which nothing is kept any longer.

        Args:
            stream: the hidden states' name.
            begin: the first window.
            end: the one after the last.
            run: runs the block on them.
        """
        windows = (stream, begin, end)
        output = self._outputs.pop(windows, None)
        while output is None:
            try:
                with self.forward(windows):
                    output = run()
            except torch.OutOfMemoryError:
                if not self.drop():  # what is kept gives way before anything else does
                    raise
        self._kept.pop(windows, None)
        return output


def _returning(output):
    return lambda *args, **kwargs: output


def _keeping(kept: dict[nn.Module, Callable]) -> Callable:
    def hook(part: nn.Module, args: tuple, output) -> None:
        hidden = hidden_of(output)
        if output is hidden:
            output = hidden.clone()
        elif type(output) in (tuple, list):
            output = type(output)([hidden.clone(), *output[1:]])
        kept[part] = _returning(output)

    return hook


def _keeping_input(kept: dict[nn.Module, Callable], part: nn.Module, last: Last) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = tuple(map(_copy, args)), {key: _copy(value) for key, value in kwargs.items()}
        kept[part] = lambda *_, **__: last.returned(module(*given[0], **given[1]))

    return hook


def _tensors(output) -> list[Tensor]:
    values = output if isinstance(output, (tuple, list)) else [output]
    return [value for value in values if isinstance(value, Tensor)]


def _copy(value):
    return value.clone() if isinstance(value, Tensor) else value


def _versions(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    return [(tensor, tensor._version) for tensor in tensors]


def _untouched(versions: Iterable[tuple[Tensor, int]]) -> bool:
    """Whether nothing was written over since."""
    return all(tensor._version == version for tensor, version in versions)
