"""N of N:M that differs among layers: the choice against all choices, and what runs make of it."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from helpers import interrupted
from tiny import execute, network, tokens, weights
from tiny_experts import network as mixture

import alps_exp
from alps_exp.allocation import allocations
from alps_exp.allocation.allocations import (
    ByLoss,
    ByOutliers,
    BySensitivity,
    BySpectrum,
    FromFile,
    Progression,
    Uniform,
    cheapest,
    in_steps,
)
from alps_exp.base.errors import UserError
from alps_exp.calibration.sensitivity import Sensitivity, _count, lost
from alps_exp.cli.overrides import compose
from alps_exp.patterns import parse_sparsity
from alps_exp.procedure import weighing
from alps_exp.pruning import stages
from alps_exp.runs import naming
from alps_exp.runs.naming import config_hash


def best(costs, sizes, kept, limit):
    """The most that may be kept, and the least sum over all choices that keep it."""
    found = []
    for places in product(range(len(kept)), repeat=len(costs)):
        used = sum(size * kept[place] for size, place in zip(sizes.values(), places, strict=True))
        if used <= limit:
            found.append((-used, sum(cost[place] for cost, place in zip(costs.values(), places, strict=True))))
    return min(found)


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kept", [[1, 2, 3, 4], [1, 4]], ids=str)
def test_the_choice_is_the_cheapest_of_all(seed, alike, kept):
    generator = torch.Generator().manual_seed(seed)
    names = [f"m.{i}.x" for i in range(6)]
    drops = torch.rand(6, len(kept), generator=generator, dtype=torch.float64).sort(1, descending=True).values
    costs = {name: (-drop.cumsum(0)).tolist() for name, drop in zip(names, drops, strict=True)}  # convex, falling
    sizes = {name: 3 if alike else int(torch.randint(1, 9, (), generator=generator)) for name in names}
    limit = round(2.3 * sum(sizes.values()))
    wanted = best(costs, sizes, kept, limit)
    for choose in (cheapest, in_steps) if alike else (cheapest,):
        found = choose(costs, sizes, kept, limit)
        used = sum(size * found[name] for name, size in sizes.items())
        assert (-used, sum(costs[name][kept.index(n)] for name, n in found.items())) == pytest.approx(wanted)


def test_thousands_of_layers_step_up_one_after_the_other(monkeypatch):
    """No more is kept than may be, nothing more fits, and by the largest step less nothing is cheaper."""
    generator, kept = torch.Generator().manual_seed(0), [1, 2, 3, 4]
    drops = torch.rand(6, 4, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    costs = {f"m.{i}.x": (-drop.cumsum(0)).tolist() for i, drop in enumerate(drops)}
    sizes = dict(zip(costs, (5, 7, 2, 8, 1, 6), strict=True))
    monkeypatch.setattr(allocations, "_TABLE", 8)
    found = cheapest(costs, sizes, kept, 66)
    used = sum(size * found[name] for name, size in sizes.items())
    assert used <= 66 and not any(size <= 66 - used for name, size in sizes.items() if found[name] < 4)
    cost = sum(costs[name][kept.index(n)] for name, n in found.items())
    assert cost <= best(costs, sizes, kept, 66 - max(sizes.values()) + 1)[1]


def test_what_is_lost_is_the_sum_of_the_lowest_scores():
    generator = torch.Generator().manual_seed(0)
    weight, f, d = (torch.randn(*shape, generator=generator) for shape in ((30, 40), (30,), (40,)))
    weight[:3] = 0
    f, d = f.square().double(), d.square().double()
    told = Sensitivity(scores={"a": _count(weight, f, d)})
    scores = (weight.double() ** 2 * f[:, None] * d).flatten().sort().values
    for removed in (0, 90, 300.0, 600, 1100, 1200):
        (found,) = lost(told.counts("a"), [removed])
        assert found == pytest.approx(float(scores[: int(removed)].sum()), rel=0.02, abs=1e-12)


CHOICES = {
    "loss": (ByLoss(choices=[1, 2, 3]), "none"),
    "sensitivity": (BySensitivity(choices=(3, 1, 2)), "outputs"),
    "atp": (Progression(step=0.3, choices=[1, 2, 3]), "none"),
    "spectral": (BySpectrum(per="layer", cap=0.3, choices=[1, 2, 3]), "none"),
    "owl": (ByOutliers(outlier=1.5, spread=0.3, choices=[1, 2, 3]), "none"),
    "a mixture": (Progression(step=0.3, choices=[1, 2, 3]), "none"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_allocation_divides_n_of_m_and_keeps_the_mean(name):
    allocation, sensitivity = CHOICES[name]
    model = mixture("qwen2_moe", torch.float32) if name == "a mixture" else network("llama").float()
    record = alps_exp.prune_model(
        model, tokens(), "magnitude", "2:4", allocation=allocation, sensitivity=sensitivity, losses=False
    )
    rows = record["layers"]
    assert len({row["pattern"] for row in rows}) > 1
    assert all(row["sparsity"] == row["sparsity_target"] == parse_sparsity(row["pattern"]).sparsity for row in rows)
    zeros = sum(row["sparsity"] * row["shape"][0] * row["shape"][1] for row in rows)
    total = sum(row["shape"][0] * row["shape"][1] for row in rows)
    least = min(row["shape"][0] * row["shape"][1] for row in rows) / 4
    assert 0 <= zeros - total / 2 < least
    assert any("of the weights are kept" in line for line in record["warnings"]) == (zeros > total / 2)


def test_by_loss_less_is_lost_than_with_one_n():
    """The sum of relative losses by the diagonal, which is what the allocation reads."""
    lost_by = {}
    for name, allocation in (("one", Uniform()), ("many", ByLoss(choices=[1, 2, 3]))):
        record = alps_exp.prune_model(network("llama").float(), tokens(), "wanda", "2:4", allocation=allocation)
        lost_by[name] = sum(row["relative_loss"] for row in record["layers"])
    assert lost_by["many"] < lost_by["one"]


def test_levels_that_are_nearest_to_what_was_asked_change_nothing_and_say_so(tmp_path):
    record = alps_exp.prune_model(
        network("llama").float(), tokens(), "magnitude", "2:4", allocation=Progression(choices=[1, 2, 3]), losses=False
    )
    assert {row["pattern"] for row in record["layers"]} == {"2:4"}
    assert any("allocation.choices changed nothing" in line for line in record["warnings"])


def test_levels_of_a_file_or_of_another_run_become_n_of_m(tmp_path):
    sizes = {f"m.layers.{i}.fc": 1000 for i in range(4)} | {"m.layers.4.q": 1000}
    file = tmp_path / "levels.json"
    file.write_text(json.dumps(dict(zip(sizes, (0.25, 0.4, 0.6, 0.75, 0.5), strict=True))))
    patterns = dict.fromkeys(sizes, parse_sparsity("2:4"))
    found = FromFile(str(file), choices=[1, 2, 3]).allocate(patterns, sizes, Sensitivity())
    assert [str(pattern) for pattern in found.values()] == ["3:4", "2:4", "2:4", "1:4", "2:4"]
    patterns |= {"m.layers.4.q": parse_sparsity(0.5)}  # of its own kind: it stays
    del sizes["m.layers.4.q"]
    found = FromFile(str(file), choices=[1, 2, 3]).allocate(patterns, {**sizes, "m.layers.4.q": 1000}, Sensitivity())
    assert str(found["m.layers.4.q"]) == "0.5"


@pytest.mark.parametrize(
    ("allocation", "sparsity", "message"),
    [
        (Uniform(choices=[1, 2]), "2:4", "allocation=uniform gives every layer the same"),
        (ByLoss(choices=[1, 2]), "0.5", r"choices=\[1, 2\] is a set of N .* and 0\.5 is asked"),
        (ByLoss(choices=[1, 2]), "2:4T", "and 2:4T is asked"),
        (ByLoss(choices=[1, 2]), "2:4>2:4", "and 2:4>2:4 is asked"),
        (ByLoss(choices=[1, 4]), "2:4", r"choices=\[1, 4\] is not allowed: give different whole numbers from 1 to 3"),
        (ByLoss(choices=[2]), "2:4", "two or more"),
        (ByLoss(choices=[1, 2, 2]), "2:4", "different whole numbers"),
        (ByLoss(choices="1,2"), "2:4", "choices=1,2 is not allowed"),
        (ByLoss(choices=2), "2:4", "choices=2 is not allowed"),
        (ByLoss(choices=[3, 4]), "2:8", r"choices=\[3, 4\] has no mean of 2, which sparsity=2:8 asks for"),
    ],
    ids=["uniform", "unstructured", "transposable", "hierarchical", "all", "one", "twice", "text", "number", "mean"],
)
def test_what_has_no_such_division_is_refused(allocation, sparsity, message):
    with pytest.raises(UserError, match=message):
        alps_exp.prune_model(network("llama"), tokens(), "magnitude", sparsity, allocation=allocation)


def test_without_choices_a_configuration_is_what_it_was_and_their_order_says_nothing(tiny):
    words = [*tiny, "sparsity=2:4", "allocation=loss"]
    plain = naming.plain(compose(words))
    assert plain["allocation"]["choices"] is None
    without = {**plain, "allocation": {"name": "loss", "cap": 0.15, "_target_": plain["allocation"]["_target_"]}}
    assert config_hash(plain) == config_hash(without)
    one, other = (config_hash(compose([*words, f"allocation.choices={it}"])) for it in ("[1,2,3]", "[3,1,2]"))
    assert one == other != config_hash(plain)


@pytest.mark.slow
def test_a_run_streams_is_packed_and_goes_on_with_the_same_division(tiny, tmp_path, monkeypatch):
    words = [*tiny, "method=sparsegpt", "sparsity=2:4", "allocation=loss", "allocation.choices=[1,2,3]", "nsamples=8"]
    words = [word for word in words if word != "nsamples=2"]
    one = execute(words, tmp_path / "one", "stream=false", "save=true")
    patterns = [row["pattern"] for row in one["layers"]]
    assert len(set(patterns)) > 1 and one["sparsity"] == "2:4"
    assert one["config"]["allocation"]["choices"] == [1, 2, 3]
    execute(words, tmp_path / "packed", "stream=false", "save=packed")
    packed = alps_exp.load_packed(tmp_path / "packed" / "model").state_dict()
    with interrupted(stages, "solve_layers", 6):
        execute(words, tmp_path / "two", "stream=true", "save=true")
    monkeypatch.setattr(weighing, "measure_sensitivity", lambda *_, **__: pytest.fail("measured again"))
    other = execute(words, tmp_path / "two", "stream=true", "save=true")
    assert [row["pattern"] for row in other["layers"]] == patterns
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], packed[name]) for name in first)
