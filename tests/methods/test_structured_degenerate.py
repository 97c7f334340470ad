"""Degenerate layers under the patterns beyond N:M: finite, with zeros where the pattern has them, at any scale."""

from __future__ import annotations

import math

import pytest
import torch
from degenerate import INPUT_DEFECTS, WEIGHT_DEFECTS, Layer, bounded
from helpers import methods_for_a_layer
from hypothesis import given
from hypothesis import strategies as st

from alps_exp.layer import registry
from alps_exp.methods.refit import refitted
from alps_exp.patterns import parse_sparsity

PATTERNS = ("block=4@0.5", "block=2x8@0.7", "row@0.4", "column@0.4", "2:4T", "4:8T", "1:2>2:4", "4:2:8")
LAYERS = st.builds(
    Layer,
    rows=st.sampled_from([8, 16]),
    width=st.sampled_from([8, 24]),
    tokens=st.sampled_from([1, 16, 60]),
    input_defects=st.frozensets(st.sampled_from(INPUT_DEFECTS), max_size=3),
    weight_defect=st.sampled_from([None, *WEIGHT_DEFECTS]),
    dtype=st.just(torch.float32),
    seed=st.integers(0, 1000),
)


def _cells():
    for method in methods_for_a_layer():
        if method.startswith("alps-"):  # other schedules of the same
            continue
        solver = registry.solver(method)
        for written in PATTERNS if solver.prunes else ():
            if solver.kinds is None or parse_sparsity(written).kind in solver.kinds:
                yield method, written


@pytest.mark.slow
@pytest.mark.parametrize(("method", "written"), list(_cells()))
@bounded(3)
@given(data=st.data())
def test_degenerate_layers_are_solved_at_any_scale(method, written, data):
    solver, pattern, layer = registry.solver(method), parse_sparsity(written), data.draw(LAYERS)
    if method == "magnitude":
        solver = refitted(solver, "exact")
    problem = layer.problem()
    solution = solver.solve(problem, pattern)
    assert torch.isfinite(solution.weight).all() and not solution.weight[~solution.support].any()
    assert pattern.holds(solution.support)
    assert math.isfinite(problem.relative_loss(solution.weight))

    inputs = data.draw(st.integers(-40, 40))
    # DSnoT's threshold is in units of the output: only scales that leave the output alone.
    weights = -inputs if method == "dsnot" else data.draw(st.integers(-40, 40))
    again = solver.solve(layer.problem(weights, inputs), pattern)
    assert torch.equal(again.support, solution.support)
    if method != "magnitude":  # whose fit compares losses in float64, with rounding of its own
        assert torch.equal(again.weight, solution.weight * 2.0**weights)
