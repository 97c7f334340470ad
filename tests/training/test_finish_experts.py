"""Experts that follow gradients, against that of the same model whose experts are linear layers."""

import pytest
import torch
from tiny import tokens
from tiny_experts import network, unrolled

import alps_exp
from alps_exp.baselines.elsa import Elsa
from alps_exp.baselines.tune import Tune
from alps_exp.model.layers import find_layer
from alps_exp.training.masters import Masters


@pytest.mark.slow
@pytest.mark.parametrize("finish", ["block", pytest.param("distil", marks=pytest.mark.slow)])
def test_finished_experts_are_those_of_the_unrolled_model(finish, monkeypatch):
    # A tensor of all experts has one rate, by the size of all of them; unrolled each would have its own.
    monkeypatch.setattr(Masters, "size", lambda self, name: 0.28)
    ours = network("mixtral")
    plain, gates = unrolled("mixtral", ours), [layer.mlp.gate.weight.clone() for layer in ours.model.layers]
    words = {"method": "magnitude", "sparsity": 0.5, "finish": finish, "held_out": tokens(6, 32)[4:], "batch_size": 2}
    unfinished = network("mixtral")
    left = alps_exp.prune_model(unfinished, tokens(4, 32), **{**words, "finish": "none"})
    records = [alps_exp.prune_model(model, tokens(4, 32), expert_shrinkage=0.0, **words) for model in (ours, plain)]
    rows = [{row["name"]: row for row in record["layers"]} for record in records]
    assert rows[0].keys() == rows[1].keys()
    for row in left["layers"]:
        one, other, before = (find_layer(model, row["name"]).weight for model in (ours, plain, unfinished))
        assert torch.equal(one == 0, other == 0) and rows[0][row["name"]]["sparsity"] == row["sparsity"] == 0.5
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert not torch.equal(one, before)
    assert all(torch.equal(layer.mlp.gate.weight, gate) for layer, gate in zip(ours.model.layers, gates, strict=True))


SHORT = {"steps": 4, "tokens": 128, "batch": 2, "rate": 2e-3, "schedule": "constant"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", [Elsa(**SHORT, interval=2, penalty=0.3), Tune(**SHORT)], ids=["elsa", "tune"])
def test_methods_that_train_treat_experts_as_those_of_the_unrolled_model(family, method):
    ours, sparsity = network(family), {"sparsity": "2:4"}
    if isinstance(method, Tune):  # its models come pruned
        alps_exp.prune_model(ours, tokens(4, 32), method="magnitude", **sparsity)
    plain = unrolled(family, ours)
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    records = [alps_exp.prune_model(model, tokens(4, 32), method, **sparsity) for model in (ours, plain)]
    rows = [{row["name"]: row for row in record["layers"]} for record in records]
    assert rows[0].keys() == rows[1].keys() and any(".experts.3.down_proj" in name for name in rows[0])
    for name, row in rows[0].items():
        one, other = (find_layer(model, name).weight for model in (ours, plain))
        assert torch.equal(one == 0, other == 0) and (one.reshape(-1, 4).count_nonzero(1) == 2).all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert row["stats"] == pytest.approx(rows[1][name]["stats"], rel=1e-6)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in ours.named_parameters())
