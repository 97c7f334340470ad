"""Hierarchical and V:N:M sparsity: the best masks of small tiles by enumeration, and which methods keep them."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from helpers import planted, refused

from alps_exp.layer import registry
from alps_exp.methods.refit import refitted
from alps_exp.patterns import VNM, Hierarchical, parse_sparsity


def random(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best_hierarchical(energy: list[float], pattern: Hierarchical) -> set[int]:
    """Of one row's group of inputs, by trying all choices of groups and of weights in them."""
    width, best, found = pattern.width, -1.0, set()
    within = list(combinations(range(width), pattern.kept))
    for groups in combinations(range(pattern.outer_width), pattern.outer_kept):
        for inner in product(within, repeat=pattern.outer_kept):
            places = {group * width + place for group, chosen in zip(groups, inner, strict=True) for place in chosen}
            if (total := sum(energy[place] for place in places)) > best:
                best, found = total, places
    return found


@pytest.mark.parametrize(
    "pattern", [Hierarchical(1, 2, 2, 4), Hierarchical(2, 4, 1, 2), Hierarchical(2, 3, 2, 3)], ids=str
)
def test_hierarchical_is_exact(pattern):
    score = random((6, 2 * pattern.group), 0)
    mask = pattern.keep(score)
    for values, kept in zip(score.view(-1, pattern.group), mask.view(-1, pattern.group), strict=True):
        best = best_hierarchical(values.square().tolist(), pattern)
        assert set(kept.nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("pattern", [VNM(3, 2, 5), VNM(2, 1, 6), VNM(2, 3, 6), VNM(4, 2, 8)], ids=str)
def test_vnm_is_exact(pattern):
    score = random((2 * pattern.rows, 2 * pattern.width), 1)
    mask = pattern.keep(score)
    for row, column in product(range(0, 2 * pattern.rows, pattern.rows), range(0, 2 * pattern.width, pattern.width)):
        here = slice(row, row + pattern.rows), slice(column, column + pattern.width)
        energy, best = score[here].square(), -1.0
        for columns in combinations(range(pattern.width), 4):
            total = float(energy[:, list(columns)].sort(1, descending=True).values[:, : pattern.kept].sum())
            best = max(best, total)
        assert float((energy * mask[here]).sum()) == pytest.approx(best)
        assert (mask[here].sum(1) == pattern.kept).all() and int(mask[here].any(0).sum()) <= 4


@pytest.mark.parametrize("pattern", [VNM(3, 1, 6), VNM(3, 2, 6), VNM(3, 3, 6), VNM(2, 2, 16)], ids=str)
def test_vnm_takes_the_first_of_equal_choices(pattern):
    score = torch.randint(0, 3, (pattern.rows, pattern.width), generator=torch.Generator().manual_seed(2)).double()
    best, expected = -1.0, None
    for columns in combinations(range(pattern.width), 4):
        shared = score[:, list(columns)]
        inner = shared.sort(dim=1, descending=True, stable=True).indices[:, : pattern.kept]
        if (total := float(shared.gather(1, inner).square().sum())) > best:  # whole numbers: ties are exact
            best = total
            expected = torch.zeros_like(score).scatter_(1, torch.tensor(columns)[inner], 1.0)
    assert torch.equal(pattern.keep(score).double(), expected)


def test_vnm_tiles_do_not_depend_on_how_many_there_are():
    score = random((64, 8 * 64), 3)  # more than are compared at a time
    whole = VNM(64, 2, 8).keep(score)
    assert torch.equal(whole, torch.cat([VNM(64, 2, 8).keep(part) for part in score.split(8, 1)], 1))


def test_equal_scores_keep_the_first():
    assert Hierarchical(1, 2, 1, 2).keep(torch.ones(1, 8)).int().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0]]
    assert VNM(2, 2, 8).keep(torch.ones(2, 8)).int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 2


def test_order_within_what_is_chosen_together_does_not_matter():
    score = random((8, 64), 2)
    rows = torch.tensor([3, 1, 0, 2, 7, 5, 4, 6])
    for pattern in (Hierarchical(4, 8, 2, 4), VNM(4, 2, 8)):
        assert torch.equal(pattern.keep(score[rows]), pattern.keep(score)[rows])
    columns = torch.arange(64).view(-1, 8).flip(1).flatten()
    for pattern in (Hierarchical(1, 2, 2, 4), VNM(4, 2, 8)):
        assert torch.equal(pattern.keep(score[:, columns]), pattern.keep(score)[:, columns])


@pytest.mark.parametrize(
    ("text", "sparsity", "group", "slug"),
    [("4:8>2:4", 0.75, 32, "4of8over2of4"), ("1:2>2:4", 0.75, 8, "1of2over2of4"), ("64:2:8", 0.75, 8, "64of2of8")],
)
def test_texts(text, sparsity, group, slug):
    pattern = parse_sparsity(text)
    assert (pattern.sparsity, pattern.group, pattern.slug, pattern.written) == (sparsity, group, slug, text)
    assert parse_sparsity(text.replace(">", "/")) == pattern


@pytest.mark.parametrize("text", ["4:4>2:4", "1:2>4:4", "0:2:8", "64:4:8", "64:2:4", "64:2:32", "0:2>2:4"])
def test_numbers_that_are_not_allowed(text):
    refused(lambda: parse_sparsity(text), "not allowed")


def test_what_does_not_fit():
    refused(
        lambda: parse_sparsity("4:8>2:4").check((8, 48), "fc1"),
        "its 48 inputs",
        "8 groups of 4",
        "numbers of groups of 4 that fit: 6, 12",
    )
    refused(lambda: parse_sparsity("64:2:8").check((96, 48), "fc1"), "96 × 48", "64 × 8", "V that fit: 16, 24, 32, 48")
    refused(lambda: parse_sparsity("48:2:7").check((96, 48), "fc1"), "48 × 7; M that fit: 6, 8, 12, 16, or")


@pytest.mark.parametrize("text", ["1:2>2:4", "4:2:8"])
def test_methods_keep_them(text):
    problem = planted(rows=32, width=64, tokens=600, seed=3, dtype=torch.float32)
    pattern, losses = parse_sparsity(text), {}
    for method in ("magnitude", "wanda", "sparsegpt", "admm-grad", "alps"):
        found = registry.solver(method).solve(problem, pattern)
        assert pattern.holds(found.support)
        assert int(found.support.sum()) == round((1 - pattern.sparsity) * found.support.numel())
        losses[method] = problem.relative_loss(found.weight)
    refit = refitted(registry.solver("magnitude"), "exact").solve(problem, pattern)
    assert losses["alps"] < min(losses["sparsegpt"], losses["wanda"], problem.relative_loss(refit.weight))
    assert losses["sparsegpt"] < losses["magnitude"]


@pytest.mark.parametrize("method", ["dsnot", "sparseswaps"])
def test_exchanges_stay_within_groups_that_are_kept(method):
    problem = planted(rows=32, width=64, tokens=600, seed=3)
    pattern = Hierarchical(1, 2, 2, 4)
    start, found = (registry.solver(name).solve(problem, pattern) for name in ("wanda", method))
    assert pattern.holds(found.support) and found.stats["swaps"] > 0
    groups = [support.view(-1, 4).any(1) for support in (start.support, found.support)]
    assert torch.equal(*groups)
    assert (found.support.sum(1) == 16).all()
    refused(lambda: registry.solver(method).solve(problem, VNM(4, 2, 8)), "cannot keep sparsity 4:2:8: it takes")
