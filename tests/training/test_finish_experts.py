"""Finishing of experts, against that of the same model whose experts are linear layers."""

import pytest
import torch
from tiny_experts import network, tokens, unrolled

import alps_exp
from alps_exp.model.layers import find_layer


@pytest.mark.parametrize("finish", ["block", pytest.param("distil", marks=pytest.mark.slow)])
def test_finished_experts_are_those_of_the_unrolled_model(finish):
    ours = network("mixtral")
    plain, gates = unrolled("mixtral", ours), [layer.mlp.gate.weight.clone() for layer in ours.model.layers]
    words = {"method": "magnitude", "sparsity": 0.5, "finish": finish, "held_out": tokens(6)[4:], "batch_size": 2}
    unfinished = network("mixtral")
    left = alps_exp.prune_model(unfinished, tokens(), **{**words, "finish": "none"})
    records = [alps_exp.prune_model(model, tokens(), expert_shrinkage=0.0, **words) for model in (ours, plain)]
    rows = [{row["name"]: row for row in record["layers"]} for record in records]
    assert rows[0].keys() == rows[1].keys()
    for row in left["layers"]:
        one, other, before = (find_layer(model, row["name"]).weight for model in (ours, plain, unfinished))
        assert torch.equal(one == 0, other == 0) and rows[0][row["name"]]["sparsity"] == row["sparsity"] == 0.5
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert not torch.equal(one, before)
    assert all(torch.equal(layer.mlp.gate.weight, gate) for layer, gate in zip(ours.model.layers, gates, strict=True))
