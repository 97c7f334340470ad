"""Blocks, rows and columns: the best tiles by enumeration, what is refused, and what multiplies faster."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from helpers import planted, refused

from alps_exp.layer import registry
from alps_exp.methods.refit import refitted
from alps_exp.patterns import Block, Column, Row, parse_sparsity

TILED = [Block(2, 2, 0.5), Block(1, 4, 0.25), Block(4, 2, 0.75), Row(0.5), Column(0.25)]
each = pytest.mark.parametrize("pattern", TILED, ids=str)


def tiles_of(pattern, shape: tuple[int, int]) -> list[torch.Tensor]:
    """The mask of every tile, in row-major order, by plain loops."""
    height, width = pattern.tile(shape)
    found = []
    for row in range(0, shape[0], height):
        for column in range(0, shape[1], width):
            mask = torch.zeros(shape, dtype=torch.bool)
            mask[row : row + height, column : column + width] = True
            found.append(mask)
    return found


@each
def test_the_tiles_of_largest_energy_stay(pattern):
    shape = (4, 8)
    tiles = tiles_of(pattern, shape)
    kept = round((1 - pattern.level) * len(tiles))
    for seed in range(5):
        score = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        masks = [torch.stack(chosen).any(0) for chosen in combinations(tiles, kept)]
        energies = [float((score * mask).square().sum()) for mask in masks]
        best = masks[energies.index(max(energies))]
        assert torch.equal(pattern.keep(score), best)
        assert torch.equal(pattern.tracker()(score.float()), best)
        assert pattern.holds(best) and not pattern.holds(~torch.zeros_like(best))


@each
def test_order_within_a_tile_does_not_matter(pattern):
    shape = (8, 8)
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    height, width = pattern.tile(shape)
    rows = torch.arange(8).view(-1, height).flip(1).flatten()
    columns = torch.arange(8).view(-1, width).flip(1).flatten()
    assert torch.equal(pattern.keep(score[rows][:, columns]), pattern.keep(score))
    # And what outputs are called matters to none of these patterns, as long as whole tiles move.
    order = torch.arange(8).view(-1, height).flip(0).flatten()
    assert torch.equal(pattern.keep(score[order]), pattern.keep(score)[order])


def test_counts_and_ties_by_hand():
    ones = torch.ones(4, 12)
    assert Block(2, 4, 0.5).keep(ones).int()[::2, ::4].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert Block(2, 4, 0.5).keep(ones, "row").int()[::2, ::4].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert Row(0.3).keep(ones, "row").int()[:, 0].tolist() == [1, 1, 1, 0]
    assert Column(0.3).keep(ones).int()[0].tolist() == [1] * 8 + [0] * 4
    signs = torch.tensor([[3.0, -9.0, 1.0, 1.0]])
    assert Block(1, 2, 0.5).keep(signs).int().tolist() == [[0, 0, 1, 1]], "a negative score is a small one"


@pytest.mark.parametrize(
    ("written", "shape", "words"),
    [
        ("block=32@0.7", (576, 200), ("its weight 576 × 200", "32 × 32", "sizes that fit: 2, 4, 8")),
        ("block=32@0.7", (7, 5), ("sizes that fit: none",)),
        ("block=16x64@0.5", (24, 96), ("heights that fit: 4, 6, 8, 12, 24; widths that fit: 16, 24, 32, 48, 96",)),
        ("block=32@0.7", (32, 32), ("none of the 1 blocks of a weight 32 × 32 would stay",)),
        ("row@0.9", (4, 96), ("none of the 4 rows of a weight 4 × 96 would stay",)),
        ("column@0.9", (96, 3), ("none of the 3 columns of a weight 96 × 3 would stay",)),
        ("4:8>2:4", (64, 172), ("its 172 inputs", "8 groups of 4", "numbers of groups of 4 that fit: 43")),
        ("4:8>3:5", (64, 64), ("8 groups of 5", "widths of a group that fit: 4, 8")),
        ("2:4>3:4", (64, 18), ("4 groups of 4, nor of 4 or of 4: change both",)),
    ],
)
def test_what_does_not_fit_is_refused_with_what_fits(written, shape, words):
    message = refused(lambda: parse_sparsity(written).check(shape, "blocks.3.fc1"), *words)
    assert message.startswith(f"sparsity {written} does not fit blocks.3.fc1: ")


@pytest.mark.parametrize(("written", "inputs"), [("4:8>3:5", 64), ("4:8>3:5", 96), ("4:8>2:4", 172), ("4:8>2:4", 24)])
def test_what_a_hierarchical_pattern_is_told_to_be_fits(written, inputs):
    outer, inner = written.split(">")
    words, _, numbers = parse_sparsity(written).misfit((8, inputs)).rpartition(" that fit: ")
    for number in numbers.split(", "):
        if "numbers of groups" in words:
            told = f"{outer.partition(':')[0]}:{number}>{inner}"
        else:
            told = f"{outer}>{inner.partition(':')[0]}:{number}"
        assert parse_sparsity(told).misfit((8, inputs)) is None, told


@pytest.mark.parametrize("text", ["block=0@0.5", "block=1@0.5", "block=8@0", "block=8@1.5", "row@1", "column@0"])
def test_numbers_that_are_not_allowed(text):
    refused(lambda: parse_sparsity(text), "not allowed")


@pytest.mark.parametrize("text", ["block@0.5", "block=8", "block=8x@0.5", "row=2@0.5", "rows@0.5", "row@", "column@x"])
def test_other_texts_are_no_patterns(text):
    assert "block=16@0.5, column@0.25" in refused(lambda: parse_sparsity(text), "not allowed", "0.7", "2:4")


def test_texts_and_their_order():
    texts = ["block=16@0.5", "block=16x64@0.7", "block=32@0.7", "block=32@0.8", "row@0.3", "column@0.3", "column@0.5"]
    from alps_exp.patterns import written

    for text in texts:
        assert parse_sparsity(text).written == text
        assert written.of_slug(parse_sparsity(text).slug) == text
        assert "-" not in parse_sparsity(text).slug
    assert sorted([*reversed(texts), "2:4", "0.9"], key=written.order) == ["0.9", "2:4", *texts]
    assert parse_sparsity("block=16x16@0.50").written == "block=16@0.5"


@pytest.mark.parametrize("written", ["block=8@0.5", "block=4x2@0.5", "row@0.25", "column@0.5"])
def test_alps_is_below_magnitude_and_its_exact_refit(written):
    problem = planted(rows=32, width=64, tokens=600, seed=3)
    pattern = parse_sparsity(written)
    refit = refitted(registry.solver("magnitude"), "exact").solve(problem, pattern)
    found = registry.solver("alps").solve(problem, pattern)
    assert problem.relative_loss(found.weight) < problem.relative_loss(refit.weight)
    assert pattern.holds(found.support)
    assert found.stats.get("projection") == (None if pattern.tracker().fast else "plain")
    assert torch.equal(found.weight != 0, found.support)
    assert "projection" not in registry.solver("alps").solve(problem, parse_sparsity("2:4")).stats


def test_alps_compares_blocks_in_the_metric_of_the_inputs():
    """Two blocks of equal weights, one of which is fed inputs a hundred times as large."""
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 4:] *= 100
    from alps_exp.layer.problem import LayerProblem

    weight = torch.ones(4, 8, dtype=torch.float64)
    weight[:, :4] *= 2
    problem = LayerProblem.from_inputs(weight, x)
    for method in ("alps", "wanda"):
        support = registry.solver(method).solve(problem, Block(4, 4, 0.5)).support
        assert support[:, 4:].all() and not support[:, :4].any()
    assert registry.solver("magnitude").solve(problem, Block(4, 4, 0.5)).support[:, :4].all()


def test_torch_multiplies_blocks_to_the_same():
    pattern = Block(8, 8, 0.5)
    problem = planted(rows=32, width=64, dtype=torch.float32)
    weight = registry.solver("alps").solve(problem, pattern).weight
    sparse = weight.to_sparse_bsr((8, 8))
    assert sparse.values().shape == (16, 8, 8)  # half of the 32 blocks
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sparse @ x, weight @ x)
