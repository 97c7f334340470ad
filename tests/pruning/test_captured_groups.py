"""Groups of layers that are captured one after the other see the inputs of their own block, whatever is propagated."""

from __future__ import annotations

from tiny import random_tokens
from transformers import AutoModelForCausalLM

import alps_exp


def test_with_dense_propagation_too(tiny_llama):
    tokens = random_tokens(3, 32)
    losses = {}
    for propagate in ("dense", "pruned"):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        record = alps_exp.prune_model(model, tokens, "wanda", 0.5, propagate=propagate, capture="groups")
        losses[propagate] = {row["name"]: row["relative_loss"] for row in record["layers"]}
    first = [name for name in losses["dense"] if ".layers.0." in name]
    assert len(first) == 7
    for name in first:  # the first block's input is the dense model's either way
        assert losses["dense"][name] == losses["pruned"][name], name
    later = "model.layers.1.self_attn.q_proj"
    assert losses["dense"][later] != losses["pruned"][later]
