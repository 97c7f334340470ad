"""The weights on a support are the best ones: against least squares row by row, on degenerate layers, and in a run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from degenerate import Layer, bounded, layers
from helpers import planted, planted_inputs
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_tokens, words_for
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.layer.solver import LayerSolver, Solution
from alps_exp.methods import refit
from alps_exp.methods.refit import refitted
from alps_exp.patterns import parse_sparsity
from alps_exp.runs import run as runs
from alps_exp.runs.settings import resolve

METHODS = ("magnitude", "wanda", "dsnot", "sparsegpt", "alps")
BOTH = ("pcg", "exact")
EVERY = (*BOTH, "admm")


@dataclasses.dataclass(frozen=True)
class Given(LayerSolver):
    """A method whose answer is known."""

    weight: torch.Tensor
    support: torch.Tensor

    def _solve(self, problem, pattern):
        return Solution(self.weight, self.support, status="exact")


def fitted(problem: LayerProblem, support: torch.Tensor, how: str, start: torch.Tensor | None = None) -> torch.Tensor:
    weight = problem.weight * support if start is None else start
    return refitted(Given(weight, support), how).solve(problem, parse_sparsity("0.5")).weight


def least_squares(x: np.ndarray, weight: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Row by row the solution of X_S ŵ_S ≈ X w."""
    result = np.zeros_like(weight)
    for row, kept in enumerate(support):
        result[row, kept] = np.linalg.lstsq(x[:, kept], x @ weight[row], rcond=None)[0]
    return result


def loss(problem: LayerProblem, weight: torch.Tensor) -> float:
    """In float64 and relative to the dense output."""
    delta, dense, gram = (t.double() for t in (problem.weight - weight, problem.weight, problem.gram))
    energy = float(((dense @ gram) * dense).sum())
    return max(float(((delta @ gram) * delta).sum()), 0.0) / energy if energy > 0 else 0.0


