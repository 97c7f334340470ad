"""The mask of another checkpoint: what is zero there is pruned, the other weights keep their values.

With `refit` they become the best ones on that mask, wherever it comes from. A layer's mask is the tensor of its name
there, in safetensors or `.bin` files or in the packed form; names may differ by what stands before them, as in
`model.decoder.layers.0…` and `decoder.layers.0…`. Where a family stores its experts in another way, the model's class
tells which tensors they are in.

The sparsity of the run says what the mask is expected to have: an unstructured one each layer's share of zeros within
`tolerance`, another pattern zeros where it has them, or more. The record's measured sparsity is the mask's. All masks
are read and looked at before the run begins.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from alps_exp.base.checks import local_path, require
from alps_exp.base.errors import UserError
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.layer.solver import LayerSolver, Solution, Solver
from alps_exp.model.layers import ExpertLayer, find_layer
from alps_exp.patterns import Pattern, Unstructured

_DTYPES = ("F64", "F32", "F16", "BF16", "BOOL")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FITTING: set[tuple] = set()  # masks, with what was asked of them, that were found to fit


@dataclass(frozen=True)
class Given(LayerSolver):
    """The mask of a checkpoint.

    Attributes:
        mask: folder of the checkpoint with zeros, or its name on the hub (OWNER/NAME).
        tolerance: how far from the sparsity a layer's share of zeros may be.
    """

    statistics: ClassVar[Statistics] = Statistics.NONE
    selection: ClassVar[str] = "mask"
    kinds: ClassVar[frozenset[str] | None] = None

    mask: str | None = None
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        require("method.tolerance", self.tolerance, float, 0, 1)
        if not isinstance(self.mask, str) or not self.mask:
            raise UserError(f"method.mask={self.mask} is not allowed: give method.mask=FOLDER, a checkpoint with zeros")
        if not self._on_the_hub and not local_path("method.mask", self.mask).is_dir():
            raise UserError(
                f"method.mask={self.mask} is no folder: give that of a checkpoint with zeros, or OWNER/NAME on the hub"
            )

    @property
    def _on_the_hub(self) -> bool:
        return bool(_HUB_NAME.fullmatch(self.mask)) and not local_path("method.mask", self.mask).is_dir()

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies; one of the hub is downloaded, once."""
        from alps_exp.checkpoints.checkpoint import PRECEDENCE
        from alps_exp.checkpoints.hub import checkpoint_folder

        if self._on_the_hub:
            return checkpoint_folder(
                self.mask, None, PRECEDENCE, "or give the folder of a download (method.mask=FOLDER)"
            )
        return local_path("method.mask", self.mask)

    def for_layers(self, patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]]) -> Solver:
        super().for_layers(patterns, shapes)
        entries, read = _opened(self.folder)
        known = _keys({*patterns, *shapes}, entries)
        found = {name: known[name] for name in patterns}
        # What an expert's parameter is made of, only the model tells.
        apart = tuple(
            name for name, keys in found.items() if not keys and re.search(r"\.\d+\.(gate|up|down)_proj$", name)
        )
        alone = set(apart)
        keys = {name: self._key(name, found[name]) for name in patterns if name not in alone}
        stored = {name: tuple(entries[key].shape) for name, key in keys.items()}
        # Whether the tensors are (in, out), as GPT-2's are: its square layers do not show it, the others do.
        pairs = {(tuple(entries[key].shape), shape) for name, shape in shapes.items() for key in known[name]}
        turned = any(stored == shape[::-1] != shape for stored, shape in pairs)
        for name, key in keys.items():
            if stored[name] != (shapes[name][::-1] if turned else shapes[name]):
                raise UserError(
                    f"method.mask={self.mask}: {key} is {stored[name]}, and {name} of the model is {shapes[name]}: "
                    "give a pruned copy of this model"
                )
            if entries[key].dtype not in _DTYPES:
                raise UserError(
                    f"method.mask={self.mask} stores {key} as {entries[key].dtype}: give an unquantised checkpoint"
                )
        masks = Masks(self, {name: partial(read, key) for name, key in keys.items()}, turned, apart)
        seen = (self.mask, self.tolerance, tuple(sorted(self.digests().items())), tuple(patterns.items()), turned)
        if seen not in _FITTING:  # of a sweep's runs the first one looks
            for name in keys:
                masks.support(name, patterns[name])
            _FITTING.add(seen)
        return masks

    def digests(self) -> dict[str, str]:
        from alps_exp.checkpoints.checkpoint import fingerprint

        return {f"mask {name}": value for name, value in fingerprint(self.folder).items()}

    def _key(self, name: str, found: Sequence[str]) -> str:
        if len(found) != 1:
            what = f"has {' and '.join(sorted(found)[:2])} for" if found else "lacks"
            raise UserError(
                f"method.mask={self.mask} {what} {name}.weight: give a pruned copy of this model, or leave the layer "
                "out (layers.exclude=[...])"
            )
        return found[0]

    def _solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        raise UserError(
            f"{problem.name}: method=given finds masks by the names of a model's layers: use prune_model or the command"
        )


