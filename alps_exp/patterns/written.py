"""Patterns as users write them: the one place where their text is read. Needs no torch.

    0.7              Unstructured(0.7)
    2:4              NM(2, 4)
    2:4T             Transposable(2, 4)
    4:8>2:4          Hierarchical(4, 8, 2, 4), and 4:8/2:4
    64:2:8           VNM(64, 2, 8)
    block=32@0.7     Block(32, 32, 0.7), and block=16x64@0.7
    row@0.3          Row(0.3)
    column@0.3       Column(0.3)

Every yaml of conf/sparsity names a class, and each class reads its own form.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from functools import cache

import yaml

from ..base.errors import UserError, nearest
from ..base.resources import class_of, resource_root
from .pattern import WORDS, Pattern

DENSE = "0"  # what records and tables write where nothing is pruned


@cache
def _nodes() -> dict[str, dict]:
    files = (resource_root() / "conf" / "sparsity").glob("*.yaml")
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}


@cache
def kinds() -> dict[str, type[Pattern]]:
    """The class of each yaml in conf/sparsity, by the yaml's name, in the order of tables."""
    found = {name: class_of(node, f"sparsity={name}", Pattern, "pattern") for name, node in _nodes().items()}
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[0])))


def read(text: str) -> Pattern | None:
    """The pattern that a text means; None where no kind of pattern has that form.

    Raises:
        UserError: the form of a pattern with numbers that are not allowed.
    """
    return next((pattern for kind in kinds().values() if (pattern := kind.parse(text)) is not None), None)


def parse_sparsity(value: float | str | Pattern) -> Pattern:
    """The pattern that a user wrote: 0.7, "0.7", "2:4".

    Raises:
        UserError: of no kind of pattern, or with numbers that its kind does not allow.
    """
    if isinstance(value, Pattern):
        return value
    text = str(value).strip()
    if not isinstance(value, bool) and (pattern := read(text)) is not None:
        return pattern
    hint = ' (a plain 2:4 in YAML is read as 124: quote it, "2:4")' if text.isdigit() else ""
    raise UserError(
        f"sparsity {value!r} is not allowed{hint}: give a fraction of zeros above 0 and below 1 (0.7), "
        f'or a pattern such as "2:4" or {", ".join(_others())}; method=dense is the run without pruning'
    )


def _others() -> list[str]:
    """Each kind of pattern as it is written, but for the two that every message names."""
    return [pattern_of(node).written for name, node in _nodes().items() if name not in ("unstructured", "nm")]


def node_of(pattern: Pattern) -> dict:
    """The `sparsity` node of a configuration that stands for a pattern."""
    return {"kind": pattern.kind, "_target_": _nodes()[pattern.kind]["_target_"], **dataclasses.asdict(pattern)}


def pattern_of(node: Mapping) -> Pattern:
    """The pattern that a composed `sparsity` node describes.

    Raises:
        UserError: unknown kind, missing or foreign keys, or values that no pattern allows.
    """
    fields = {str(key): value for key, value in node.items() if key != "_target_"}
    kind = fields.pop("kind", None)
    target = class_of(node, f"sparsity={kind}", Pattern, "pattern") if node.get("_target_") else kinds().get(kind)
    if target is None:
        raise UserError(f"sparsity.kind={kind} is not allowed; {nearest(str(kind), kinds())}")
    known = [field.name for field in dataclasses.fields(target)]
    if foreign := set(fields) - set(known):
        raise inconsistent(f"sparsity={kind}", f"sparsity.{min(foreign)}={fields[min(foreign)]}")
    for name in known:
        if name not in fields:
            raise UserError(f"sparsity={kind} needs sparsity.{name}")
    return target(**fields)


def inconsistent(first: str, second: str) -> UserError:
    """The error for a sparsity that is given twice in different terms."""
    return UserError(
        f"{first} and {second} are inconsistent: give one of them, a value (sparsity=0.6, sparsity=2:4) or a kind with "
        "its own keys (sparsity=unstructured sparsity.level=0.6, sparsity=nm sparsity.kept=2 sparsity.width=4)"
    )


def is_dense(text: str) -> bool:
    """Whether a record's sparsity says that nothing was pruned."""
    return text == DENSE


def order(text: str) -> tuple:
    """Sort key of a written pattern: dense, then by kind and zeros, then what no kind of pattern reads."""
    if is_dense(text):
        return (-1,)
    try:
        pattern = read(text)
    except UserError:
        pattern = None
    return pattern.order if pattern is not None else (99, text)


def notes(texts: Iterable[str]) -> list[str]:
    """What a footnote says of written patterns, in the order of tables; texts of no pattern are passed over."""
    found = []
    for text in sorted(set(texts), key=order):
        try:
            pattern = read(text)
        except UserError:
            continue
        if pattern is not None and pattern.note is not None and pattern.note not in found:
            found.append(pattern.note)
    return found


def of_slug(slug: str, candidates: Iterable[str] = ()) -> str | None:
    """The text whose pattern has this slug (a directory's name holds it); None where that is not clear.

    Args:
        slug: as `Pattern.slug` gives it.
        candidates: texts that it may be of, beside those of the patterns here.
    """
    signs = slug
    for sign, word in WORDS.items():
        signs = signs.replace(word, sign) if word else signs
    for text in (*candidates, slug.removeprefix("u"), signs, re.sub(r"^([a-z]+)(\d)", r"\1=\2", signs)):
        try:
            pattern = read(text)
        except UserError:
            continue
        if pattern is not None and pattern.slug == slug:
            return pattern.written
    return None
