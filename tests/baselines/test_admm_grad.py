"""ADMM-Grad iteration by iteration against a loop in numpy, by its published form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import planted, stable_top

from alps_exp.base.errors import UserError
from alps_exp.baselines.admm_grad import AdmmGrad
from alps_exp.layer.problem import LayerProblem
from alps_exp.layer.solver import LayerSolver, Solution
from alps_exp.methods.refit import refitted
from alps_exp.patterns import NM, Pattern, parse_sparsity


def chosen(score: np.ndarray, pattern: Pattern, share: float) -> np.ndarray:
    """The support (in, out) that leaves this share of the weights zero; places are counted row by row of (out, in)."""
    flat = score.T.copy()
    if isinstance(pattern, NM):
        groups = flat.reshape(-1, pattern.width)
        for group in groups:
            group[stable_top(group, pattern.kept)] = np.inf
    return stable_top(flat.reshape(-1), round((1 - share) * flat.size)).reshape(flat.shape).T


def reference(problem: LayerProblem, pattern, schedule: str, iterations: int, selections: int, damping: float):
    """The weight (out, in), and of every iteration |W + U| (in, out) and the support; in-major, with WH itself.

    `pattern` is the support (out, in) itself where selections is 0.
    """
    gram = problem.gram.numpy()
    norms = np.sqrt(np.diag(gram))
    scaled = np.divide(gram, np.outer(norms, norms), out=np.zeros_like(gram), where=np.outer(norms, norms) > 0)
    h = scaled + damping * np.diag(scaled).mean() * np.eye(len(gram))
    w = norms[:, None] * problem.weight.numpy().T
    right, inverse, u = h @ w, np.linalg.inv(h + np.eye(len(gram))), np.zeros_like(w)
    trace, mask = [], None if selections else pattern.T
    for t in range(iterations):
        if t < selections:
            full = schedule == "code" and not isinstance(pattern, NM)
            share = pattern.sparsity * (1 if full else 1 - (1 - (t + 1) / selections) ** 3)
            mask = chosen(np.abs(w + u), pattern, share)
        trace.append((np.abs(w + u), mask))
        z = (w + u) * mask
        u = u + w - z
        w = inverse @ (right + z - u)
    z = (w + u) * mask
    return np.divide(z, norms[:, None], out=np.zeros_like(z), where=norms[:, None] > 0).T, trace


@pytest.mark.parametrize("schedule", ["paper", "code"])
@pytest.mark.parametrize("written", ["0.3", "0.5", "0.8", "0.95", "2:4", "4:8", "1:4", "3:4", "5:12"])
def test_every_iteration_equals_the_reference(written, schedule, monkeypatch):
    problem, pattern = planted(rows=16, seed=40), parse_sparsity(written)
    seen, keep = [], AdmmGrad._keep

    def spy(self, iteration, score, pattern):
        seen.append((score, keep(self, iteration, score, pattern)))
        return seen[-1][1]

    monkeypatch.setattr(AdmmGrad, "_keep", spy)
    solution = AdmmGrad(schedule=schedule).solve(problem, pattern)
    weight, trace = reference(problem, pattern, schedule, 20, 15, 0.1)
    assert len(seen) == 15 and solution.iterations == 20 and solution.stats == {"schedule": schedule}
    unit = trace[0][0].max() / float(seen[0][0].max())
    for (score, support), (expected, mask) in zip(seen, trace, strict=False):
        np.testing.assert_allclose(score.numpy() * unit, expected.T, rtol=1e-9, atol=1e-9 * expected.max())
        assert np.array_equal(support.numpy(), mask.T)
    assert np.array_equal(solution.support.numpy(), trace[-1][1].T)
    np.testing.assert_allclose(solution.weight.numpy(), weight, rtol=1e-8, atol=1e-10)
    zeros = [int((~support).sum()) for _, support in seen]
    if schedule == "code" and not isinstance(pattern, NM):
        assert len(set(zeros)) == 1
    else:
        assert zeros[0] < 0.3 * zeros[-1] and zeros == sorted(zeros)


@pytest.mark.parametrize(("iterations", "selections", "damping"), [(1, 1, 0.1), (7, 3, 0.0), (60, 45, 1.0)])
def test_other_lengths_and_dampings(iterations, selections, damping):
    for written in ("0.6", "2:4"):
        problem, pattern = planted(rows=16, seed=41), parse_sparsity(written)
        solution = AdmmGrad("paper", iterations, selections, damping).solve(problem, pattern)
        weight, trace = reference(problem, pattern, "paper", iterations, selections, damping)
        assert np.array_equal(solution.support.numpy(), trace[-1][1].T)
        np.testing.assert_allclose(solution.weight.numpy(), weight, rtol=1e-8, atol=1e-10)


def test_dead_inputs_lose_their_weights_and_disturb_nothing():
    problem = planted(seed=42, dead=(0, 7, 8, 30))
    solution = AdmmGrad().solve(problem, parse_sparsity("0.5"))
    weight, _ = reference(problem, parse_sparsity("0.5"), "paper", 20, 15, 0.1)
    assert not solution.support[:, problem.dead].any()
    np.testing.assert_allclose(solution.weight.numpy(), weight, rtol=1e-8, atol=1e-10)


@dataclasses.dataclass(frozen=True)
class Given(LayerSolver):
    """A method whose answer is known."""

    weight: torch.Tensor
    support: torch.Tensor

    def _solve(self, problem, pattern):
        return Solution(self.weight, self.support)


def test_refit_is_the_iteration_with_a_fixed_support():
    problem = planted(seed=43)
    support = parse_sparsity("0.6").keep(problem.weight.abs())
    start = problem.weight * support
    start[5] = problem.weight[5] = 0  # nothing to gain
    found = refitted(Given(start, support), "admm").solve(problem, parse_sparsity("0.6"))

    weight, _ = reference(problem, support.numpy(), "paper", 20, 0, 0.1)
    np.testing.assert_allclose(found.weight.numpy(), weight, rtol=1e-8, atol=1e-10)
    assert found.stats == {"refit_iterations": 20} and "refit" in found.seconds
    assert problem.relative_loss(found.weight) < 0.9 * problem.relative_loss(start)


def test_values_that_do_not_go_together_are_refused():
    with pytest.raises(UserError, match=r"selections=21 is not allowed with method.iterations=20"):
        AdmmGrad(selections=21)
    with pytest.raises(UserError, match="schedule='cubic' is not allowed"):
        AdmmGrad(schedule="cubic")