@dataclass(frozen=True)
class Masks(LayerSolver):
    """The masks of a model's layers.

    Attributes:
        given: what was asked.
        read: layer name → function that reads the tensor.
        turned: whether they are (in, out).
        apart: experts' layers that the checkpoint has no tensor of their name for.
    """

    statistics: ClassVar[Statistics] = Given.statistics
    selection: ClassVar[str] = Given.selection
    kinds: ClassVar[frozenset[str] | None] = None

    given: Given
    read: Mapping[str, Callable[[], Tensor]] = field(repr=False)
    turned: bool
    apart: tuple[str, ...] = ()

    def for_model(self, model: nn.Module, patterns: Mapping[str, Pattern]) -> Masks:
        if not self.apart:
            return self
        entries, read = _opened(self.given.folder)
        layers = {name: find_layer(model, name) for name in self.apart}
        held = _held(model, entries, read)
        for name, layer in layers.items():
            if not isinstance(layer, ExpertLayer) or held(layer.stored) is None:
                self.given._key(name, ())  # it lacks them
            if (shape := tuple(held(layer.stored).shape)) != tuple(layer.held.shape):
                raise UserError(
                    f"method.mask={self.given.mask}: {layer.stored} is {shape} there, and {tuple(layer.held.shape)} in "
                    "the model: give a pruned copy of this model"
                )
        # Read as a layer of its own, which is not turned.
        views = {name: partial(_view, layer, held, self.turned) for name, layer in layers.items()}
        masks = replace(self, read={**self.read, **views}, apart=())
        for name in layers:
            masks.support(name, patterns[name])
        return masks

    def support(self, name: str, pattern: Pattern) -> Tensor:
        """(out, in) bool, on the CPU.

        Raises:
            UserError: no zeros, or others than the pattern's.
        """
        support = self.read[name]() != 0
        support = support.T if self.turned else support
        what = f"method.mask={self.given.mask}: the mask of {name}"
        zeros = 1 - int(support.count_nonzero()) / support.numel()
        if zeros == 0:
            raise UserError(f"{what} has no zeros: give a pruned checkpoint, or leave it out (layers.exclude=[...])")
        if not isinstance(pattern, Unstructured):
            if not pattern.holds(support):
                raise UserError(f"{what} is not {pattern}: give its sparsity, {zeros:.2g}, or its own pattern")
        elif abs(zeros - pattern.sparsity) > self.given.tolerance:
            raise UserError(
                f"{what} has {zeros:.3g} zeros, and sparsity={pattern} was asked for: give sparsity={zeros:.2g}, or "
                f"method.tolerance={abs(zeros - pattern.sparsity) + 0.005:.2f} where layers differ"
            )
        return support

    def digests(self) -> dict[str, str]:
        return self.given.digests()

    def _solve(self, problem: LayerProblem, pattern: Pattern) -> Solution:
        support = self.support(problem.name, pattern).to(problem.weight.device)
        return Solution(weight=problem.weight.masked_fill(~support, 0), support=support)


def _held(model: nn.Module, entries: Mapping, read: Callable[[str], Tensor]) -> Callable[[str], Tensor | None]:
    """A function that gives the checkpoint's values of a parameter of the model, None where it has none; it keeps the
    last two, since a module's experts come one after the other."""
    from alps_exp.checkpoints.checkpoint import match

    found = match(model, entries)

    @lru_cache(maxsize=2)
    def held(name: str) -> Tensor | None:
        if name in found.keys:
            return read(found.keys[name])
        merged = found.merged.get(name)
        return None if merged is None else merged.made({key: read(key) for key in merged.keys})

    return held


def _view(layer: ExpertLayer, held: Callable[[str], Tensor], turned: bool) -> Tensor:
    own = layer.view(held(layer.stored))
    return own.T if turned else own


def _keys(names: Iterable[str], entries: Mapping) -> dict[str, list[str]]:
    """Name → the keys under which a checkpoint may hold the layer's weight: one, if all is well."""
    ends = defaultdict(list)
    for key in entries:
        parts = key.split(".")
        for start in range(1, len(parts)):
            ends[".".join(parts[start:])].append(key)
    found = {}
    for name in names:
        parts = f"{name}.weight".split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        tails = (".".join(parts[start:]) for start in range(number))
        found[name] = next(([key] for key in tails if key in entries), None) or ends.get(f"{name}.weight", [])
    return found


def _opened(folder: Path) -> tuple[Mapping, Callable[[str], Tensor]]:
    """The tensors of a checkpoint without their values, by key, and a function that reads one."""
    from alps_exp.checkpoints.bin_files import safetensors_folder
    from alps_exp.checkpoints.checkpoint import Checkpoint
    from alps_exp.checkpoints.packed import is_packed, packed_entries, read_tensor

    if is_packed(folder):
        return packed_entries(folder), lambda key: read_tensor(folder, key)
    checkpoint = Checkpoint(safetensors_folder(folder))
    return checkpoint.entries, lambda key: checkpoint.read({key: None})[key]
