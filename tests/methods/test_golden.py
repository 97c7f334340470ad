"""All methods on real layers against what the authors' own code made of them (the folder `golden` of the real data)."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_exact

from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.methods.refit import refitted
from alps_exp.patterns import parse_sparsity

LAYERS = ("block00_k_proj", "block12_down_proj", "block20_gate_proj")
PATTERNS = ("0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "4:8", "1:4")
CELLS = [(layer, written) for layer in LAYERS for written in PATTERNS]
# Some methods take seconds a cell: every pattern once, every layer two or three times.
SOME_CELLS = [(LAYERS[number % 3], written) for number, written in enumerate(PATTERNS)]
SLOW = pytest.mark.slow
every_cell = pytest.mark.parametrize(
    ("layer", "written"), [cell if cell in SOME_CELLS else pytest.param(*cell, marks=SLOW) for cell in CELLS]
)
some_cells = pytest.mark.parametrize(("layer", "written"), SOME_CELLS)


@cache
def load(path: Path) -> LayerProblem:
    """The layer of one file. Where it holds the inputs, the variance is taken within each sequence, else over all."""
    data = np.load(path)
    width = data["weight"].shape[1]
    gram = torch.zeros(width, width)
    upper = torch.triu_indices(width, width)
    gram[upper[0], upper[1]] = torch.from_numpy(data["gram_triu"])
    gram += gram.triu(1).T.clone()
    var = torch.from_numpy(data["var"])
    if "inputs" in data:
        inputs = torch.from_numpy(data["inputs"]).float()
        var = inputs.view(int(data["sequences"]), int(data["seqlen"]), width).var(1, unbiased=False).mean(0)
    inputs = Inputs(
        gram=gram,
        mean=torch.from_numpy(data["mean"]),
        var=var,
        tokens=int(data["tokens"]),
        sequences=int(data["sequences"]),
        name=path.stem,
    )
    return LayerProblem(torch.from_numpy(data["weight"]).float(), inputs, path.stem)


@pytest.fixture(scope="module")
def golden(shared):
    """Function (layer, written) → problem and the recorded relative losses by method."""
    if not (shared / "golden").is_dir():
        pytest.skip("the folder of real data has no golden/")
    recorded = json.loads((shared / "golden" / "official.json").read_text(encoding="utf-8"))
    return lambda layer, written: (
        load(shared / "golden" / f"{layer}.npz"),
        {method: cell["relative_loss"] for method, cell in recorded[layer][written].items()},
    )


@cache
def ratio(recorded_as: str, golden, layer: str, written: str, ours: str | None = None, **hyperparameters) -> float:
    """Our relative loss over the recorded one; checks the counts on the way.

    Args:
        recorded_as: the method's name in the records, and ours too unless that is given.
    """
    problem, recorded = golden(layer, written)
    solver = registry.solver(ours or recorded_as, **hyperparameters)
    solution = solver.solve(problem, parse_sparsity(written))
    assert_exact(solution.support, parse_sparsity(written), written, solver.selection)
    assert not solution.weight[~solution.support].any()
    return problem.relative_loss(solution.weight) / recorded[recorded_as]


@every_cell
def test_magnitude(golden, layer, written):
    # N:M: up to 30 % of the groups tie in these 4-bit weights, and the recorded order of ties is a sort's accident.
    tolerance = 0.1 if ":" in written else 0.005
    assert ratio("magnitude", golden, layer, written) == pytest.approx(1, abs=tolerance)


@every_cell
def test_wanda(golden, layer, written):
    assert ratio("wanda", golden, layer, written) == pytest.approx(1, abs=1e-4)


@every_cell
def test_sparsegpt(golden, layer, written):
    assert ratio("sparsegpt", golden, layer, written) == pytest.approx(1, abs=0.002)


@every_cell
def test_dsnot(golden, layer, written):
    found = ratio("dsnot", golden, layer, written, same_sign=True)
    if written in ("2:4", "4:8"):
        assert found == pytest.approx(1, abs=0.001)
    elif written != "1:4":  # where the released code leaves groups of 2 and 3, its loss is that of another pattern
        assert found <= 0.95


@pytest.mark.parametrize(
    ("layer", "written"),
    [
        ("block00_k_proj", "0.5"),
        *(("block12_down_proj", written) for written in PATTERNS[:5]),
        *(("block20_gate_proj", written) for written in PATTERNS[:4]),
    ],
)
def test_dsnot_without_the_sign_test_is_the_released_default(golden, layer, written):
    # In the other unstructured cells the released code runs out of candidates and goes on.
    assert ratio("dsnot", golden, layer, written, same_sign=False) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize(
    ("layer", "written"),
    [
        cell if cell == (LAYERS[0], "0.8") else pytest.param(*cell, marks=SLOW)
        for cell in CELLS
        if cell[0] == LAYERS[0] or cell in (*SOME_CELLS, (LAYERS[2], "2:4"))
    ],
)
def test_alps(golden, layer, written):
    assert ratio("alps", golden, layer, written) <= 1.002


@pytest.mark.slow
@some_cells
def test_admm_grad_by_the_released_schedule(golden, layer, written):
    if "admm" not in golden(layer, written)[1]:
        pytest.skip("the released code has no such pattern")
    tolerance = 0.002 if written == "2:4" else 5e-4  # ties of 4-bit weights
    assert ratio("admm", golden, layer, written, ours="admm-grad", schedule="code") == pytest.approx(1, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "written"), [(layer, written) for layer in LAYERS for written in ("0.5", "0.6", "0.7")]
)
def test_admm_grad_lies_between_sparsegpt_and_alps(golden, layer, written):
    found = ratio("alps", golden, layer, written, ours="admm-grad")
    recorded = golden(layer, written)[1]
    assert found < 0.8 * recorded["sparsegpt"] / recorded["alps"]
    # At 50 % ADMM-Grad is below what was recorded for ALPS on the first layer, and there above ours only.
    assert found > (ratio("alps", golden, layer, written) if layer == LAYERS[0] else 1)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "written"), CELLS)
def test_sparseswaps_from_wanda_is_below_dsnot_in_every_cell_after_five_swaps(golden, layer, written):
    problem, pattern = golden(layer, written)[0], parse_sparsity(written)
    problem = dataclasses.replace(problem, weight=problem.weight[::4])  # no row of either method depends on others
    swaps, dsnot, wanda = (
        problem.relative_loss(registry.solver(name, **more).solve(problem, pattern).weight)
        for name, more in (("sparseswaps", {"max_swaps": 5}), ("dsnot", {"same_sign": True}), ("wanda", {}))
    )
    assert swaps < 0.96 * min(dsnot, wanda)


# Relative losses of magnitude, then refit=exact, by layer and pattern. The first layer's weight is 192 × 576.
REFITTED = {
    (LAYERS[0], "4:8>2:4"): 0.01220,
    (LAYERS[0], "2:4T"): 0.00866,
    (LAYERS[0], "4:8T"): 0.00623,
    (LAYERS[0], "64:2:8"): 0.01138,
    (LAYERS[0], "block=4@0.7"): 0.04880,
    (LAYERS[0], "row@0.3"): 0.07188,
    (LAYERS[0], "column@0.3"): 0.00027,
    (LAYERS[1], "block=32@0.7"): 0.47267,
}
FITTED = ("4:8>2:4", "2:4T", "64:2:8")  # in less than a second each, the others in up to a minute


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "written"), REFITTED)
def test_alps_is_below_magnitude_and_its_exact_refit_under_every_kind_of_pattern(golden, layer, written):
    problem, pattern, expected = golden(layer, "0.5")[0], parse_sparsity(written), REFITTED[layer, written]
    found = registry.solver("alps").solve(problem, pattern)
    assert pattern.holds(found.support)
    assert problem.relative_loss(found.weight) < 0.97 * expected
    if written in FITTED:
        refit = refitted(registry.solver("magnitude"), "exact").solve(problem, pattern)
        assert problem.relative_loss(refit.weight) == pytest.approx(expected, rel=1e-3)
