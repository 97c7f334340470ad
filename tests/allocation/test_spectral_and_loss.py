"""Allocations by the spectrum and by the loss of the layers, against plain computation."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import interrupted
from tiny import execute, load, random_tokens, weights
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp.allocation.allocations import ByLoss, ByOutliers, BySpectrum
from alps_exp.base.errors import UserError
from alps_exp.calibration.sensitivity import Sensitivity, SensitivityChoice, spectral_exponent


@pytest.fixture(scope="module")
def ids():
    return random_tokens(8, 32)


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
@pytest.mark.parametrize("tail", [0.1, 0.5, 1.0])
def test_exponents_are_hills_estimate(shape, tail):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*shape, generator=generator) * (0.05 + torch.rand(shape[1], generator=generator) ** 2)
    eigenvalues = sorted((float(s) ** 2 for s in torch.linalg.svdvals(weight.double())), reverse=True)
    count = min(max(1, int(tail * len(eigenvalues))), len(eigenvalues) - 1)
    total = 0.0
    for value in eigenvalues[:count]:
        total += math.log(value / eigenvalues[count])
    assert spectral_exponent(weight, tail) == pytest.approx(1 + count / total, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_exponents_are_those_that_were_planted(exponent):
    # The quantiles of a density proportional to λ^-exponent above 1.
    share = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    weight = torch.diag(share ** (-0.5 / (exponent - 1)))
    assert spectral_exponent(weight, 0.5) == pytest.approx(exponent, rel=0.02)


def test_ranks_below_full_count_what_is_there_and_no_tail_is_refused():
    thin = torch.randn(30, 6, generator=torch.Generator().manual_seed(2)).double()
    wide = thin @ torch.linalg.qr(torch.randn(20, 6, generator=torch.Generator().manual_seed(3)).double()).Q.T
    assert spectral_exponent(wide, 0.5) == pytest.approx(spectral_exponent(thin, 0.5), rel=1e-6)
    for weight in (torch.eye(8), torch.outer(torch.arange(5.0), torch.ones(4)), torch.zeros(4, 4)):
        with pytest.raises(UserError, match="a layer: the spectrum of the weight has no tail"):
            spectral_exponent(weight, 0.5, "a layer")


def test_levels_are_a_straight_line_between_the_bounds():
    sizes = {f"m.{block}.{layer}": 100_000 for block in range(3) for layer in ("a", "b")}
    exponents = dict(zip(sizes, map(torch.tensor, (2.0, 4.0, 3.0, 3.5, 6.0, 4.0)), strict=True))
    told = Sensitivity(exponents=exponents)
    found = BySpectrum(cap=0.1).levels(sizes, 0.7, told)  # means 3, 3.25, 5
    assert list(found.values()) == pytest.approx([0.6, 0.6, 0.625, 0.625, 0.8, 0.8])
    found = BySpectrum(per="layer", cap=0.2).levels(sizes, 0.6, told)
    assert list(found.values()) == pytest.approx([0.4, 0.6, 0.5, 0.55, 0.8, 0.6])
    same = Sensitivity(exponents=dict.fromkeys(sizes, torch.tensor(3.0)))
    assert set(BySpectrum().levels(sizes, 0.6, same).values()) == {0.6}


def shares_of(folder, ids):
    """Layer → its scores W² d over their sum, by plain forwards."""
    model, squares = load(folder), {}

    def hook_of(name):
        def hook(module, args):
            squares[name] = squares.get(name, 0) + args[0].detach().double().flatten(0, -2).square().sum(0)

        return hook

    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook_of(f"model.layers.{name}"))
    with torch.no_grad():
        model(ids)
    scores = {name: model.get_submodule(name).weight.detach().double() ** 2 * d for name, d in squares.items()}
    return {name: score / score.sum() for name, score in scores.items()}


@pytest.mark.slow
def test_by_loss_the_marginal_share_is_the_same_in_all_layers(tiny_llama, ids):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    record = alps_exp.prune_model(model, ids, "magnitude", 0.6, allocation=ByLoss(cap=1.0))
    shares = shares_of(tiny_llama, ids)
    threshold = torch.cat([share.flatten() for share in shares.values()]).quantile(0.6)
    levels = {row["name"]: row["sparsity_target"] for row in record["layers"]}
    for name, share in shares.items():
        assert levels[name] == pytest.approx(float((share < threshold).double().mean()), abs=0.01), name
    assert max(levels.values()) - min(levels.values()) > 0.1

    def lost(level_of):
        return sum(
            float(share.flatten().sort().values[: round(level_of(name) * share.numel())].sum())
            for name, share in shares.items()
        )

    assert lost(levels.get) < 0.95 * lost(lambda name: 0.6)
    capped = alps_exp.prune_model(load(tiny_llama), ids, "magnitude", 0.6, allocation=ByLoss(cap=0.05))
    assert all(abs(row["sparsity_target"] - 0.6) < 0.051 for row in capped["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("allocation", [ByOutliers(outlier=2.0), ByLoss()], ids=["owl", "loss"])
def test_gradients_take_no_part_in_what_is_of_the_inputs(allocation, tiny_llama, ids):
    found = [
        alps_exp.prune_model(load(tiny_llama), ids, "magnitude", 0.6, allocation=allocation, sensitivity=choice)
        for choice in ("none", SensitivityChoice("outputs", 8, 0.5))
    ]
    one, other = ([row["sparsity_target"] for row in record["layers"]] for record in found)
    assert one == other and len(set(one)) > 1
    assert found[0]["layers"][0]["relative_loss"] != found[1]["layers"][0]["relative_loss"]  # rows do weigh


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["spectral", "loss"])
def test_a_run_streams_to_the_same_bits_and_goes_on(allocation, tiny, tmp_path, monkeypatch):
    from alps_exp.procedure import weighing
    from alps_exp.pruning import stages

    words = [*tiny, "method=magnitude", "sparsity=0.6", f"allocation={allocation}", "nsamples=4", "save=true"]
    words = [word for word in words if word != "nsamples=2"]
    one = execute(words, tmp_path / "one", "stream=false")
    execute(words, tmp_path / "two", "stream=true")
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len({row["sparsity_target"] for row in one["layers"]}) > 1
    with interrupted(stages, "solve_layers", 6):
        execute(words, tmp_path / "three")
    for name in ("measure_sensitivity", "measure_spectra"):
        monkeypatch.setattr(weighing, name, lambda *_, **__: pytest.fail("measured again"))
    again = execute(words, tmp_path / "three")
    assert [row["sparsity_target"] for row in again["layers"]] == [row["sparsity_target"] for row in one["layers"]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"per": "model"}, "allocation.per"), ({"tail": 0.0}, "allocation.tail"), ({"cap": 2.0}, "allocation.cap")],
)
def test_values_that_are_not_allowed(keys, message):
    with pytest.raises(UserError, match=message):
        BySpectrum(**keys)
