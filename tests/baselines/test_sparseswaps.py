"""SparseSwaps swap by swap against all swaps tried, each by its loss."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers import assert_exact, planted

from alps_exp.base.errors import UserError
from alps_exp.baselines import sparseswaps
from alps_exp.layer import registry
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.patterns import parse_sparsity


def losses(problem: LayerProblem, support: np.ndarray) -> np.ndarray:
    """Of each row, w_Pᵀ G_PP w_P."""
    lost = problem.weight.numpy() * ~support
    return np.einsum("ri,ij,rj->r", lost, problem.gram.numpy(), lost)


def brute_force(problem: LayerProblem, support: np.ndarray, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The support after the best swap of every row, and which rows had one that lowers the loss."""
    support, swapped = support.copy(), np.zeros(len(support), dtype=bool)
    now = losses(problem, support)
    for row in range(len(support)):
        best, after = now[row] * (1 - 1e-12), None
        for p, k in itertools.product(np.flatnonzero(~support[row]), np.flatnonzero(support[row])):
            if group is not None and p // group != k // group:
                continue
            other = support[row].copy()
            other[p], other[k] = True, False
            lost = problem.weight[row].numpy() * ~other
            if (loss := lost @ problem.gram.numpy() @ lost) < best:
                best, after = loss, other
        if after is not None:
            support[row], swapped[row] = after, True
    return support, swapped


@pytest.mark.parametrize("written", ["0.3", "0.5", "0.8", "2:4", "1:4", "5:8"])
@pytest.mark.parametrize("start", ["wanda", "magnitude"])
def test_every_swap_is_the_best_of_all(written, start, monkeypatch):
    monkeypatch.setattr(sparseswaps, "_TRIED", 2)
    problem, pattern = planted(rows=8, width=40, seed=50), parse_sparsity(written)
    support = registry.solver(start).solve(problem, pattern).support.numpy()
    total = np.zeros(8, dtype=int)
    for swaps in range(40):
        solution = registry.solver("sparseswaps", start=start, max_swaps=swaps).solve(problem, pattern)
        assert np.array_equal(solution.support.numpy(), support)
        assert solution.stats == {"start": start, "swaps": int(total.sum())}
        assert torch.equal(solution.weight, problem.weight * solution.support)
        support, swapped = brute_force(problem, support, pattern.group)
        total += swapped
        if not swapped.any():
            break
    assert not swapped.any() and total.max() == swaps > (3 if start == "magnitude" else 0)
    last = registry.solver("sparseswaps", start=start).solve(problem, pattern)
    assert (last.status, last.iterations) == ("converged", swaps) and np.array_equal(last.support.numpy(), support)


@pytest.mark.parametrize("written", ["0.6", "2:4"])
def test_inputs_that_nearly_repeat_each_other_and_dead_ones(written):
    # Correlations near 1 and of both signs: here a pair can gain by its product alone.
    problem = planted(rows=5, width=12, seed=51)
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 6:] = x[:, :6] * torch.tensor([1.0, -1, 2, -3, 1, 1]) + 1e-3 * x[:, 6:]
    x[:, 3] = 0
    problem = LayerProblem.from_inputs(problem.weight, x)
    support = registry.solver("magnitude").solve(problem, parse_sparsity(written)).support.numpy()
    for swaps in range(1, 12):
        support, _ = brute_force(problem, support, parse_sparsity(written).group)
        found = registry.solver("sparseswaps", start="magnitude", max_swaps=swaps)
        solution = found.solve(problem, parse_sparsity(written))
        np.testing.assert_allclose(
            losses(problem, solution.support.numpy()), losses(problem, support), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("written", ["0.29", "0.7", "2:4", "1:4"])
@pytest.mark.parametrize("start", ["wanda", "dsnot", "sparsegpt", "alps"])
def test_any_start_keeps_the_counts_of_its_rows_and_never_loses(start, written, monkeypatch):
    monkeypatch.setattr(sparseswaps, "_BATCH", 3000)  # several parts
    problem, pattern = planted(rows=40, width=96, seed=52, dtype=torch.float32), parse_sparsity(written)
    before = registry.solver(start).solve(problem, pattern).support
    solver = registry.solver("sparseswaps", start=start)
    solution = solver.solve(problem, pattern)
    assert torch.equal(solution.support.sum(1), before.sum(1)) and solver.selection == registry.solver(start).selection
    assert_exact(solution.support, pattern, written, solver.selection)
    double = dataclasses.replace(problem, weight=problem.weight.double())
    assert (losses(double, solution.support.numpy()) <= losses(double, before.numpy()) * (1 + 1e-5)).all()
    assert solution.status == "converged" and solution.stats["swaps"] > 0


def test_statistics_are_those_of_the_start_and_the_gram_matrix():
    assert registry.solver("sparseswaps").statistics is Statistics.GRAM
    assert registry.solver("sparseswaps", start="dsnot").statistics is Statistics.ALL


@pytest.mark.parametrize("start", ["osscar", "sparsellm", "tune"])
def test_starts_that_do_not_prune_layer_by_layer_are_refused(start):
    with pytest.raises(UserError, match=f"method.start={start} prunes blocks or the model as a whole"):
        registry.solver("sparseswaps", start=start)


@pytest.mark.parametrize("start", ["dense", "sparseswaps", "wnda", None])
def test_starts_that_are_none_are_refused(start):
    with pytest.raises(UserError, match=f"method.start={start!r} is not allowed"):
        registry.solver("sparseswaps", start=start)