@pytest.mark.parametrize("written", ["0.3", "0.7", "0.95", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_exact_is_the_least_squares_solution_on_the_methods_support(method, written):
    x, pattern = planted_inputs(400, 48, 7), parse_sparsity(written)
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    problem = LayerProblem.from_inputs(weight, x, sequences=4)
    plain = registry.solver(method).solve(problem, pattern)
    solution = refitted(registry.solver(method), "exact").solve(problem, pattern)
    assert torch.equal(solution.support, plain.support)
    assert (solution.status, solution.iterations) == (plain.status, plain.iterations)
    assert set(solution.seconds) == {*plain.seconds, "refit"}
    best = least_squares(x.numpy(), weight.numpy(), plain.support.numpy())
    np.testing.assert_allclose(solution.weight.numpy(), best, rtol=1e-3, atol=2e-3)
    expected = loss(problem, torch.from_numpy(best))
    assert (
        expected * (1 - 1e-9)
        <= loss(problem, solution.weight)
        <= min(expected * (1 + 1e-6), loss(problem, plain.weight))
    )


@pytest.mark.parametrize("method", METHODS)
def test_conjugate_gradients_come_near_in_float32(method):
    problem, pattern = planted(dtype=torch.float32), parse_sparsity("0.6")
    none, pcg, exact = (
        loss(problem, refitted(registry.solver(method), how).solve(problem, pattern).weight)
        for how in ("none", "pcg", "exact")
    )
    assert exact <= pcg * (1 + 1e-6) and pcg <= min(none, exact * 1.005)


def test_shared_gram_matrices_and_batches_of_rows(monkeypatch):
    problem = planted(rows=40, dtype=torch.float32)
    other = LayerProblem(problem.weight.flip(0) * 3, Inputs(gram=problem.gram), "other")
    pattern, solver = parse_sparsity("0.6"), refitted(registry.solver("magnitude"), "exact")
    one, two = solver.solve_group([problem, other], [pattern, pattern])
    torch.testing.assert_close(two.weight, one.weight.flip(0) * 3, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(refit, "_BATCH", 3 * 30**2)
    torch.testing.assert_close(solver.solve(problem, pattern).weight, one.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", EVERY)
def test_rows_that_keep_nothing_or_all(how):
    problem = planted(dtype=torch.float64)
    support = parse_sparsity("0.5").keep(problem.weight.abs())
    support[3], support[4] = False, True
    weight = fitted(problem, support, how, start=torch.where(support, 0.5 * problem.weight, 0))
    assert not weight[~support].any()
    delta = weight[4] - problem.weight[4]
    assert float(delta @ problem.gram @ delta) < 1e-4 * float(problem.weight[4] @ problem.gram @ problem.weight[4])


@pytest.mark.parametrize("how", EVERY)
def test_weights_of_dead_inputs_stay_as_the_method_left_them(how):
    problem = planted(dead=(2, 5))
    support = torch.ones_like(problem.weight, dtype=torch.bool)
    support[:, 7:20] = False
    start = problem.weight * support
    start[:, 5] = 0.25
    weight = fitted(problem, support, how, start)
    assert torch.equal(weight[:, [2, 5]], start[:, [2, 5]])
    assert loss(problem, weight) < 0.9 * loss(problem, start)


@pytest.mark.parametrize("how", EVERY)
def test_an_optimum_is_left_alone_and_a_better_start_kept(how):
    x, support = planted_inputs(400, 48, 7), parse_sparsity("0.5").keep(planted().weight.abs())
    problem = LayerProblem.from_inputs(planted().weight, x)
    best = torch.from_numpy(least_squares(x.numpy(), problem.weight.numpy(), support.numpy()))
    assert loss(problem, fitted(problem, support, how, best)) <= loss(problem, best) * (1 + 1e-12)


def test_fewer_tokens_than_kept_inputs_are_fitted_without_large_weights():
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    problem = LayerProblem.from_inputs(weight, x)
    solution = refitted(registry.solver("magnitude"), "exact").solve(problem, parse_sparsity("0.5"))
    assert loss(problem, solution.weight) < 1e-9
    assert float(solution.weight.abs().max()) < 3 * float(weight.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", EVERY)
@bounded(8)
@given(data=st.data())
def test_degenerate_layers_never_lose(method, how, data):
    written = data.draw(st.sampled_from(["0.5", "0.9", "2:4", "1:4"]))
    problem, pattern = data.draw(layers(written)).problem(), parse_sparsity(written)
    before = registry.solver(method).solve(problem, pattern)
    after = refitted(registry.solver(method), how).solve(problem, pattern)
    assert torch.equal(before.support, after.support) and torch.isfinite(after.weight).all()
    assert not after.weight[~after.support].any() and after.weight.dtype == problem.weight.dtype
    assert loss(problem, after.weight) <= loss(problem, before.weight) * (1 + 1e-9) + 1e-15


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("rows", [1, 9])
def test_fewer_tokens_than_inputs_are_fitted_in_float32_too(rows, tokens):
    layer = Layer(rows, 7, tokens, frozenset(), None, torch.float32, 0)
    for seed in range(40):
        problem = dataclasses.replace(layer, seed=seed).problem()
        support = parse_sparsity("0.5").keep(problem.weight.abs())
        none = loss(problem, problem.weight * support)
        pcg, exact = (loss(problem, fitted(problem, support, how)) for how in BOTH)
        assert max(pcg, exact) <= none * 1.01 and pcg <= exact * 1.01 + 1e-6


@pytest.mark.slow
def test_losses_of_rounding_are_compared_beyond_it():
    layer, worse = Layer(1, 7, 1, frozenset(), None, torch.float32, 0), []
    for seed in range(60):
        problem = dataclasses.replace(layer, seed=seed).problem()
        support = parse_sparsity("0.5").keep(problem.weight.abs())
        start = fitted(problem, support, "exact")
        worse += [seed] if loss(problem, fitted(problem, support, "pcg", start)) > loss(problem, start) else []
    assert worse == []


def test_what_is_no_gram_matrix_is_named():
    problem = planted(rows=4, width=8)
    bent = problem.gram - 3 * torch.linalg.eigvalsh(problem.gram)[-1] * torch.ones(8, 8).fill_diagonal_(0)
    problem = LayerProblem(problem.weight, Inputs(gram=bent), "layers.7.mlp.fc1")
    with pytest.raises(UserError, match=r"^layers\.7\.mlp\.fc1: the Gram matrix has negative eigenvalues"):
        fitted(problem, parse_sparsity("0.5").keep(problem.weight.abs()), "exact")


def test_prune_layer_refits_and_refuses():
    weight, x = torch.randn(8, 16), torch.randn(100, 16)
    plain = alps_exp.prune_layer(weight, inputs=x, method="magnitude")
    best = alps_exp.prune_layer(weight, inputs=x, method="magnitude", refit="exact")
    problem = LayerProblem.from_inputs(weight, x)
    assert problem.relative_loss(best.weight) < problem.relative_loss(plain.weight)
    with pytest.raises(UserError, match="refit"):
        alps_exp.prune_layer(weight, inputs=x, refit="all")
    with pytest.raises(UserError, match="inputs"):
        alps_exp.prune_layer(weight, method="magnitude", refit="pcg")
    assert torch.equal(alps_exp.prune_layer(weight, inputs=x, method="dense", refit="exact").weight, weight)


def test_prune_model_refits_any_method(tiny_llama):
    ids = random_tokens(4, 64)
    losses = {}
    for how in ("none", "pcg", "exact"):
        network = AutoModelForCausalLM.from_pretrained(tiny_llama)
        record = alps_exp.prune_model(network, ids, "magnitude", losses=False, refit=how, include=["layers.0.*"])
        assert record["config"]["refit"] == how and record["method"] == "magnitude"
        losses[how] = {row["name"]: row["relative_loss"] for row in record["layers"]}
    assert set(losses["none"].values()) == {None}, "no statistics, no loss"
    for name in losses["pcg"]:
        assert losses["exact"][name] <= losses["pcg"][name] * (1 + 1e-5) <= losses["exact"][name] * 1.01


@pytest.mark.slow
def test_a_run_refits_and_says_so(tiny_opt, text_file, tmp_path):
    words = words_for(tiny_opt, text_file, "nsamples=4", "seqlen=64")
    words += ["eval=none", "method=wanda"]
    records = {how: runs.run(compose([*words, f"refit={how}"]), tmp_path / how) for how in ("none", *EVERY)}
    assert len({record["config_hash"] for record in records.values()}) == 4
    assert {record["method"] for record in records.values()} == {"wanda"}
    first = {how: record["layers"][0] for how, record in records.items()}
    assert "refit" in first["pcg"]["seconds_by_phase"] and first["pcg"]["stats"]["refit_iterations"] > 0
    assert first["exact"]["relative_loss"] <= first["pcg"]["relative_loss"] < first["none"]["relative_loss"]
    assert first["exact"]["relative_loss"] <= first["admm"]["relative_loss"] < first["none"]["relative_loss"]
    assert first["admm"]["stats"]["refit_iterations"] == 20
    dense = runs.run(compose([*words, "method=dense", "refit=exact"]), tmp_path / "dense")
    assert dense["layers"] == []
    with pytest.raises(UserError, match="refit='best' is not allowed"):
        resolve(compose([*words, "refit=best"]))
