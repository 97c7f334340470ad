"""SparseGPT against a plain column-by-column float64 reference of its equations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import assert_exact, planted, stable_top

from alps_exp.base.errors import UserError
from alps_exp.baselines.sparsegpt import _inverse_factors, inverse_factor
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.patterns import parse_sparsity


def reference(problem: LayerProblem, written: str, damping: float, block_size: int) -> np.ndarray:
    """The pruned weight, by the equations as they are usually written: errors leave each column at once."""
    weight, gram = problem.weight.numpy().copy(), problem.gram.numpy().copy()
    rows, width = weight.shape
    gram[np.diag_indices(width)] += damping * np.mean(np.diag(problem.gram.numpy()))
    for j in np.flatnonzero(np.diag(problem.gram.numpy()) == 0):
        gram[j, j] = 1
        weight[:, j] = 0
    u = np.linalg.cholesky(np.linalg.inv(gram)).T
    for begin in range(0, width, block_size):
        end = min(begin + block_size, width)
        block = weight[:, begin:end]
        keep = np.ones((rows, end - begin), dtype=bool)
        if ":" not in written:
            score = (block / np.diag(u)[begin:end]) ** 2
            removed = int(float(written) * score.size + 1e-9)
            keep = stable_top(score.reshape(-1), score.size - removed).reshape(keep.shape)
        errors = np.zeros_like(block)
        for j in range(begin, end):
            if ":" in written:
                kept, group = map(int, written.split(":"))
                if j % group == 0:
                    scores = (weight[:, j : j + group] / np.diag(u)[j : j + group]) ** 2
                    keep[:, j - begin : j - begin + group] = [stable_top(row, kept) for row in scores]
            old = weight[:, j].copy()
            weight[:, j] *= keep[:, j - begin]
            errors[:, j - begin] = (old - weight[:, j]) / u[j, j]
            for k in range(j + 1, end):
                weight[:, k] -= errors[:, j - begin] * u[j, k]
        weight[:, end:] -= errors @ u[begin:end, end:]
    return weight


@pytest.mark.parametrize("written", ["0.3", "0.5", "0.9", "2:4", "1:4", "4:8", "2:3"])
@pytest.mark.parametrize("block_size", [24, 48, 128])
def test_equals_the_reference(written, block_size):
    problem = planted(rows=9, width=120, tokens=700, dead=(3, 4, 5, 77))
    solution = registry.solver("sparsegpt", block_size=block_size).solve(problem, parse_sparsity(written))
    expected = reference(problem, written, 0.01, block_size)
    np.testing.assert_allclose(solution.weight.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damping", [0.001, 0.1, 1.0])
def test_damping(damping):
    problem = planted(rows=9, width=48, seed=3)
    solution = registry.solver("sparsegpt", damping=damping).solve(problem, parse_sparsity("0.6"))
    np.testing.assert_allclose(solution.weight.numpy(), reference(problem, "0.6", damping, 128), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block_size", [1, 7, 16, 50, 1000])
def test_any_block_size(block_size):
    problem = planted(rows=9, width=48, seed=4)
    solver = registry.solver("sparsegpt", block_size=block_size)
    assert_exact(solver.solve(problem, parse_sparsity("0.5")).support, parse_sparsity("0.5"), "0.5", solver.selection)
    # N:M groups are the selection whatever the block, so its size changes nothing but the order of the arithmetic.
    for written in ("2:4", "5:12"):
        solution = solver.solve(problem, parse_sparsity(written))
        usual = registry.solver("sparsegpt").solve(problem, parse_sparsity(written))
        torch.testing.assert_close(solution.weight, usual.weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_factor_of_the_inverse(dtype, tolerance):
    problem = planted(width=40, dtype=dtype, dead=(2,))
    u = inverse_factor(problem, 0.01).double()
    damped = problem.gram.double() + 0.01 * problem.gram.double().diagonal().mean() * torch.eye(40, dtype=torch.float64)
    damped[2, 2] = 1
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(40, dtype=torch.float64), rtol=0, atol=tolerance)


def test_float32_is_close_to_float64():
    problem = planted(rows=64, width=160, tokens=900)
    single = dataclasses.replace(problem, weight=problem.weight.float())
    for written in ("0.5", "0.8", "2:4"):
        losses = [
            problem.relative_loss(registry.solver("sparsegpt").solve(p, parse_sparsity(written)).weight.double())
            for p in (problem, single)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_weights_of_dead_inputs_go():
    solution = registry.solver("sparsegpt").solve(planted(dead=(0, 9, 47)), parse_sparsity("0.3"))
    assert not solution.weight[:, [0, 9, 47]].any()
    assert not solution.support[:, [0, 9, 47]].any()


def test_an_indefinite_matrix_is_refused_with_advice():
    problem = planted(tokens=12, seed=2)  # rank 12 of 48
    with pytest.raises(UserError, match=r"planted: .*raise method\.damping or calibrate on more windows") as error:
        registry.solver("sparsegpt", damping=0.0).solve(problem, parse_sparsity("0.5"))
    assert "\n" not in str(error.value)
    registry.solver("sparsegpt").solve(problem, parse_sparsity("0.5"))


@pytest.mark.parametrize("together", [False, True], ids=["alone", "stacked"])
def test_what_float32_cannot_factorise_is_factorised_in_float64(together):
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(-9, 10, (4, 192), generator=generator).float()  # whole numbers: float32 holds their sums
    problem = LayerProblem(torch.randn(6, 192, generator=generator), Inputs(gram=common.T @ common * 2**10))
    damping = 1e-6
    reversed_ = problem.gram.flip(0, 1) + damping * problem.diagonal.mean() * torch.eye(192)
    assert int(torch.linalg.cholesky_ex(reversed_).info)
    u = (_inverse_factors([problem], damping)[0] if together else inverse_factor(problem, damping)).double()
    damped = problem.gram.double() + damping * problem.diagonal.double().mean() * torch.eye(192, dtype=torch.float64)
    exact = torch.linalg.cholesky(damped.inverse(), upper=True)
    assert (u - exact).norm() < 1e-3 * exact.norm()
    with pytest.raises(UserError, match="is not positive definite"):
        inverse_factor(problem, 1e-12)


def test_inputs_whose_squares_float32_hardly_holds_are_solved_like_larger_ones():
    inputs, weight = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)), planted(4, 6, seed=2).weight.float()
    larger, tiny = (LayerProblem.from_inputs(weight, inputs * 2.0**scale) for scale in (0, -66))
    assert 0 < float(tiny.diagonal.max()) < torch.finfo(torch.float32).tiny
    one, other = (registry.solver("sparsegpt").solve(problem, parse_sparsity("0.5")) for problem in (larger, tiny))
    assert torch.equal(one.support, other.support)
    torch.testing.assert_close(other.weight, one.weight, rtol=1e-3, atol=1e-4)
