"""Experts that are fitted to the dense model's stream, against least squares in float64 from whole forwards."""

import copy

import pytest
import torch
from tiny import tokens
from tiny_experts import FAMILIES, network

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.methods.target import StreamTarget
from alps_exp.model.experts import Experts
from alps_exp.model.layers import find_layer
from alps_exp.model.structure import find_blocks

RIDGE = 0.02


def records(model, index: int, path: str) -> dict:
    """What block `index` gives, and what its experts and a shared one are handed and give, in one forward."""
    block, found = find_blocks(model)[1][index], {}
    watched = {"block": block, "experts": block.get_submodule(path)}
    for shared in ("shared_experts", "shared_expert"):
        name, inside = path.replace("experts", shared), dict(block.named_modules())
        if name in inside and f"{name}_gate" not in inside:
            watched["shared"] = inside[name]

    def keep(name):
        def hook(module, args, kwargs, output):
            output = output[0] if isinstance(output, tuple) else output
            found[name] = (args, kwargs, output.clone())

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in watched.items()]
    with torch.no_grad():
        model(tokens(4, 32), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def weights_of(part) -> torch.Tensor:
    """To a factor that a token's experts share, which the inputs of Llama 4's have been multiplied by."""
    return part.weights if part.weights is not None else part.inputs.norm(dim=1)


# Plain; a shared expert behind a gate; a factor on the way; biases; a shared expert that is a writer of its own; flat;
# experts that are handed inputs multiplied by their scores and are summed outside of their module, one or two a token.
@pytest.mark.parametrize(
    ("family", "weighting"),
    [(name, "none") for name in ("mixtral", "qwen2_moe", "granitemoe", "gpt_oss", "deepseek_v3", "dbrx")]
    + [("mixtral", "squared"), ("llama4", "none"), ("llama4", "two a token")],
)
def test_downs_are_fitted_to_what_the_stream_lacks(family, weighting):
    ours, path = network(family), FAMILIES[family][2]
    if weighting == "two a token":
        weighting = "none"
        for block in find_blocks(ours)[1]:
            block.feed_forward.router.top_k = 2
    dense = copy.deepcopy(ours)
    words = {"target": StreamTarget(strength=0.7, ridge=RIDGE), "expert_shrinkage": 0.0, "include": ["*experts.*"]}
    words["expert_weighting"] = weighting
    record = alps_exp.prune_model(ours, tokens(4, 32), method="magnitude", sparsity=0.5, **words)
    rows = {row["name"]: row for row in record["layers"]}
    assert {row["target"] for name, row in rows.items() if name.endswith(("gate_proj", "up_proj"))} == {"layer"}
    index = len(find_blocks(ours)[1]) - 1
    # The pruned model as it is when the last block's downs are to be fitted.
    before, name = copy.deepcopy(ours), f"{find_blocks(ours)[0]}.{index}.{path}"
    for number in range(4):
        down = f"{name}.{number}.down_proj"
        find_layer(before, down).write(find_layer(dense, down).weight)
    one, other = records(dense, index, path), records(before, index, path)
    factor = getattr(ours.config, "residual_multiplier", 1.0)
    lacking = (one["block"][2] - other["block"][2]) / factor
    if "shared" in one:
        lacking = lacking - (one["shared"][2] - other["shared"][2]).view_as(lacking)
    lacking = lacking.reshape(-1, lacking.shape[-1])
    experts = Experts.of(before.get_submodule(name))
    parts = list(experts.routed(experts.arguments(*other["experts"][:2])))
    squares = torch.zeros(len(lacking), dtype=torch.float64)
    for part in parts:
        squares[part.tokens] += weights_of(part) ** 2
    assert len(parts) == 4
    for part in parts:
        down = f"{name}.{part.expert}.down_proj"
        weight, z = find_layer(dense, down).weight, experts.inner(part.expert, part.inputs).detach()
        counted = part.weights if part.weights is not None else weights_of(part) ** 2
        wanted = lacking[part.tokens] * (counted / squares[part.tokens])[:, None]
        if weighting == "squared":
            wanted, z = wanted * part.weights[:, None], z * part.weights[:, None]
        gram = z.T @ z
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        target = weight + 0.7 * torch.linalg.solve(gram, z.T @ wanted).T
        threshold = target.abs().flatten().kthvalue(target.numel() // 2).values
        expected = target * (target.abs() > threshold)
        assert float((target - weight).norm() / weight.norm()) > 0.01
        found = find_layer(ours, down).weight
        assert float((found - expected).norm() / expected.norm()) < 2e-3
        assert rows[down]["target"] == "stream"


@pytest.mark.slow
def test_the_stream_comes_nearer_to_the_dense_one():
    drifts = []
    for target in ("layer", StreamTarget(strength=1.0)):
        ours = network("mixtral", torch.float32)
        dense = copy.deepcopy(ours)
        alps_exp.prune_model(ours, tokens(16, 32), method="wanda", sparsity=0.5, target=target, include=["*experts.*"])
        with torch.no_grad():
            one, other = (model(tokens(16, 32), output_hidden_states=True).hidden_states[-2] for model in (dense, ours))
        drifts.append(float((one - other).norm() / one.norm()))
    assert drifts[1] < 0.95 * drifts[0]


def mean_of_experts(own, hidden):
    hidden = hidden.reshape(-1, hidden.shape[-1])
    scores, logits = own.router(hidden)
    routed = own.experts((hidden[None] * scores.T[..., None]).flatten(0, 1)).view(4, *hidden.shape)
    return own.shared_expert(hidden) + routed.mean(0), logits


def test_experts_whose_sum_does_not_reach_the_stream_are_refused():
    model = network("llama4")
    for block in model.model.layers:
        block.feed_forward.forward = lambda hidden, own=block.feed_forward: mean_of_experts(own, hidden)
    with pytest.raises(UserError, match="its experts are not seen to add their sum to the hidden states"):
        alps_exp.prune_model(model, tokens(4, 32), method="wanda", sparsity=0.5, target="stream")
