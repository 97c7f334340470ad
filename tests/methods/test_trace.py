"""Traces of iterations against loops in numpy, and that they change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import planted, stable_top

from alps_exp import UserError
from alps_exp.cli.overrides import compose
from alps_exp.layer.registry import solver
from alps_exp.patterns import parse_sparsity
from alps_exp.runs.naming import config_hash, plain, run_name


def relative(problem, weight) -> float:
    gram, dense = problem.gram.numpy(), problem.weight.numpy()
    return float(np.sum(((dense - weight) @ gram) * (dense - weight)) / np.sum((dense @ gram) * dense))


def top(score: np.ndarray, kept: int) -> np.ndarray:
    """The largest of (in, out), places counted row by row of (out, in)."""
    return stable_top(score.T.reshape(-1), kept).reshape(score.T.shape).T


def alps(problem, share: float, rho: float, growth: float, every: int, damping: float, count: int) -> dict:
    gram = problem.gram.numpy()
    h = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    e = np.diag(h) ** -0.5
    h, w = h * np.outer(e, e), problem.weight.numpy().T / e[:, None]
    kept = round((1 - share) * w.size)
    d, v, mask = w * top(np.abs(w), kept), np.zeros_like(w), None
    found = {"loss": [], "change": [], "rho": []}
    for number in range(1, count + 1):
        b = np.linalg.solve(h + rho * np.eye(len(h)), h @ w - v + rho * d)
        new = top(np.abs(b + v / rho), kept)
        d = (b + v / rho) * new
        v = v + rho * (b - d)
        found["loss"].append(relative(problem, (d * e[:, None]).T))
        found["change"].append(0 if mask is None else (new ^ mask).sum() / kept)
        found["rho"].append(rho)
        mask, rho = new, rho * growth if number % every == 0 else rho
    return found


def admm_grad(problem, share: float) -> dict:
    gram = problem.gram.numpy()
    norms = np.sqrt(np.diag(gram))
    h = gram / np.outer(norms, norms) + 0.1 * np.eye(len(gram))
    w = norms[:, None] * problem.weight.numpy().T
    right, inverse, u, mask = h @ w, np.linalg.inv(h + np.eye(len(h))), np.zeros_like(w), None
    found = {"loss": [], "change": []}
    for t in range(20):
        new = top(np.abs(w + u), round((1 - share * (1 - (1 - (t + 1) / 15) ** 3)) * w.size)) if t < 15 else mask
        z = (w + u) * new
        found["loss"].append(relative(problem, (z / norms[:, None]).T))
        found["change"].append(0 if mask is None else (new ^ mask).sum() / new.sum())
        u, mask = u + w - z, new
        w = inverse @ (right + z - u)
    return found


@pytest.mark.parametrize("growth", [1.0, 1.3], ids=["fixed", "growing"])
def test_the_trace_of_alps_is_that_of_a_plain_loop(growth):
    problem, pattern = planted(rows=16, seed=70), parse_sparsity(0.6)
    method = solver("alps", growth=growth, rho=0.2, update_every=3, damping=0.01, trace=True, max_iterations=40)
    solution = method.solve(problem, pattern)
    trace = solution.stats["trace"]
    assert len(trace["loss"]) == solution.iterations > 6
    expected = alps(problem, 0.6, 0.2, growth, 3, 0.01, solution.iterations)
    for key, values in expected.items():
        np.testing.assert_allclose(trace[key], values, rtol=2e-4, atol=1e-7, err_msg=key)
    assert (len(set(trace["rho"])) == 1) == (growth == 1)
    assert growth == 1 or trace["loss"][-1] < 0.9 * trace["loss"][0]


def test_the_trace_of_admm_grad_is_that_of_a_plain_loop():
    problem = planted(rows=16, seed=71)
    trace = solver("admm-grad", trace=True).solve(problem, parse_sparsity(0.7)).stats["trace"]
    for key, values in admm_grad(problem, 0.7).items():
        np.testing.assert_allclose(trace[key], values, rtol=2e-4, atol=1e-7, err_msg=key)
    assert trace["rho"] == [1.0] * 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alps", "alps-paper", "alps-simple", "admm-grad"])
def test_a_trace_changes_no_result_and_without_one_no_hash(name):
    for written in ("0.7", "2:4"):
        problem, pattern = planted(seed=72, dtype=torch.float32), parse_sparsity(written)
        untraced, traced = (solver(name, trace=trace).solve(problem, pattern) for trace in (False, True))
        assert torch.equal(untraced.weight, traced.weight) and torch.equal(untraced.support, traced.support)
        assert "trace" not in untraced.stats and traced.stats["trace"]["loss"]
    without, with_ = compose([f"method={name}"]), compose([f"method={name}", "method.trace=true"])
    assert config_hash(without) != config_hash(with_)
    before = dict(plain(compose([f"method={name}"])))
    before["method"] = {key: value for key, value in before["method"].items() if key != "trace"}
    assert config_hash(before) == config_hash(without) and run_name(before) == run_name(without)
    with pytest.raises(UserError, match=r"method\.trace"):
        solver(name, trace="loud")
