"""Transposable N:M: the best mask of a tile by enumeration, the search of larger tiles against a linear programme."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import planted, refused
from scipy.optimize import linprog
from torch.sparse import _semi_structured_conversions as semi_structured

from alps_exp.layer import registry
from alps_exp.methods.refit import refitted
from alps_exp.patterns import NM, Transposable, parse_sparsity
from alps_exp.patterns.transposing import all_masks


def random(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()


def optimum(energy: np.ndarray, kept: int) -> float:
    """The largest energy of a tile's mask with `kept` entries in every row and column: the linear programme's, whose
    vertices are masks."""
    width = len(energy)
    sums = np.concatenate([np.kron(np.eye(width), np.ones(width)), np.kron(np.ones(width), np.eye(width))])
    return -linprog(-energy.ravel(), A_eq=sums, b_eq=np.full(2 * width, kept), bounds=(0, 1)).fun


def assert_counts(mask: torch.Tensor, kept: int, width: int) -> None:
    for tile in (mask, mask.T):
        assert (tile.reshape(-1, width).sum(1) == kept).all()


@pytest.mark.parametrize(("kept", "width", "count"), [(2, 4, 90), (1, 4, 24), (3, 4, 24), (1, 2, 2), (2, 3, 6)])
def test_all_masks(kept, width, count):
    masks = all_masks(width, kept)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks) == count
    rows = list(itertools.product((0, 1), repeat=width * width)) if width < 4 else []
    plain = [np.reshape(row, (width, width)) for row in rows]
    plain = [mask for mask in plain if (mask.sum(0) == kept).all() and (mask.sum(1) == kept).all()]
    assert not rows or len(plain) == count


@pytest.mark.parametrize("text", ["2:4T", "1:4T", "3:4T", "2:3T", "1:2T"])
def test_small_tiles_are_exact(text):
    pattern = parse_sparsity(text)
    width = pattern.width
    score = random((5 * width, 4 * width), 0)
    mask = pattern.keep(score)
    assert_counts(mask, pattern.kept, width)
    assert torch.equal(pattern.tracker()(score), mask)
    for row, column in itertools.product(range(0, 5 * width, width), range(0, 4 * width, width)):
        here = slice(row, row + width), slice(column, column + width)
        best = optimum(score[here].square().numpy(), pattern.kept)
        assert float((score[here].square() * mask[here]).sum()) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("text", ["4:8T", "2:8T", "8:16T", "3:5T"])
def test_larger_tiles_come_within_a_hundredth_of_the_optimum(text):
    pattern = parse_sparsity(text)
    width, found, best = pattern.width, 0.0, 0.0
    for seed, power in ((0, 1), (1, 3)):  # of normal weights, and of some that are far larger than others
        score = random((2 * width, 4 * width), seed) ** power
        mask = pattern.keep(score)
        assert_counts(mask, pattern.kept, width)
        found += float((score.square() * mask).sum())
        for row, column in itertools.product(range(0, 2 * width, width), range(0, 4 * width, width)):
            tile = score[row : row + width, column : column + width].square()
            best += optimum(tile.numpy(), pattern.kept)
        assert 0.99 * best <= found <= best * (1 + 1e-9)
        tracker = pattern.tracker()  # nearly as good after a few iterates, each with its exact counts
        for _ in range(3):
            tracked = tracker(score)
            assert_counts(tracked, pattern.kept, width)
        assert float((score.square() * tracked).sum()) > 0.97 * float((score.square() * mask).sum())


def test_equal_scores_keep_the_first():
    assert Transposable(2, 4).keep(torch.ones(4, 4)).int().tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    assert Transposable(1, 2).keep(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).int().tolist() == [[1, 0], [0, 1]]
    tenths = torch.full((4, 4), 0.1)  # whose sums differ by rounding
    assert torch.equal(Transposable(2, 4).keep(tenths), Transposable(2, 4).keep(torch.ones(4, 4)))
    large = Transposable(4, 8).keep(torch.ones(8, 16))
    assert_counts(large, 4, 8)
    assert torch.equal(large[:, :8], large[:, 8:]), "the same tile has the same mask wherever it is"


@pytest.mark.parametrize("text", ["2:4T", "4:8T"])
def test_tiles_are_independent_and_turn_with_the_weight(text):
    pattern, score = parse_sparsity(text), random((16, 24), 3)
    width = pattern.width
    mask = pattern.keep(score)
    order = torch.arange(16).view(-1, width).flip(0).flatten()
    assert torch.equal(pattern.keep(score[order]), mask[order])
    if width == 4:
        assert torch.equal(pattern.keep(score.T), mask.T)
        within = torch.arange(16).view(-1, width).flip(1).flatten()
        assert torch.equal(pattern.keep(score[within]), mask[within])


def test_what_is_allowed():
    assert (parse_sparsity("2:4T").slug, str(Transposable(8, 16))) == ("2of4T", "8:16T")
    refused(lambda: parse_sparsity("4:4T"), "not allowed")
    wide = parse_sparsity("2:4T")
    refused(
        lambda: wide.check((10, 16), "fc1"), "fc1: its 10 outputs and 16 inputs", "multiples of 4; M that fit: none"
    )
    mask = Transposable(2, 4).keep(torch.rand(8, 8))
    assert Transposable(2, 4).holds(mask) and Transposable(2, 4).holds(torch.zeros_like(mask))
    rows = NM(2, 4).keep(torch.ones(8, 8))
    assert NM(2, 4).holds(rows) and not Transposable(2, 4).holds(rows)


@pytest.mark.parametrize("text", ["2:4T", pytest.param("4:8T", marks=pytest.mark.slow)])
def test_the_optimising_methods_beat_magnitude(text):
    problem = planted(rows=32, width=64, tokens=600, seed=3, dtype=torch.float32)
    pattern = parse_sparsity(text)
    losses = {}
    for method in ("magnitude", "sparsegpt", "admm-grad", "alps"):
        found = registry.solver(method).solve(problem, pattern)
        assert_counts(found.support, pattern.kept, pattern.width)
        losses[method] = problem.relative_loss(found.weight)
    refit = refitted(registry.solver("magnitude"), "exact").solve(problem, pattern)
    assert losses["alps"] < min(losses["sparsegpt"], problem.relative_loss(refit.weight))
    assert max(losses["sparsegpt"], losses["admm-grad"]) < losses["magnitude"]
    plain = registry.solver("alps").solve(problem, NM(pattern.kept, pattern.width))
    assert problem.relative_loss(plain.weight) < losses["alps"]


def both_ways(dtype: torch.dtype) -> list[torch.Tensor]:
    """A 2:4T weight and its transpose."""
    problem = planted(rows=64, width=128, tokens=600, seed=3, dtype=torch.float32)
    weight = registry.solver("wanda").solve(problem, Transposable(2, 4)).weight.to(dtype)
    return [weight, weight.T.contiguous()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torchs_semi_structured_form_holds_the_weight_and_its_transpose(dtype):
    """On the CPU, torch converts to the kept half and its places, and back, though it does not multiply."""
    for weight in both_ways(dtype):
        kept, places = semi_structured.sparse_semi_structured_from_dense_cutlass(weight)
        assert kept.shape == (weight.shape[0], weight.shape[1] // 2)
        assert torch.equal(semi_structured.sparse_semi_structured_to_dense_cutlass(kept, places), weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch multiplies semi-structured weights on CUDA alone")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_weight_and_its_transpose_multiply_in_torchs_semi_structured_form(dtype):
    for weight in (weight.cuda() for weight in both_ways(dtype)):
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        assert torch.equal(sparse.to_dense(), weight)
        inputs = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        expected = inputs.double() @ weight.double().T
        product = torch.nn.functional.linear(inputs, sparse).double()
        assert float((product - expected).norm() / expected.norm()) < torch.finfo(dtype).eps
