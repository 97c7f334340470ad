"""The contract of every method in conf/method, under every pattern; a new yaml is tested without a new line here."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import yaml
from helpers import PATTERNS, assert_exact, methods_for_a_layer, planted

from alps_exp.base.errors import UserError
from alps_exp.base.resources import resource_root
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.methods.refit import refitted
from alps_exp.patterns import parse_sparsity

METHODS = methods_for_a_layer()
PRUNING = [name for name in METHODS if registry.solver(name).prunes]
# What asks for the whole Gram matrix minimises the loss; Wanda and DSnoT do not, and DSnoT can end above magnitude.
OPTIMISING = [name for name in PRUNING if registry.solver(name).statistics is Statistics.GRAM]
EDGE_CASES = {
    "zero weight": planted(seed=4),
    "half of the inputs dead": planted(seed=5, dead=tuple(range(0, 48, 2))),
    "all inputs dead": planted(seed=6, dead=tuple(range(48))),
    "fewer tokens than inputs": planted(tokens=12, seed=7),
    "one token a sequence": planted(tokens=4, seed=8),
    "constant inputs": LayerProblem.from_inputs(planted().weight, torch.ones(40, 48), sequences=4),
    "float32": planted(seed=9, dtype=torch.float32),
}
EDGE_CASES["zero weight"] = dataclasses.replace(
    EDGE_CASES["zero weight"], weight=torch.zeros_like(EDGE_CASES["zero weight"].weight)
)

each_method = pytest.mark.parametrize("method", METHODS)
each_pruning = pytest.mark.parametrize("method", PRUNING)
each_pattern = pytest.mark.parametrize("written", PATTERNS)
some_patterns = pytest.mark.parametrize("written", ["0.29", "0.7", "2:4", "2:3"])


def solve(method: str, problem: LayerProblem, written: str):
    return registry.solver(method).solve(problem, parse_sparsity(written))


def assert_feasible(solution, problem: LayerProblem) -> None:
    assert solution.weight.shape == solution.support.shape == problem.weight.shape
    assert solution.weight.dtype == problem.weight.dtype
    assert solution.support.dtype == torch.bool
    assert torch.isfinite(solution.weight).all()
    assert not solution.weight[~solution.support].any()


@each_pruning
@each_pattern
def test_exact_count_in_every_selection_group(method, written):
    problem = planted(width=264, rows=10, tokens=600)  # 264 = two blocks of 128 columns and a narrow one
    solution = solve(method, problem, written)
    assert_feasible(solution, problem)
    assert_exact(solution.support, parse_sparsity(written), written, registry.solver(method).selection)
    assert (solution.weight != 0).equal(solution.support), "a kept weight of a generic layer is not zero"


@each_method
@some_patterns
def test_permuting_outputs_commutes_and_runs_repeat(method, written):
    problem = planted(seed=10)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    first, again = solve(method, problem, written), solve(method, problem, written)
    assert torch.equal(first.weight, again.weight)
    permuted = solve(method, dataclasses.replace(problem, weight=problem.weight[order]), written)
    assert torch.equal(permuted.support, first.support[order])
    torch.testing.assert_close(permuted.weight, first.weight[order])


@each_method
@some_patterns
def test_the_problem_is_not_changed(method, written):
    problem, same = planted(seed=11), planted(seed=11)
    solution = solve(method, problem, written)
    solution.support.logical_not_()
    assert torch.equal(problem.weight, same.weight)
    assert problem.inputs.tensors().keys() == same.inputs.tensors().keys()
    for name, value in problem.inputs.tensors().items():
        assert torch.equal(value, getattr(same.inputs, name)), name


@pytest.mark.parametrize("method", OPTIMISING)
@each_pattern
def test_optimising_methods_beat_magnitude(method, written):
    solver = registry.solver(method)
    for seed in range(3):
        problem = planted(seed=20 + seed)
        loss = problem.relative_loss(solver.solve(problem, parse_sparsity(written)).weight)
        assert loss < problem.relative_loss(solve("magnitude", problem, written).weight)


@each_method
@pytest.mark.parametrize("case", EDGE_CASES)
@pytest.mark.parametrize("written", ["0.5", "1:4"])  # others of drawn layers: test_degenerate.py
def test_edge_cases(method, case, written):
    problem = EDGE_CASES[case]
    solution = solve(method, problem, written)
    assert_feasible(solution, problem)
    if registry.solver(method).prunes:
        # Dead inputs may be dropped beyond the count, never kept beyond it.
        selection = registry.solver(method).selection
        slack = 1 if selection == "layer" else problem.weight.shape[0]
        allowed = (1 - parse_sparsity(written).sparsity) * problem.weight.numel() + slack
        assert int(solution.support.sum()) <= allowed


@each_pruning
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (2, 130)])
def test_tiny_shapes(method, shape):
    problem = planted(*shape, tokens=20, seed=3)
    for written in ("0.1", "0.5", "0.9"):
        solution = solve(method, problem, written)
        assert_feasible(solution, problem)
        assert_exact(solution.support, parse_sparsity(written), written, registry.solver(method).selection)


@each_method
def test_a_group_is_solved_as_its_layers(method):
    first = planted(rows=24, seed=12)
    second = dataclasses.replace(first, weight=planted(rows=10, seed=13).weight)
    third = dataclasses.replace(first, weight=planted(rows=7, seed=14).weight)
    problems, patterns = [first, second, third], [parse_sparsity(written) for written in ("0.6", "2:4", "0.6")]
    together = registry.solver(method).solve_group(problems, patterns)
    for problem, pattern, solution in zip(problems, patterns, together, strict=True):
        alone = registry.solver(method).solve(problem, pattern)
        assert torch.equal(alone.support, solution.support)
        torch.testing.assert_close(alone.weight, solution.weight)


@each_pruning
def test_missing_statistics_are_refused(method):
    solver = registry.solver(method)
    bare = LayerProblem(planted().weight, name="layers.0.q_proj")
    if solver.statistics is Statistics.NONE:
        assert_feasible(solver.solve(bare, parse_sparsity("0.5")), bare)
        return
    with pytest.raises(UserError, match=r"layers\.0\.q_proj.*inputs=X") as error:
        solver.solve(bare, parse_sparsity("0.5"))
    assert "\n" not in str(error.value)


@each_pruning
def test_a_pattern_that_does_not_fit_is_refused(method):
    with pytest.raises(UserError, match="not a multiple of 4"):
        solve(method, planted(width=50), "2:4")


@pytest.mark.parametrize("refit", ["none", "pcg"])
def test_a_pattern_that_a_method_cannot_keep_is_refused_once_the_layers_are_known(refit):
    @dataclasses.dataclass(frozen=True)
    class Narrow(type(registry.solver("magnitude"))):
        kinds = frozenset({"nm"})

    solver, shapes = refitted(Narrow(), refit), {"layers.0.fc1": (8, 8), "layers.0.fc2": (8, 8)}
    patterns = {name: parse_sparsity("2:4") for name in shapes}
    assert solver.for_layers(patterns, shapes) == solver
    with pytest.raises(UserError, match=r"Narrow cannot keep sparsity 0\.5: it takes nm"):
        solver.for_layers(patterns | {"layers.0.fc2": parse_sparsity("0.5")}, shapes)


@each_method
def test_yaml_mirrors_the_class(method):
    text = (resource_root() / "conf" / "method" / f"{method}.yaml").read_text(encoding="utf-8")
    node = yaml.safe_load(text)
    module, _, name = node.pop("_target_").rpartition(".")
    assert node.pop("name") == method
    assert set(node.pop("_look_", {})) <= {"order", "colour", "marker", "line"}
    target = getattr(importlib.import_module(module), name)
    default = dataclasses.asdict(target())
    assert node.keys() == default.keys()
    # A preset is another choice of values for the fields of the method after which it is named.
    preset = any(method.startswith(f"{other}-") for other in METHODS)
    assert (node != default) is preset
    assert text.startswith(f"# python -m alps_exp method={method}")


def _numbers():
    """Every numeric hyperparameter of every method."""
    for method in METHODS:
        for name, value in dataclasses.asdict(registry.solver(method)).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield method, name


@pytest.mark.parametrize(("method", "name"), list(_numbers()))
def test_hyperparameters_are_checked(method, name):
    for value in (-1, "many", None, True, float("nan")):
        with pytest.raises(UserError, match=f"method.{name}={value!r} is not allowed"):
            registry.solver(method, **{name: value})


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="did you mean sparsegpt"):
        registry.solver("sparsgpt")
    with pytest.raises(UserError, match="no hyperparameter 'dampin'; did you mean damping"):
        registry.solver("sparsegpt", dampin=0.1)


def test_dense_is_the_weight_itself():
    problem = planted()
    solution = solve("dense", problem, "0.5")
    assert torch.equal(solution.weight, problem.weight)
    assert solution.support.all()
    assert solution.sparsity == 0


def test_wanda_and_magnitude_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [8.0, 7.0, -6.0, 5.0]])
    problem = LayerProblem(weight, Inputs(diagonal=torch.tensor([100.0, 1.0, 1.0, 0.0])))
    assert solve("wanda", problem, "0.5").weight.tolist() == [[1, 0, 3, 0], [8, 7, 0, 0]]
    assert solve("magnitude", problem, "0.5").weight.tolist() == [[0, 0, 0, 0], [8, 7, -6, 5]]
    assert solve("magnitude", problem, "2:4").weight.tolist() == [[0, 0, 3, -4], [8, 7, 0, 0]]
    assert solve("wanda", problem, "1:4").weight.tolist() == [[1, 0, 0, 0], [8, 0, 0, 0]]
