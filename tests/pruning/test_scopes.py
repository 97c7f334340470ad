"""What every method of block and model scope, every target and every allocation keeps to; found from the yaml files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import yaml
from helpers import assert_exact, planted
from tiny import execute, network, tokens

import alps_exp
from alps_exp import BlockMethod, ModelMethod, Solution, Statistics, UserError
from alps_exp.allocation.allocations import build_allocation
from alps_exp.base.resources import resource_root
from alps_exp.calibration.sensitivity import Sensitivity, SensitivityChoice
from alps_exp.cli.overrides import compose
from alps_exp.layer import registry
from alps_exp.methods.target import Target, build_target
from alps_exp.model.layers import Layer
from alps_exp.patterns import parse_sparsity
from alps_exp.pruning.capture import capture
from alps_exp.pruning.rows import LayerRow, PruneResult
from alps_exp.runs.settings import resolve


def choices(group: str) -> dict[str, dict]:
    files = sorted((resource_root() / "conf" / group).glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


@dataclass(frozen=True)
class Whole(BlockMethod):
    """Magnitude, a block at a time."""

    statistics: ClassVar[Statistics] = Statistics.DIAGONAL
    selection: ClassVar[str] = "layer"

    def run(self, block) -> None:
        for names, inputs in capture(block, list(block.layers)):
            found = []
            for name in names:
                weight = block.layers[name].weight.float()
                support = block.job.patterns[name].keep(weight.abs())
                found.append(block.solved(name, inputs, Solution(weight.masked_fill(~support, 0), support)))
            block.settle(found)


@dataclass(frozen=True)
class Model(ModelMethod):
    """Magnitude, without a loop."""

    statistics: ClassVar[Statistics] = Statistics.NONE

    def run(self, model, job, tools) -> PruneResult:
        result = PruneResult()
        for name, pattern in job.patterns.items():
            layer = Layer(name, model.model.get_submodule(name))
            layer.write(layer.weight.masked_fill(~pattern.keep(layer.weight.abs().float()), 0))
            result.layers.append(LayerRow.plain(name, 0, layer.weight, pattern, self.selection))
        return result


FOUND = {name: registry.solver(name) for name in registry.methods() if name != "given"}
WIDE = {name: found for name, found in FOUND.items() if isinstance(found, (BlockMethod, ModelMethod))}
WIDE |= {"whole": Whole(), "model": Model()}
SINGLE = {name: method for name, method in WIDE.items() if not (method.structured or method.trains)}
TARGETS = {name: node for name, node in choices("target").items()}
ALLOCATIONS = {name: node for name, node in choices("allocation").items() if name != "file"}


@pytest.mark.slow
@pytest.mark.parametrize("level", ["0.3", "0.5", "0.7"])
@pytest.mark.parametrize("method", SINGLE.values(), ids=list(SINGLE))
def test_counts_are_exact_and_rows_complete(method, level):
    model, again, dense = (network("llama").float() for _ in range(3))
    record = alps_exp.prune_model(model, tokens(), method, level)
    alps_exp.prune_model(again, tokens(), method, level)
    names = [row["name"] for row in record["layers"]]
    assert sorted(names) == sorted(
        name for name in dense.state_dict() for name in [name.removesuffix(".weight")] if "_proj" in name
    )
    zeros = wanted = 0
    for name in names:
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, again.get_submodule(name).weight), "the same call gives the same weights"
        zeros += int((weight == 0).sum())
        wanted += weight.numel() - round((1 - float(level)) * weight.numel())
        if method.selection.startswith("block of"):  # columns, whose counts are rounded one by one
            assert_exact(weight != 0, parse_sparsity(level), level, method.selection)
            wanted = zeros
    assert zeros == wanted
    for name, tensor in model.state_dict().items():
        assert name.removesuffix(".weight") in names or torch.equal(tensor, dense.state_dict()[name]), name
    for row in record["layers"]:
        share = float((model.get_submodule(row["name"]).weight == 0).double().mean())
        assert row["sparsity"] == pytest.approx(share) and row["selection"]


@pytest.mark.parametrize("method", WIDE.values(), ids=list(WIDE))
def test_what_works_layer_by_layer_is_refused(method):
    with pytest.raises(UserError, match="give it to prune_model"):
        alps_exp.prune_layer(torch.ones(4, 8), method=method)
    with pytest.raises(UserError, match="prunes blocks or the model as a whole"):
        alps_exp.prune_model(network("llama").float(), tokens(), method, 0.5, refit="pcg")


def named(name: str) -> list[str]:
    """The words for a method of this file."""
    return ["method=magnitude", f"method.name={name.lower()}", f"method._target_=test_scopes.{name}"]


@pytest.fixture
def wide(tiny) -> list[str]:
    """The words of a run by a method of block scope."""
    return [*tiny, "sparsity=0.5", *named("Whole")]


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_users_block_method_runs_and_saves(wide, tmp_path, stream):
    record = execute(wide, tmp_path / "run", f"stream={stream}", "save=true")
    assert len(record["layers"]) == 12 and record["summary"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert all(0 < row["relative_loss"] < 1 for row in record["layers"])


@pytest.mark.slow
def test_a_users_model_method_runs(tiny, tmp_path):
    record = execute([*tiny, "sparsity=0.5", *named("Model")], tmp_path)
    assert record["summary"]["sparsity"] == pytest.approx(0.5, abs=1e-3) and record["method"] == "model"


@pytest.mark.parametrize("words", [["target=stream"], ["capture=groups"], ["devices=2"], ["sensitivity=outputs"]])
def test_keys_that_work_layer_by_layer_are_refused(wide, words):
    more = ["sensitivity.windows=2"] if words == ["sensitivity=outputs"] else []
    with pytest.raises(UserError, match="goes with methods that prune layer by layer, and whole prunes"):
        resolve(compose([*wide, *words, *more]))


@pytest.mark.parametrize("method", ["alps", "sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_target_serves_every_method(name, method):
    target, problem, same = build_target(TARGETS[name]), planted(seed=4), planted(seed=4)
    problem = type(problem)(problem.weight, problem.inputs.replaced(correction=0.1 * problem.weight @ problem.gram))
    posed = target.posed(problem)
    assert posed.weight.shape == problem.weight.shape and posed.inputs is problem.inputs
    assert torch.equal(problem.weight, same.weight), "the dense layer's problem is not changed"
    solution = registry.solver(method).solve(posed, parse_sparsity("2:4"))
    assert int((solution.weight != 0).sum()) <= problem.weight.numel() // 2
    assert posed.relative_loss(solution.weight) < 1


@pytest.mark.parametrize("level", [0.4, 0.7, 0.9])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_every_allocation_keeps_the_mean(name, level):
    allocation = build_allocation(ALLOCATIONS[name])
    sizes = {f"m.layers.{index}.{layer}": 700 + 111 * index for index in range(5) for layer in ("q", "up")}
    generator = torch.Generator().manual_seed(1)
    scores = {}
    for layer, size in sizes.items():
        places = torch.randint(19_000, 21_000, (size,), generator=generator)
        scores[layer] = torch.cat([torch.zeros(2, dtype=torch.int64), torch.bincount(places)])
    patterns = dict.fromkeys(sizes, parse_sparsity(level)) | {"m.layers.0.own": parse_sparsity("2:4")}
    exponents = dict(zip(sizes, torch.rand(len(sizes), generator=generator, dtype=torch.float64) + 2, strict=True))
    told = Sensitivity(scores=scores, exponents=exponents)
    found = allocation.allocate(patterns, sizes | {"m.layers.0.own": 800}, told)
    assert str(found["m.layers.0.own"]) == "2:4" and found.keys() == patterns.keys()
    total = sum(sizes.values())
    zeros = sum(size - round((1 - found[layer].level) * size) for layer, size in sizes.items())
    uniform = sum(size - round((1 - level) * size) for size in sizes.values())
    assert zeros in (total - round((1 - level) * total), uniform)
    assert all(abs(found[layer].level - level) <= allocation.bound + 1e-2 for layer in sizes)


@dataclass(frozen=True)
class Halved(Target):
    """Half of the weights."""

    def posed(self, problem):
        return dataclasses.replace(problem, weight=problem.weight / 2)


def test_a_users_target_has_its_name_in_the_record_and_is_refused_where_nothing_asks_for_it(wide):
    record = alps_exp.prune_model(network("llama").float(), tokens(2), "magnitude", 0.5, target=Halved())
    assert {row["target"] for row in record["layers"]} == {"halved"}
    words = ["target.name=halved", "target._target_=test_scopes.Halved"]
    with pytest.raises(UserError, match="target=halved goes with methods that prune layer by layer, and whole prunes"):
        resolve(compose([*wide, *words]))
    with pytest.raises(UserError, match="target=halved goes with methods that prune layer by layer, and Whole prunes"):
        alps_exp.prune_model(network("llama").float(), tokens(2), Whole(), 0.5, target=Halved())


@pytest.mark.parametrize("name", [name for name in WIDE if name != "elsa-l"])  # which needs a package of its own
def test_what_works_layer_by_layer_is_refused_by_prune_model(name):
    method = WIDE[name]
    rows = SensitivityChoice("outputs", 2, 0.5)
    for asked in ({"target": "stream"}, {"capture": "groups"}, {"sensitivity": rows}):
        with pytest.raises(UserError, match="goes with methods that prune layer by layer"):
            alps_exp.prune_model(network("llama").float(), tokens(2), method, 0.5, **asked)
    if method.trains:
        with pytest.raises(UserError, match="finish=distil compares with the dense model"):
            alps_exp.prune_model(network("llama").float(), tokens(2), method, 0.5, finish="distil")
