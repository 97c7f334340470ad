"""(H + ρI)⁻¹, exact and interpolated, and the paths of ALPS that use either."""

import pytest
import torch
from helpers import planted

from alps_exp.base.errors import UserError
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.layer.scaled import ScaledGram
from alps_exp.numerics import resolvent
from alps_exp.numerics.resolvent import Resolvent, inverse
from alps_exp.patterns import Unstructured, parse_sparsity


def gram(width: int = 48) -> torch.Tensor:
    return ScaledGram(planted(width=width).inputs, 0.01).gram


@pytest.mark.parametrize("rho", [0.01, 0.1, 3.0])
def test_exact_inverse(rho):
    h = gram()
    eye = torch.eye(48, dtype=torch.float64)
    for result in (inverse(h, rho), Resolvent(h, 0.1, exact=True).at(rho)):
        torch.testing.assert_close(result @ (h + rho * eye), eye, rtol=0, atol=1e-10)


# From the start of a span to its end, across its border, and below the start as the paper's rule may go.
@pytest.mark.parametrize("rho", [0.1, 0.12, 0.5, 1.4, 1.5, 2.3, 22.0, 0.02, 0.0001])
def test_interpolation_is_close_at_every_eigenvalue(rho):
    h = gram()
    values, vectors = torch.linalg.eigh(h)
    found = torch.diagonal(vectors.T @ Resolvent(h, 0.1, exact=False).at(rho) @ vectors)
    assert float(((found - 1 / (values + rho)) * rho).abs().max()) < 0.06


def test_a_span_is_factorised_once(monkeypatch):
    made = []
    monkeypatch.setattr(resolvent, "inverse", lambda h, rho, name: made.append(rho) or inverse(h, rho))
    shared = Resolvent(gram(), 0.1, exact=False)
    for step in range(14):
        shared.at(0.1 * 1.2**step)
        shared.at(0.1 * 1.2**step)
    assert len(made) == 4
    shared.at(2.5)
    assert len(made) == 8


# The powers of one inverse stand for four inverses where products are cheap.
@pytest.mark.parametrize("rho", [0.1, 0.12, 0.38729, 0.5, 1.49, 1.5, 2.3, 22.0, 0.02, 0.0001])
def test_powers_are_closer_yet_relative_to_each_eigenvalue(monkeypatch, rho):
    monkeypatch.setattr(resolvent, "multiplies", lambda device: True)
    h = gram()
    values, vectors = torch.linalg.eigh(h)
    found = torch.diagonal(vectors.T @ Resolvent(h, 0.1, exact=False).at(rho) @ vectors)
    assert float((found * (values + rho) - 1).abs().max()) < 0.023


def test_the_middle_of_a_span_is_factorised_once(monkeypatch):
    made = []
    monkeypatch.setattr(resolvent, "multiplies", lambda device: True)
    monkeypatch.setattr(resolvent, "inverse", lambda h, rho, name: made.append(rho) or inverse(h, rho))
    shared = Resolvent(gram(), 0.1, exact=False)
    assert [shared.covers(rho) for rho in (0.1, 1.49, 1.51)] == [True, True, False]
    for step in range(16):
        shared.at(0.1 * 1.2**step)
    assert made == pytest.approx([0.1 * 15**0.5, 0.1 * 15**1.5])


def test_half_precision_keeps_what_is_tiny():
    shared = Resolvent(gram().float() * 1e-3 + torch.eye(48), 0.1, exact=False)
    half = shared.half_at(0.3, 2.0**14)
    torch.testing.assert_close(half.float() / 0.3 / 2**14, shared.at(0.3), rtol=1e-3, atol=1e-9)


def test_float8_leaves_the_diagonal_out():
    shared = Resolvent(gram().float() * 1e-2 + torch.eye(48), 0.1, exact=False)
    eight, diagonal = shared.eight_at(0.3, 2.0**14, 512.0)
    wanted = 0.3 * shared.at(0.3)
    torch.testing.assert_close(diagonal, wanted.diagonal(), rtol=1e-3, atol=0)
    found = eight.float() / 512
    assert not found.diagonal().any() and float(found.abs().max()) > 5e-4
    torch.testing.assert_close(found, wanted - wanted.diagonal().diag(), rtol=0.07, atol=4e-6)


def test_lower_precision_is_the_rounded_inverse():
    shared = Resolvent(gram().float(), 0.1, exact=False)
    low = shared.low_at(0.3, torch.bfloat16)
    assert low.dtype == torch.bfloat16 and torch.equal(low, shared.at(0.3).bfloat16())
    assert torch.equal(shared.low_at(0.4, torch.bfloat16), shared.at(0.4).bfloat16())


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(UserError, match="not positive semi-definite"):
        inverse(-torch.eye(3), 0.1)


def wide_layer() -> LayerProblem:
    """A layer large enough for the sampled threshold of the iterations."""
    problem = planted(rows=300, width=256, tokens=1500, seed=3, dtype=torch.float32)
    return LayerProblem(problem.weight, Inputs(gram=problem.gram))


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("written", ["0.5", "0.7", "0.9", "2:4"])
def test_the_fast_path_is_as_good_as_the_exact_one(monkeypatch, written, powers):
    monkeypatch.setattr(resolvent, "multiplies", lambda device: powers)
    problem, pattern = wide_layer(), parse_sparsity(written)
    fast, exact = (registry.solver("alps", exact=value).solve(problem, pattern) for value in (False, True))
    assert int(fast.support.sum()) == int(exact.support.sum())
    ratio = problem.relative_loss(fast.weight) / problem.relative_loss(exact.weight)
    assert 0.99 < ratio < 1.01


def test_a_tracker_finds_the_count():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(400, 300, generator=generator).abs()
    pattern = Unstructured(0.7)
    tracker, errors = pattern.tracker(), []
    for _ in range(8):
        score = score + 0.01 * torch.randn(400, 300, generator=generator)
        mask = tracker(score)
        errors.append(abs(int(mask.sum()) - 36000))
        assert bool((score[mask].min() >= score[~mask].max()).all())
    assert max(errors[3:]) <= 0.003 * 36000, errors


def test_trackers_of_small_layers_and_groups_are_exact():
    score = torch.rand(16, 32)
    for pattern in (Unstructured(0.7), parse_sparsity("2:4")):
        assert torch.equal(pattern.tracker()(score), pattern.keep(score))
