"""What every pattern must do: those that conf/sparsity/*.yaml names, and one that is defined here.

A pattern is one class and one yaml: nothing here, nor anywhere else, names a pattern that it has to know.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import yaml
from helpers import methods_for_a_layer

from alps_exp import Pattern, prune_layer
from alps_exp.base.errors import UserError
from alps_exp.base.resources import resource_root
from alps_exp.cli.overrides import compose
from alps_exp.layer import registry
from alps_exp.patterns import written

SHAPE = (64, 96)
SHAPES = [SHAPE, (1, 96), (7, 24), (3, 5), (1, 1), (2, 7)]
SCOPES = ("layer", "row", "block")


@dataclass(frozen=True)
class Checkered(Pattern):
    """Of every row, `kept` of its even inputs and none of its odd ones; written even-3."""

    kind: ClassVar[str] = "checkered"

    kept: int

    @classmethod
    def parse(cls, text: str) -> Checkered | None:
        match = re.fullmatch(r"even-(\d+)", text)
        return cls(int(match[1])) if match else None

    @property
    def written(self) -> str:
        return f"even-{self.kept}"

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / 96  # of the width that these tests use

    def keep(self, score, scope="layer"):
        self.check(tuple(score.shape))
        order = score[:, ::2].sort(dim=1, descending=True, stable=True).indices[:, : self.kept]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, 2 * order, True)

    def misfit(self, shape):
        return None if shape[1] >= 2 * self.kept else f"it has {shape[1]} inputs and needs {2 * self.kept}"


FOUND = {name: written.pattern_of(node) for name, node in written._nodes().items()}
each = pytest.mark.parametrize("pattern", [*FOUND.values(), Checkered(12)], ids=[*FOUND, "checkered"])
each_found = pytest.mark.parametrize("kind", list(FOUND))


def normal(shape: tuple[int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def checkered_is_there(tmp_path, monkeypatch):
    """A configuration that has the yaml of `Checkered` beside those of the package."""
    shutil.copytree(resource_root() / "conf", tmp_path / "conf")
    node = {"kind": "checkered", "_target_": f"{__name__}.Checkered", "kept": 12}
    (tmp_path / "conf" / "sparsity" / "checkered.yaml").write_text(yaml.safe_dump(node))
    monkeypatch.setattr(written, "resource_root", lambda: tmp_path)
    for cached in (written._nodes, written.kinds):
        cached.cache_clear()
    yield
    for cached in (written._nodes, written.kinds):
        cached.cache_clear()


def test_a_pattern_is_one_class_and_one_yaml(checkered_is_there):
    pattern = written.parse_sparsity("even-5")
    assert pattern == Checkered(5) and written.of_slug(pattern.slug) == "even-5"
    assert written.pattern_of(written.node_of(pattern)) == pattern
    assert sorted(["even-5", "2:4", "0", "0.7", "gone"], key=written.order) == ["0", "0.7", "2:4", "even-5", "gone"]
    for method in ("magnitude", "wanda"):
        solution = prune_layer(normal(), normal((400, 96), 1), method=method, sparsity="even-12")
        assert (solution.support.sum(1) == 12).all() and not solution.support[:, 1::2].any()
        assert torch.equal(solution.weight != 0, solution.support)
    with pytest.raises(UserError, match=r"sparsity even-49 does not fit the layer: it has 96 inputs and needs 98"):
        prune_layer(normal(), method="magnitude", sparsity="even-49")


@each
@pytest.mark.parametrize("method", methods_for_a_layer())
def test_a_method_keeps_a_pattern_or_refuses_it_by_name(pattern, method):
    solver = registry.solver(method)
    if not solver.prunes:
        return
    inputs = normal((400, 96), 1)
    if solver.kinds is not None and pattern.kind not in solver.kinds:
        with pytest.raises(UserError, match=rf"cannot keep sparsity {pattern.written}: it takes "):
            prune_layer(normal(), inputs, method=method, sparsity=pattern)
        return
    support = prune_layer(normal(), inputs, method=method, sparsity=pattern).support
    assert abs(1 - support.float().mean() - pattern.sparsity) < 0.02


@each
@pytest.mark.parametrize("scope", SCOPES)
def test_counts_are_exact(pattern, scope):
    """They depend on the shape alone: not on the scores, their signs, or how many are equal."""
    noise = normal()
    cases = [noise, noise.abs(), -noise.abs(), torch.zeros(SHAPE), (noise * 2).round(), noise.double(), noise.half()]
    masks = [pattern.keep(score, scope) for score in cases]
    assert all(mask.dtype == torch.bool and mask.shape == SHAPE for mask in masks)
    assert len({int(mask.sum()) for mask in masks}) == 1
    assert abs(1 - masks[0].float().mean() - pattern.sparsity) < 0.02


@each
@pytest.mark.parametrize("scope", SCOPES)
def test_ties_keep_the_first(pattern, scope):
    """Equal scores are kept as if each were a little larger than the next."""
    place = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float64).view(SHAPE)
    for score in (torch.ones(SHAPE), (normal() * 2).round()):
        first = pattern.keep(score, scope)
        assert not pattern.separable or torch.equal(first, pattern.keep(score.double() - 1e-7 * place, scope))
        assert torch.equal(first, pattern.keep(score.clone(), scope))
        assert torch.equal(first, pattern.keep(score.T.contiguous().T, scope)), "it depends on how scores lie in memory"


@each
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_kept_is_a_support_of_the_pattern(pattern, scope):
    score = normal().abs() + 0.1
    kept = pattern.keep(score, scope)
    assert torch.equal(pattern.keep(kept.float(), scope), kept)
    assert torch.equal(pattern.keep(2 * score, scope), kept)
    tracked = pattern.tracker()(score)
    assert abs(int(tracked.sum()) - int(pattern.keep(score).sum())) <= 0.01 * score.numel()


@each
def test_what_does_not_fit_is_refused_by_name(pattern):
    fitting = [shape for shape in SHAPES if pattern.misfit(shape) is None]
    assert SHAPE in fitting
    for shape in SHAPES:
        if shape in fitting:
            pattern.check(shape)
            assert pattern.keep(normal(shape)).shape == shape
            continue
        with pytest.raises(
            UserError, match=rf"sparsity {re.escape(pattern.written)} does not fit blocks\.3\.up: "
        ) as end:
            pattern.check(shape, "blocks.3.up")
        assert "\n" not in str(end.value) and str(shape[1]) in str(end.value)
        with pytest.raises(UserError, match="does not fit"):
            pattern.keep(normal(shape))


@each
def test_a_pattern_is_a_value(pattern):
    again = type(pattern).parse(pattern.written)
    assert again == pattern and hash(again) == hash(pattern) and again is not pattern
    assert str(pattern) == pattern.written and 0 < pattern.sparsity < 1
    assert re.fullmatch(r"[A-Za-z0-9._-]+", pattern.slug)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.kind_of_another_name = 1
    assert type(pattern).parse("no pattern at all") is None


@each_found
def test_the_yaml_and_the_class_agree(kind):
    node, pattern = written._nodes()[kind], FOUND[kind]
    assert (node["kind"], type(pattern).kind, written.kinds()[kind]) == (kind, kind, type(pattern))
    assert written.node_of(pattern) == node
    fields = [key for key in node if key not in ("kind", "_target_")]
    assert fields == [field.name for field in dataclasses.fields(pattern)]
    with pytest.raises(UserError, match=f"sparsity={kind} needs sparsity.{fields[-1]}"):
        written.pattern_of({key: value for key, value in node.items() if key != fields[-1]})
    with pytest.raises(UserError, match="inconsistent"):
        written.pattern_of(node | {"foreign": 1})


@each_found
def test_what_is_written_is_read_everywhere(kind):
    """By the one parser, from a directory's name, and on the command line; by no other kind."""
    pattern = FOUND[kind]
    assert [name for name, other in written.kinds().items() if other.parse(pattern.written) is not None] == [kind]
    assert written.parse_sparsity(pattern.written) == pattern and written.of_slug(pattern.slug) == pattern.written
    assert written.order(written.DENSE) < written.order(pattern.written) == pattern.order < written.order("unknown")
    for words in ([f"sparsity={pattern.written}"], [f"sparsity={kind}"]):
        assert written.pattern_of(compose(words).sparsity) == pattern
