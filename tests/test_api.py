"""What prune_layer and prune_model refuse, each in one line."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from alps_exp import prune_layer, prune_model
from alps_exp.baselines.sparsegpt import SparseGPT
from alps_exp.errors import UserError

WEIGHT, INPUTS = torch.ones(4, 8), torch.ones(3, 5, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": WEIGHT.numpy(), "inputs": INPUTS}, "weight must be a torch tensor, got ndarray"),
        ({"weight": WEIGHT, "inputs": [1.0]}, "inputs must be a torch tensor, got list"),
        ({"weight": WEIGHT, "inputs": INPUTS, "sequences": 2}, "hold 3 sequences, and sequences=2"),
        ({"weight": WEIGHT, "gram": torch.eye(8), "tokens": 0}, "tokens=0 is not allowed"),
        ({"weight": WEIGHT, "inputs": INPUTS, "gram": torch.eye(8)}, "inputs and gram are both given"),
        ({"weight": WEIGHT, "inputs": INPUTS, "method": SparseGPT(), "dampin": 1}, "did you mean damping"),
    ],
)
def test_prune_layer_refuses(given, message):
    with pytest.raises(UserError, match=message) as error:
        prune_layer(**given)
    assert "\n" not in str(error.value)


def test_prune_model_refuses(tiny_opt):
    model, tokens = AutoModelForCausalLM.from_pretrained(tiny_opt), torch.zeros(2, 16, dtype=torch.long)
    with pytest.raises(UserError, match="must be a causal language model of transformers, got Linear"):
        prune_model(torch.nn.Linear(3, 3), tokens)
    with pytest.raises(UserError, match="beyond the model's context of 256 tokens"):
        prune_model(model, torch.zeros(2, 300, dtype=torch.long))
    with pytest.raises(UserError, match="did you mean q_proj"):
        prune_model(model, tokens, method="magnitude", exclude=["q_porj"])
