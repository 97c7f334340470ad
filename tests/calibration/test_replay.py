"""What is kept of a block's forwards: fewer of them, and the same bits."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, network, tokens
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.calibration import replay
from alps_exp.layer.registry import solver
from alps_exp.methods.target import LayerTarget, StreamTarget, Target
from alps_exp.model.blocks import BlockModel
from alps_exp.patterns import parse_sparsity
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.loop import prune_blocks
from alps_exp.pruning.rows import PruneResult


def prune(model: nn.Module, target: Target, **options) -> PruneResult:
    selection = Selection()
    patterns = selection.patterns_for(linear_shapes(model, selection), parse_sparsity("0.5"))
    options = {"tokens": tokens(), "batch_size": 5, "quiet": True, "capture": "groups", **options}
    return prune_blocks(
        BlockModel(model, torch.device("cpu")), PruneJob(solver("wanda"), patterns, selection, target=target, **options)
    )


def told(result: PruneResult) -> list:
    return [(row.name, row.relative_loss, row.target_loss, row.held_out_loss) for row in result.layers] + [result.drift]


@pytest.mark.parametrize("held_out", [None, tokens(6)], ids=["", "held-out"])
@pytest.mark.parametrize("target", [LayerTarget(), StreamTarget()], ids=["layer", "stream"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_run_that_keeps_outputs_has_the_bits_of_one_that_does_not(family, target, held_out, monkeypatch):
    one, other = network(family), network(family)
    found = told(prune(one, target, held_out=held_out))
    monkeypatch.setattr(replay, "free_device", lambda device: 0)
    assert told(prune(other, target, held_out=held_out)) == found
    for (name, parameter), same in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same), name


@pytest.mark.parametrize(("target", "spared"), [(LayerTarget(), 2), (StreamTarget(), 4)], ids=["layer", "stream"])
def test_attention_that_has_not_changed_is_not_run_again(target, spared, monkeypatch):
    """Of the pruned block for the last capture and behind the block; of the dense one likewise."""
    calls, forward = [], LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, *args, **keys: calls.append(self) or forward(self, *args, **keys)
    )
    counts = []
    for room in (True, False):
        if not room:
            monkeypatch.setattr(replay, "free_device", lambda device: 0)
        model = network("llama")
        prune(model, target, batch_size=12)
        counts.append(calls.count(model.model.layers[0].self_attn))
    assert counts[1] - counts[0] == spared
