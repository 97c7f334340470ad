"""Sensitivity of experts against one graph of the same model whose experts are linear layers, and what follows."""

import pytest
import torch
from tiny import tokens
from tiny_experts import FAMILIES, network, unrolled

import alps_exp
from alps_exp.allocation.allocations import ByLoss, ByOutliers, BySensitivity
from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.base.errors import UserError
from alps_exp.calibration.sensitivity import BORROWED, SensitivityChoice, measure_sensitivity
from alps_exp.model.blocks import BlockModel
from alps_exp.model.layers import find_layer

WINDOWS = 2


def measured(model) -> list[str]:
    return [name for name in linear_shapes(model, Selection()) if "dt_proj" not in name]  # whose weight Jamba takes


def plain_pass(family: str, ours) -> tuple[dict, dict, dict]:
    """Name → Σ g², Σ x² and the number of tokens, of the model in one graph, in float64."""
    plain, kept, handles = unrolled(family, ours), [], []

    def hook_of(name):
        def hook(module, args, output):
            output.retain_grad()
            kept.append((name, args[0].detach(), output))

        return hook

    names = measured(ours)
    handles = [plain.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    outputs, inputs, counts = {}, {}, dict.fromkeys(names, 0)
    for window in tokens(WINDOWS, 32):
        kept.clear()
        logits = plain(window[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        for name, x, y in kept:
            outputs[name] = outputs.get(name, 0) + y.grad.reshape(-1, y.shape[-1]).square().sum(0)
            inputs[name] = inputs.get(name, 0) + x.reshape(-1, x.shape[-1]).square().sum(0)
            counts[name] += x.reshape(-1, x.shape[-1]).shape[0]
    for handle in handles:
        handle.remove()
    return outputs, inputs, counts


def expected(family: str, ours) -> tuple[dict, dict]:
    """Name → f and d, with what experts borrow, by the definition."""
    outputs, inputs, counts = plain_pass(family, ours)
    path, every = FAMILIES[family][2], WINDOWS * 32
    assert any(count < every / 2 for count in counts.values()), "experts are handed some of the tokens"
    f, d = {}, {}
    for name in measured(ours):
        f[name], d[name] = outputs.get(name, 0), inputs.get(name, 0)
        if f".{path}." in name:
            owner, kind = name.partition(f".{path}.")[0], name.rpartition(".")[2]
            peers = [f"{owner}.{path}.{number}.{kind}" for number in range(4)]
            handed = sum(counts[peer] for peer in peers)
            f[name] = f[name] + BORROWED * sum(outputs.get(peer, 0) for peer in peers) / handed
            d[name] = d[name] + BORROWED * sum(inputs.get(peer, 0) for peer in peers) / handed
            d[name] = d[name] * every / (counts[name] + BORROWED)
    return f, d


LAYOUTS = ("mixtral", "qwen2_moe", "gpt_oss", "llama4", "dbrx")  # the other families store theirs as one of these


@pytest.mark.parametrize(
    "family", [name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_moments_of_experts_are_those_of_a_plain_backward_pass(family):
    ours = network(family)
    names = measured(ours)
    found = measure_sensitivity(
        BlockModel(ours, torch.device("cpu")), tokens(WINDOWS, 32), names, Selection().excluded, quiet=True
    )
    f, d = expected(family, ours)
    for name in names:
        torch.testing.assert_close(found.outputs[name], f[name], rtol=1e-5, atol=0)
        torch.testing.assert_close(found.inputs[name], d[name], rtol=1e-5, atol=0)


def test_experts_that_no_token_reached_count_as_average_ones():
    model, chosen = network("mixtral"), torch.tensor([0, 1])
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, found: (*found[:2], found[2] * 0 + chosen))
    names = linear_shapes(model, Selection())
    found = measure_sensitivity(
        BlockModel(model, torch.device("cpu")), tokens(4, 32), names, Selection().excluded, quiet=True
    )
    every = 4 * 32  # each of the first two is handed all
    for kind in ("gate_proj", "up_proj", "down_proj"):
        own = [f"model.layers.1.mlp.experts.{number}.{kind}" for number in range(4)]
        for told, share in ((found.inputs, 0.5), (found.outputs, 0.5 * BORROWED / (every + BORROWED))):
            first, second, *others = (told[name] for name in own)
            for other in others:
                torch.testing.assert_close(other, share * (first + second))
            assert others[0].data_ptr() != others[1].data_ptr()  # a file keeps each


ALLOCATIONS = {"sensitivity": BySensitivity(cap=1.0), "loss": ByLoss(cap=1.0), "owl": ByOutliers(outlier=1.5)}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocations_by_scores_of_experts_are_those_of_plain_scores(name):
    ours = network("qwen2_moe")
    find_layer(ours, "model.layers.1.mlp.experts.0.down_proj").weight.mul_(3)
    f, d = expected("qwen2_moe", ours)
    weighs = name == "sensitivity"
    scores = {own: find_layer(ours, own).weight ** 2 * d[own] * (f[own][:, None] if weighs else 1) for own in f}
    choice = SensitivityChoice("outputs" if weighs else "none", WINDOWS, 0.0)
    words = {"sensitivity": choice, "allocation": ALLOCATIONS[name], "losses": False}
    record = alps_exp.prune_model(ours, tokens(WINDOWS, 32), method="magnitude", sparsity=0.6, **words)
    levels = {row["name"]: row["sparsity_target"] for row in record["layers"]}
    if name == "owl":  # the block with more outliers has the lower level by twice the spread
        roots = [torch.cat([s.sqrt().flatten() for own, s in scores.items() if f"layers.{i}." in own]) for i in (0, 1)]
        shares = [float((root > 1.5 * root.mean()).double().mean()) for root in roots]
        first, second = (levels[f"model.layers.{index}.mlp.experts.2.down_proj"] for index in (0, 1))
        assert abs(shares[0] - shares[1]) > 0.002
        assert second - first == pytest.approx(0.16 if shares[0] > shares[1] else -0.16, abs=0.01)
        return
    if name == "loss":
        scores = {own: score / score.sum() for own, score in scores.items()}
    threshold = torch.cat([score.flatten() for score in scores.values()]).quantile(0.6)
    for own, score in scores.items():
        assert levels[own] == pytest.approx(float((score < threshold).double().mean()), abs=0.012), own
    assert max(levels.values()) - min(levels.values()) > 0.1


def test_a_layer_that_is_never_called_is_named():
    model = network("jamba")
    with pytest.raises(UserError, match=r"dt_proj received no calibration tokens: .*layers\.exclude=\['\*\.dt_proj'\]"):
        alps_exp.prune_model(model, tokens(4, 32), method="magnitude", sparsity=0.5, allocation="loss")
