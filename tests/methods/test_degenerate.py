"""Degenerate layers, found by hypothesis: every method under every pattern solves them or names what is wrong.

A layer here may have dead, constant, copied or enormous inputs, one token, one row, one column, weights that are zero
or all alike, and any scale from 1e-20 to 1e20. A solution is finite, has its exact counts and its zeros; the scale of
weights and inputs changes nothing but the scale of the result; nothing but NaN, infinity, overflow and a matrix that
is no Gram matrix may be refused, and then by the layer's name.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from degenerate import bounded, layers
from helpers import methods_for_a_layer, selection_blocks
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_tokens
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.patterns import NM, parse_sparsity

PATTERNS = ("0.5", "0.9", "2:4", "4:8", "1:4")
METHODS = [name for name in methods_for_a_layer() if registry.solver(name).prunes]
VARIANTS = [(name, {}) for name in METHODS] + [
    ("dsnot", {"start": "sparsegpt"}),
    ("dsnot", {"start": "magnitude", "same_sign": False}),
    ("sparseswaps", {"start": "magnitude"}),
    ("admm-grad", {"schedule": "code"}),
]

each_variant = pytest.mark.parametrize(
    ("method", "options"), VARIANTS, ids=["-".join([name, *map(str, options.values())]) for name, options in VARIANTS]
)
each_pattern = pytest.mark.parametrize(
    "written", [text if text in ("0.9", "2:4") else pytest.param(text, marks=pytest.mark.slow) for text in PATTERNS]
)


def assert_valid(solution, problem: LayerProblem, written: str, selection: str) -> None:
    """Finite, zero off the support, and of exact counts; dead inputs may be dropped beyond the count."""
    assert solution.weight.shape == solution.support.shape == problem.weight.shape
    assert solution.weight.dtype == problem.weight.dtype
    assert torch.isfinite(solution.weight).all()
    assert not solution.weight[~solution.support].any()
    assert not torch.signbit(solution.weight[~solution.support]).any(), "pruned is +0"
    pattern = parse_sparsity(written)
    dead = problem.dead.expand_as(solution.support)
    if isinstance(pattern, NM):
        kept, lost = (part.reshape(-1, pattern.width).sum(1) for part in (solution.support, dead))
        assert ((kept <= pattern.kept) & (kept >= pattern.kept - lost)).all()
        return
    for rows, columns in selection_blocks(selection, tuple(problem.weight.shape)):
        size = solution.support[rows, columns].numel()
        whole = selection == "layer"
        count = round((1 - pattern.sparsity) * size) if whole else size - math.floor(pattern.sparsity * size + 1e-9)
        kept = int(solution.support[rows, columns].sum())
        assert count - int(dead[rows, columns].sum()) <= kept <= count


@each_variant
@each_pattern
@bounded(4)
@given(data=st.data())
def test_degenerate_layers_are_solved_at_any_scale(method, options, written, data):
    solver, layer = registry.solver(method, **options), data.draw(layers(written))
    plain = layer.problem()
    solution = solver.solve(plain, parse_sparsity(written))
    assert_valid(solution, plain, written, solver.selection)
    loss = plain.relative_loss(solution.weight)
    assert loss >= 0 and math.isfinite(loss)

    inputs = data.draw(st.integers(-45, 45))
    # DSnoT's threshold is absolute, in units of the layer's output: only scales that leave the output alone.
    weights = -inputs if method == "dsnot" else data.draw(st.integers(-60, 60))
    scaled = layer.problem(weights, inputs)
    again = solver.solve(scaled, parse_sparsity(written))
    assert torch.equal(again.support, solution.support)
    assert torch.equal(again.weight, solution.weight * 2.0**weights)
    assert scaled.relative_loss(again.weight) == pytest.approx(loss, rel=1e-6)


@each_variant
@bounded(10)
@given(data=st.data())
def test_scales_at_the_end_of_float32_are_solved_or_named(method, options, data):
    solver, written = registry.solver(method, **options), data.draw(st.sampled_from(PATTERNS))
    layer = dataclasses.replace(data.draw(layers(written)), dtype=torch.float32)
    weights, inputs = (data.draw(st.sampled_from([-120, -66, 0, 66, 120])) for _ in range(2))
    try:
        problem = layer.problem(weights, inputs)
        solution = solver.solve(problem, parse_sparsity(written))
    except UserError as error:
        assert str(error).startswith("layers.7.mlp.fc1: ") and "\n" not in str(error)
        assert weights > 100 or inputs > 0, "nothing overflows"
        return
    assert_valid(solution, problem, written, solver.selection)


@each_variant
@bounded(8)
@given(data=st.data())
def test_a_matrix_that_is_no_gram_matrix_is_refused_or_does_no_harm(method, options, data):
    solver, written = registry.solver(method, **options), data.draw(st.sampled_from(PATTERNS))
    layer = dataclasses.replace(data.draw(layers(written)), input_defects=frozenset(), dtype=torch.float32)
    problem = layer.problem()
    # One direction gets a negative eigenvalue; the diagonal stays positive.
    values, vectors = torch.linalg.eigh(problem.gram)
    share = data.draw(st.sampled_from([1e-6, 1e-3, 0.3]))
    bent = problem.gram - (values[0] + share * values[-1]) * vectors[:, :1] @ vectors[:, :1].T
    if bool((bent.diagonal() <= 0).any()):
        return
    inputs = problem.inputs.replaced(gram=bent, diagonal=None)
    problem = dataclasses.replace(problem, inputs=inputs)
    try:
        solution = solver.solve(problem, parse_sparsity(written))
    except UserError as error:
        assert Statistics.GRAM in solver.statistics
        assert str(error).startswith("layers.7.mlp.fc1: the Gram matrix") and "\n" not in str(error)
        return
    assert_valid(solution, problem, written, solver.selection)


@pytest.mark.parametrize("method", methods_for_a_layer())
@bounded(8)
@given(
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    count=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_bad_numbers_are_counted(method, bad, count, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(4, 8, generator=generator), torch.randn(20, 8, generator=generator)
    places = torch.randperm(8, generator=generator)[:count]
    spoiled = weight.clone()
    spoiled[seed % 4, places] = bad
    with pytest.raises(UserError, match=rf"^the layer: the weight has {count} NaN or infinite entries"):
        alps_exp.prune_layer(spoiled, inputs=inputs, method=method)
    inputs[seed % 20, places] = bad
    first = int(places.min())
    message = rf"of the inputs has NaN or infinite entries at {count} of 8 inputs \(the first is {first}\)"
    with pytest.raises(UserError, match="^the layer: gram " + message):
        alps_exp.prune_layer(weight, inputs=inputs, method=method)
    with pytest.raises(UserError, match="^the layer: diagonal " + message):
        LayerProblem(weight, Inputs(diagonal=inputs.square().sum(0)))


@pytest.mark.parametrize(("method", "losses"), [("alps", True), ("wanda", False), ("magnitude", True)])
def test_bad_activations_name_the_layer_and_how_many_inputs(tiny_llama, method, losses):
    network = AutoModelForCausalLM.from_pretrained(tiny_llama)
    network.model.layers[1].post_attention_layernorm.weight.data[[3, 5]] = float("nan")
    statistic = "gram" if losses else "diagonal"
    message = (
        rf"model\.layers\.1\.mlp\.gate_proj: {statistic} of the inputs has NaN or infinite entries at 2 of 64 inputs"
    )
    with pytest.raises(UserError, match=message):
        alps_exp.prune_model(network, random_tokens(), method=method, sparsity=0.5, losses=losses)


def test_activations_that_overflow_name_the_block_and_how_many(tiny_llama):
    network = AutoModelForCausalLM.from_pretrained(tiny_llama)
    exclude = ["layers.0.*"]
    network.model.layers[0].mlp.down_proj.weight.data[7] = 3e38
    with pytest.raises(UserError, match=r"model\.layers\.0 produces \d+ NaN or infinite activations: check"):
        alps_exp.prune_model(network, random_tokens(), method="wanda", sparsity=0.5, exclude=exclude)


def test_weights_that_overflow_the_models_dtype_name_the_layer_and_how_many(tiny_llama):
    network = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)

    @dataclasses.dataclass(frozen=True)
    class Enlarging(type(registry.solver("magnitude"))):
        def _solve(self, problem, pattern):
            solution = super()._solve(problem, pattern)
            return dataclasses.replace(solution, weight=solution.weight * 1e9)

    with pytest.raises(UserError, match=r"q_proj: Enlarging gave [1-9]\d+ NaN or infinite weights; use dtype=float32"):
        alps_exp.prune_model(network, random_tokens(), method=Enlarging(), sparsity=0.5)


@pytest.mark.slow
def test_one_token_is_enough(tiny_llama):
    for method in methods_for_a_layer():
        network = AutoModelForCausalLM.from_pretrained(tiny_llama)
        record = alps_exp.prune_model(network, random_tokens()[:1, :2], method=method, sparsity="2:4")
        assert all(math.isfinite(row["relative_loss"]) for row in record["layers"])
        assert all(torch.isfinite(parameter).all() for parameter in network.parameters())
        assert all(row["sparsity"] >= 0.5 for row in record["layers"])
