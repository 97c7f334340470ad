"""Which layers are pruned, and how sparse: glob patterns on layer names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ..base.errors import UserError, nearest
from ..patterns import Pattern, parse_sparsity


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
            UserError: a sparsity that is not allowed, or something else than globs.
        """
        include, exclude = _globs("include", include), _globs("exclude", exclude)
        if sparsity is not None and not isinstance(sparsity, Mapping):
            raise UserError(
                f"layers.sparsity={sparsity} is not allowed: give globs with their sparsity, as in "
                "'layers.sparsity={\"*.q_proj\":0.5}'"
            )
        patterns = {}
        for pattern, value in (sparsity or {}).items():
            try:
                patterns[str(pattern)] = parse_sparsity(value)
            except UserError as error:
                raise UserError(f"layers.sparsity[{pattern}]: {error}") from None
        return cls(include, exclude, patterns)

    def excluded(self, name: str) -> bool:
        """Whether the layer is left dense."""
        return not _any_match(name, self.include) or _any_match(name, self.exclude)

    def names(self, name: str) -> bool:
        """Whether `exclude` says that this is left dense."""
        return _any_match(name, self.exclude)

    def shared(self, patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
        """Of these layers those that have no sparsity of their own, but the run's."""
        return {name: pattern for name, pattern in patterns.items() if not _any_match(name, self.sparsity)}

    def patterns_for(
        self, shapes: Mapping[str, tuple[int, int]], default: Pattern, others: Iterable[str] = ()
    ) -> dict[str, Pattern]:
        """The pattern of every layer that is to be pruned.

        Args:
            shapes: all linear layers of the decoder blocks, name → (out, in).
            default: the run's pattern.
            others: names of what is never pruned, which may be excluded all the same.

        Raises:
            UserError: a glob that matches no layer, nothing left to prune, or a width that the pattern does not fit.
        """
        last_parts = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        for key, globs in (("include", self.include), ("exclude", self.exclude), ("sparsity", self.sparsity)):
            for glob in globs:
                names = [*shapes, *others] if key == "exclude" else shapes
                if not any(_matches(name, glob) for name in names):
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


def _globs(key: str, value: Iterable[str]) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else None
    if globs is None or not all(isinstance(glob, str) for glob in globs):
        shown = value if globs is None else list(globs)
        raise UserError(f"layers.{key}={shown} is not allowed: give globs, as in 'layers.{key}=[\"*.q_proj\"]'")
    return globs


def _matches(name: str, glob: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[start:]), glob) for start in range(len(parts)))


def _any_match(name: str, globs: Iterable[str]) -> bool:
    return any(_matches(name, glob) for glob in globs)
