"""Which layers are pruned, and how sparse: glob patterns on layer names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from .errors import UserError, nearest
from .patterns import Pattern, parse_sparsity


@dataclass(frozen=True)
class Selection:
    """The user's choice of layers.

    A pattern is a glob on a layer's full name (`model.layers.0.self_attn.q_proj`); it also matches when it matches the
    name from some dot on, so `q_proj`, `self_attn.*` and `*.0.self_attn.*` all say what they seem to.

    Attributes:
        include: layers to prune match one of these.
        exclude: and none of these.
        sparsity: pattern → sparsity for the layers it matches, in place of the run's; the last match counts.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    sparsity: Mapping[str, Pattern] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        include: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        sparsity: Mapping[str, float | str | Pattern] | None = None,
    ) -> Selection:
        """A selection from plain values.

        Raises:
            UserError: a sparsity that is not allowed.
        """
        patterns = {}
        for pattern, value in (sparsity or {}).items():
            try:
                patterns[str(pattern)] = parse_sparsity(value)
            except UserError as error:
                raise UserError(f"layers.sparsity[{pattern}]: {error}") from None
        as_list = [[value] if isinstance(value, str) else list(value) for value in (include, exclude)]
        return cls(tuple(as_list[0]), tuple(as_list[1]), patterns)

    def excluded(self, name: str) -> bool:
        """Whether the layer is left dense."""
        return not _any_match(name, self.include) or _any_match(name, self.exclude)

    def patterns_for(self, shapes: Mapping[str, tuple[int, int]], default: Pattern) -> dict[str, Pattern]:
        """The pattern of every layer that is to be pruned.

        Args:
            shapes: all linear layers of the decoder blocks, name → (out, in).
            default: the run's pattern.

        Raises:
            UserError: a glob that matches no layer, nothing left to prune, or a width that the pattern does not fit.
        """
        last_parts = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        for key, globs in (("include", self.include), ("exclude", self.exclude), ("sparsity", self.sparsity)):
            for glob in globs:
                # Fused weights that are not linear layers can be excluded by name too; only linears are known here.
                if key != "exclude" and not any(_matches(name, glob) for name in shapes):
                    raise UserError(f"layers.{key}: {glob!r} matches no layer; {nearest(glob, last_parts)}")
        chosen = {}
        for name, shape in shapes.items():
            if self.excluded(name):
                continue
            pattern = default
            for glob, own in self.sparsity.items():
                if _matches(name, glob):
                    pattern = own
            pattern.check(shape, name)
            chosen[name] = pattern
        if not chosen:
            raise UserError(
                f"layers.include={list(self.include)} and layers.exclude={list(self.exclude)} leave nothing to prune; "
                f"layers end in {', '.join(last_parts)}"
            )
        return chosen


def _matches(name: str, glob: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[start:]), glob) for start in range(len(parts)))


def _any_match(name: str, globs: Iterable[str]) -> bool:
    return any(_matches(name, glob) for glob in globs)
