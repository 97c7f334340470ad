"""LayerProblem: its loss and statistics against direct computation, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import planted, planted_inputs

from alps_exp.base.errors import UserError
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem, Statistics


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_relative_loss_is_that_of_the_outputs(dtype, tolerance):
    x = planted_inputs(200, 16, seed=1)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    candidate = weight * (torch.arange(16) % 2)
    direct = (x @ (weight - candidate).T).square().sum() / (x @ weight.T).square().sum()
    problem = LayerProblem.from_inputs(weight.to(dtype), x.to(dtype))
    assert problem.relative_loss(candidate.to(dtype)) == pytest.approx(float(direct), rel=tolerance)
    assert problem.relative_loss(problem.weight) == 0
    assert problem.relative_loss(torch.zeros_like(weight)) == pytest.approx(1, rel=tolerance)


def test_loss_of_a_layer_without_output():
    problem = LayerProblem(torch.zeros(2, 4), Inputs(gram=torch.eye(4)))
    assert problem.relative_loss(torch.zeros(2, 4)) == 0
    assert problem.relative_loss(torch.ones(2, 4)) == float("inf")


def test_statistics_of_inputs():
    x = planted_inputs(60, 5, seed=3, sequences=3)
    problem = LayerProblem.from_inputs(torch.ones(2, 5, dtype=torch.float64), x, sequences=3)
    within = torch.zeros(5, dtype=torch.float64)
    for part in (x[:20], x[20:40], x[40:]):
        within += ((part - part.mean(0)) ** 2).mean(0) / 3
    gram = sum(torch.outer(row, row) for row in x)
    torch.testing.assert_close(problem.gram, gram)
    torch.testing.assert_close(problem.diagonal, gram.diagonal())
    torch.testing.assert_close(problem.mean, x.sum(0) / 60)
    torch.testing.assert_close(problem.var, within)
    assert not torch.allclose(problem.var, x.var(0, unbiased=False), rtol=1e-3), "levels must differ between sequences"
    assert (problem.tokens, problem.sequences) == (60, 3)
    stacked = LayerProblem.from_inputs(problem.weight, x.view(3, 20, 5))
    assert torch.equal(stacked.var, problem.var)
    assert stacked.sequences == 3


def test_half_precision_is_computed_in_float32():
    problem = LayerProblem.from_inputs(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.float16))
    assert problem.weight.dtype == problem.gram.dtype == problem.var.dtype == torch.float32


def test_dead_inputs():
    assert planted(dead=(1, 4)).dead.nonzero().view(-1).tolist() == [1, 4]
    assert not LayerProblem(torch.ones(2, 3)).dead.any()


def test_available_and_required_statistics():
    full = planted()
    weight = full.weight
    moments = dict(diagonal=full.diagonal, mean=full.mean, var=full.var)
    assert Inputs().available is Statistics.NONE
    assert Inputs(diagonal=full.diagonal).available is Statistics.DIAGONAL
    assert Inputs(**moments).available is Statistics.MOMENTS
    assert Inputs(gram=full.gram).available is Statistics.GRAM
    assert full.inputs.available is Statistics.ALL
    full.require(Statistics.ALL)
    LayerProblem(weight).require(Statistics.NONE)
    LayerProblem(weight, Inputs(**moments, tokens=400, sequences=4)).require(Statistics.MOMENTS)


@pytest.mark.parametrize(
    ("level", "dropped", "named"),
    [
        (Statistics.GRAM, "gram", "gram="),
        (Statistics.DIAGONAL, "diagonal", "gram="),
        (Statistics.MOMENTS, "mean", "mean="),
        (Statistics.MOMENTS, "var", "var="),
        (Statistics.MOMENTS, "tokens", "tokens="),
        (Statistics.MOMENTS, "sequences", "sequences="),
    ],
)
def test_missing_statistics_are_named(level, dropped, named):
    full = planted()
    lost = {dropped: None} if dropped != "diagonal" else {"diagonal": None, "gram": None}
    lost |= {"diagonal": None} if dropped == "gram" and level is Statistics.DIAGONAL else {}
    bare = LayerProblem(full.weight, full.inputs.replaced(**lost), full.name)
    with pytest.raises(UserError, match=r"planted: .*give inputs=X") as error:
        bare.require(level)
    assert str(error.value).rpartition(", or ")[2] == named


def test_loss_without_gram_is_refused():
    with pytest.raises(UserError, match="inputs=X or gram=G"):
        LayerProblem(torch.ones(2, 3), Inputs(diagonal=torch.ones(3))).relative_loss(torch.zeros(2, 3))


def test_a_problem_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        planted().weight = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(weight=torch.ones(3)), "non-empty matrix"),
        (dict(weight=torch.ones(0, 3)), "non-empty matrix"),
        (dict(weight=torch.ones(2, 3), inputs=Inputs(gram=torch.eye(2))), r"gram must have shape \(3, 3\)"),
        (dict(weight=torch.ones(2, 3), inputs=Inputs(mean=torch.ones(2))), r"mean must have shape \(3,\)"),
        (dict(weight=torch.full((2, 3), float("nan"))), "weight has 6 NaN"),
    ],
)
def test_construction_refuses(fields, message):
    with pytest.raises(UserError, match=message) as error:
        LayerProblem(**fields, name="layers.0.q_proj")
    assert str(error.value).startswith(("layers.0.q_proj: ", "the layer: "))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(gram=torch.full((3, 3), float("inf"))), "gram of the inputs has NaN"),
        (dict(gram=-torch.eye(3)), "negative diagonal"),
        (dict(gram=torch.eye(3), mean=torch.ones(2)), r"mean must have shape \(3,\)"),
        (dict(gram=torch.ones(3)), r"gram must have shape \(3, 3\)"),
        (dict(gram=torch.eye(3), held_out=torch.eye(2)), r"held_out must have shape \(3, 3\)"),
        (dict(gram=torch.eye(3), correction=torch.ones(5, 2)), r"correction must have shape \(5, 3\)"),
        (dict(gram=torch.ones(0, 0)), "must not be empty"),
        (dict(gram=torch.eye(3).to_sparse()), "must be a dense tensor"),
        (dict(diagonal=torch.ones(3, dtype=torch.int64)), "real floating-point"),
    ],
)
def test_statistics_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        Inputs(**fields, name="layers.0.q_proj")
    assert str(error.value).startswith("layers.0.q_proj: ")


def test_inputs_that_move_nowhere_stay_themselves():
    inputs = Inputs(gram=torch.eye(3), tokens=4)
    assert inputs.to(torch.zeros(1)) is inputs
    moved = inputs.to(torch.zeros(1, dtype=torch.float64))
    assert moved.gram.dtype == moved.diagonal.dtype == torch.float64 and moved.tokens == 4 and moved.width == 3


@pytest.mark.parametrize(("shape", "sequences"), [((10, 4), None), ((10,), None), ((0, 3), None), ((10, 3), 4)])
def test_inputs_that_do_not_fit_are_refused(shape, sequences):
    with pytest.raises(UserError):
        LayerProblem.from_inputs(torch.ones(2, 3), torch.ones(shape), sequences=sequences)
