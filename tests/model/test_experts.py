"""Mixtures of experts against the same models unrolled: their experts as linear layers, hooked one by one."""

import copy
from functools import partialmethod

import pytest
import torch
import transformers
from tiny import tokens
from tiny_experts import FAMILIES, Unrolled, network, unrolled
from torch import nn

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.baselines.given import Given
from alps_exp.calibration.ladder import Ladder
from alps_exp.layer.inputs import Inputs
from alps_exp.model.experts import Experts
from alps_exp.model.layers import ExpertLayer, find_layer
from alps_exp.model.structure import block_layers, find_blocks


def prune_unrolled(model: nn.Module, ids: torch.Tensor, method: str, sparsity: str, **options) -> dict[str, float]:
    """Block by block in place: hook all linear layers that ours prunes, and prune each by itself. Returns losses."""
    prefix, blocks = find_blocks(model)
    losses = {}
    for index, block in enumerate(blocks):
        inputs: dict[str, list] = {}
        layers = {f"{prefix}.{index}.{path}": m for path, m in block.named_modules() if is_pruned(path, m, block)}
        handles = [
            layer.register_forward_pre_hook(
                lambda m, args, name=name, kept=inputs: kept.setdefault(name, []).append(args[0])
            )
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            for window in ids:
                model(window[None])
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            x = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs[name]]).double()
            weight = layer.weight.detach().clone()
            found = alps_exp.prune_layer(weight, inputs=x.float(), method=method, sparsity=sparsity, **options)
            layer.weight.data.copy_(found.weight)
            delta = weight - layer.weight.detach()
            losses[name] = float((x @ delta.T).square().sum() / (x @ weight.T).square().sum())
    return losses


def is_pruned(path: str, module: nn.Module, block: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not any(
        part in ("router", "gate", "shared_expert_gate", "dt_proj") for part in path.split(".")
    )


def dense(layer) -> torch.Tensor:
    return layer.weight.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_losses_are_those_of_the_unrolled_model(family):
    ours, ids = network(family), tokens(4, 32)
    plain = unrolled(family, ours)
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    with torch.no_grad():  # the reference is the model itself
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, rtol=0, atol=1e-10)
    left = ["*dt_proj"] if family == "jamba" else []  # whose weight Jamba takes without calling it
    record = alps_exp.prune_model(ours, ids, method="wanda", sparsity="2:4", expert_shrinkage=0.0, exclude=left)
    expected = prune_unrolled(plain, ids, "wanda", "2:4")
    rows = {row["name"]: row for row in record["layers"]}
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        weight = dense(find_layer(ours, name))
        torch.testing.assert_close(weight, dense(plain.get_submodule(name)), rtol=0, atol=1e-12)
        assert (weight.reshape(-1, 4).count_nonzero(1) == 2).all() and row["sparsity"] == 0.5
        assert row["relative_loss"] == pytest.approx(expected[name], abs=1e-6)
    changed = {name for name, parameter in ours.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {find_layer(ours, name).stored for name in rows}
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, rtol=0, atol=1e-10)


def test_held_out_losses_are_of_the_held_out_tokens_of_each_expert():
    ours, ids, held_out = network("mixtral"), tokens(6, 32)[:4], tokens(6, 32)[4:]
    plain = unrolled("mixtral", ours)
    record = alps_exp.prune_model(
        ours, ids, method="wanda", sparsity=0.5, held_out=held_out, include=["layers.0.mlp.experts.*"]
    )
    inputs: dict[str, list] = {}
    for row in record["layers"]:
        plain.get_submodule(row["name"]).register_forward_pre_hook(
            lambda m, args, name=row["name"]: inputs.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        plain(held_out)
    for row in record["layers"]:
        x, weight = torch.cat(inputs[row["name"]]), dense(plain.get_submodule(row["name"]))
        delta = weight - find_layer(ours, row["name"]).weight
        loss = float((x @ delta.T).square().sum() / (x @ weight.T).square().sum())
        assert row["held_out_loss"] == pytest.approx(loss, abs=1e-6) and row["relative_loss"] != loss


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_the_tokens_of_each_expert_are_counted(family):
    ours, ids = network(family), tokens(4, 32)
    record = alps_exp.prune_model(ours, ids, method="wanda", sparsity=0.5, batch_size=2)
    experts = [row for row in record["layers"] if "borrowed" in row["stats"]]
    for block in (0, 1):
        own = [row for row in experts if row["block"] == block]
        for kind in ("gate_proj", "up_proj", "down_proj"):
            assert sum(row["tokens"] for row in own if row["name"].endswith(kind)) == 2 * ids.numel()
    fewest = min(experts, key=lambda row: row["tokens"])
    found = record["summary"]["experts"]
    assert found["count"] == 8 and found["tokens"] == 2 * ids.numel() / 4
    assert (found["thinnest"], found["fewest"]) == (fewest["name"].rpartition(".")[0], fewest["tokens"])


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "dsnot"])
def test_methods_that_need_gram_matrices_or_moments_agree_with_the_unrolled_model(method):
    """In float32, where the model itself runs the grouped product."""
    ours, ids = network("qwen3_moe", torch.float32), tokens(6, 32)
    plain = unrolled("qwen3_moe", ours)
    only = {"include": ["model.layers.0.mlp.experts.*"]}
    record = alps_exp.prune_model(ours, ids, method=method, sparsity=0.6, expert_shrinkage=0.0, **only)
    inputs: dict[str, list] = {}
    for row in record["layers"]:
        plain.get_submodule(row["name"]).register_forward_pre_hook(
            lambda m, args, name=row["name"]: inputs.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        for window in ids:
            plain(window[None])
    for row in record["layers"]:
        x, weight = torch.cat(inputs[row["name"]]), dense(plain.get_submodule(row["name"]))
        parts = [part for part in inputs[row["name"]] if len(part)]
        moments = {
            "gram": x.T @ x,
            "mean": x.mean(0),
            "var": torch.stack([part.var(0, unbiased=False) for part in parts]).mean(0),
        }
        inner = alps_exp.prune_layer(
            weight, **moments, tokens=len(x), sequences=len(parts), method=method, sparsity=0.6
        )
        found = dense(find_layer(ours, row["name"]))
        # Near ties go either way, more of them in ALPS, by how the processor rounds.
        same = ((found != 0) == (inner.weight != 0)).float().mean()
        assert same > (0.9 if method == "alps" else 0.98)
        loss = float((x.double() @ (weight - inner.weight).double().T).square().sum())
        loss /= float((x.double() @ weight.double().T).square().sum())
        assert row["relative_loss"] == pytest.approx(loss, rel=2e-2, abs=1e-6)


def starved(family: str = "mixtral") -> nn.Module:
    """A model whose last expert of the first block is never chosen."""
    model = network(family, torch.float32)
    router = model.model.layers[0].mlp.gate
    original = router.forward

    def forward(hidden):
        logits = original(hidden)[0].clone()
        logits[:, -1] = float("-inf")
        scores, index = torch.softmax(logits.float(), -1).topk(2)
        return logits, scores / scores.sum(-1, keepdim=True), index

    router.forward = forward
    return model


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot", "magnitude"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_an_expert_without_tokens_is_pruned_by_the_layers_mean_and_named(method, shrinkage):
    model, ids = starved(), tokens(4, 32)
    before = {
        name: find_layer(model, name).weight.clone() for name in block_layers(model.model.layers[0], "model.layers.0")
    }
    record = alps_exp.prune_model(model, ids, method=method, sparsity=0.5, expert_shrinkage=shrinkage)
    name = "model.layers.0.mlp.experts.3"
    rows = {row["name"]: row for row in record["layers"]}
    for kind in ("gate_proj", "up_proj", "down_proj"):
        row = rows[f"{name}.{kind}"]
        assert row["tokens"] == 0 and row["relative_loss"] is None and row["stats"]["borrowed"] == 1
        assert row["sparsity"] == 0.5 and row["dead_inputs"] == 0
    assert any("1 experts received no calibration tokens" in line and name in line for line in record["warnings"])
    assert record["summary"]["experts"]["thinnest"] == name and record["summary"]["experts"]["fewest"] == 0
    if method == "wanda":  # the scores are those of the inputs of all tokens, each as often as it was handed on
        seen: list = []
        other = starved()
        other.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with torch.no_grad():
            other(ids)
        found = alps_exp.prune_layer(before[f"{name}.up_proj"], inputs=seen[0], method="wanda", sparsity=0.5)
        assert torch.equal(found.weight != 0, find_layer(model, f"{name}.up_proj").weight != 0)


def test_shrinkage_is_a_plain_sum():
    generator = torch.Generator().manual_seed(0)
    x, every = (torch.randn(n, 6, generator=generator) for n in (5, 40))

    def told(x):
        return {"gram": x.T @ x, "mean": x.mean(0), "var": x.var(0, unbiased=False), "tokens": len(x), "sequences": 1}

    inputs = Inputs(**told(x), prior=Inputs(**told(every)))
    found = inputs.shrunk(2.0)
    assert found.tokens == 5 + 12 and found.prior is None
    torch.testing.assert_close(found.gram, x.T @ x + every.T @ every * 12 / 40)
    torch.testing.assert_close(found.diagonal, found.gram.diagonal())
    torch.testing.assert_close(found.mean, (x.sum(0) + 12 * every.mean(0)) / 17)
    assert inputs.shrunk(0.0) is inputs


@pytest.mark.slow
@pytest.mark.parametrize("target", ["layer", "stream"])
def test_statistics_that_take_several_passes_are_the_same(monkeypatch, target):
    """What experts borrow, and what a token lacks, is that of all experts, also where a pass collects for some."""
    found, plain = [], Ladder.__init__
    for passes in (1, 5):
        monkeypatch.setattr(Ladder, "__init__", partialmethod(plain, passes=passes))
        model = network("qwen2_moe", torch.float32)
        record = alps_exp.prune_model(
            model, tokens(4, 32), method="wanda", sparsity=0.5, expert_shrinkage=3.0, target=target
        )
        found.append(([row["relative_loss"] for row in record["layers"]], model.state_dict()))
    (losses, state), (others, other) = found
    assert losses == pytest.approx(others, rel=1e-5)
    assert all(((value != 0) == (other[name] != 0)).float().mean() > 0.999 for name, value in state.items())


def test_globs_reach_experts_and_their_parameters():
    chosen = lambda **words: {  # noqa: E731
        row["name"]
        for row in alps_exp.prune_model(
            network("qwen2_moe"), tokens(4, 32), method="magnitude", sparsity=0.5, losses=False, **words
        )["layers"]
    }
    assert chosen(include=["layers.1.mlp.experts.2.*"]) == {
        f"model.layers.1.mlp.experts.2.{kind}_proj" for kind in ("gate", "up", "down")
    }
    assert not any("mlp.experts" in name for name in chosen(exclude=["*mlp.experts*"]))
    left = chosen(exclude=["*experts.gate_up_proj"])  # the parameter that holds them
    assert "model.layers.0.mlp.experts.0.down_proj" in left
    assert not any(".mlp.experts." in name and not name.endswith("down_proj") for name in left)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_tokens_count_by_the_squares_of_their_weights(family):
    """Wanda from inputs that are multiplied by the weights; in the first block, whose inputs no pruning changes."""
    ours, seen = network(family), []
    held = ours.model.layers[0].mlp.experts
    handle = held.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        ours(tokens(4, 32))
    handle.remove()
    experts = Experts.of(copy.deepcopy(held))
    record = alps_exp.prune_model(
        ours,
        tokens(4, 32),
        method="wanda",
        sparsity=0.5,
        expert_shrinkage=0.0,
        expert_weighting="squared",
        batch_size=4,
    )
    rows = {row["name"]: row for row in record["layers"]}
    for part in experts.routed(experts.arguments(*seen[0])):
        for kind in experts.projections:
            name = f"model.layers.0.mlp.experts.{part.expert}.{kind}"
            x = part.inputs if kind != "down_proj" else experts.inner(part.expert, part.inputs).detach()
            weight = experts.weight(kind, part.expert)
            plain = alps_exp.prune_layer(weight, inputs=x, method="wanda", sparsity=0.5)
            x = x * part.weights[:, None]
            wanted = alps_exp.prune_layer(weight, inputs=x, method="wanda", sparsity=0.5)
            assert torch.equal(find_layer(ours, name).weight != 0, wanted.weight != 0)
            assert not torch.equal(plain.support, wanted.support)
            loss = (x @ (weight - wanted.weight).T).square().sum() / (x @ weight.T).square().sum()
            assert rows[name]["relative_loss"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "sparsellm"}, "SparseLLM alternates between the two sides of one activation"),
        ({"expert_weighting": "squares"}, "expert_weighting"),
        ({"method": "osscar"}, "Osscar takes channels away, and experts share one parameter"),
        ({"method": "tune-lora"}, "adapters are for linear layers"),
        (
            {"method": "elsa", "exclude": ["*experts.2.*"]},
            "Elsa trains model.layers.0.mlp.experts.gate_up_proj as a whole",
        ),
        (
            {"finish": "block", "held_out": tokens(2, 32), "exclude": ["*layers.1.*experts.2.gate_proj"]},
            "finish=block trains model.layers.1.mlp.experts.gate_up_proj as a whole",
        ),
    ],
)
def test_what_cannot_be_done_with_experts_is_refused_before_anything_changes(words, message):
    model = network("mixtral", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        alps_exp.prune_model(model, tokens(4, 32), **{"method": "wanda", "sparsity": 0.5, **words})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if not {"method", "exclude", "expert_weighting"} & words.keys():
        alps_exp.prune_model(
            model, tokens(4, 32), **{"method": "wanda", "sparsity": 0.5, "exclude": ["*experts*"], **words}
        )


def test_a_module_that_computes_something_else_is_refused():
    model = network("mixtral")
    experts = model.model.layers[1].mlp.experts
    original = experts.forward
    experts.forward = lambda *args: 1.5 * original(*args)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts \(MixtralExperts\) does not compute"):
        alps_exp.prune_model(model, tokens(4, 32), method="wanda", sparsity=0.5)


def test_layers_of_experts_are_views_of_their_parameter():
    model = network("gpt_oss")
    layers = block_layers(model.model.layers[0], "model.layers.0")
    for name, layer in layers.items():
        if isinstance(layer, ExpertLayer):
            assert find_layer(model, name).weight.data_ptr() == layer.weight.data_ptr()
            layer.write(torch.full(layer.shape, float(layer.expert + 1), dtype=torch.float64))
    for number in range(4):
        own = [getattr(model.model.layers[0].mlp.experts, kind)[number] for kind in ("gate_up_proj", "down_proj")]
        assert all((value == number + 1).all() for value in own)


def test_nemotron_without_gates():
    """Its experts have up and down alone."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = transformers.NemotronHConfig(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=3, num_experts_per_tok=2, moe_latent_size=None
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = NemotronHExperts(config).double()
    for parameter in module.parameters():
        parameter.data.normal_()
    experts = Experts.of(module)
    assert experts.projections == ("up_proj", "down_proj") and experts.count == 3
    hidden, index = torch.randn(20, 16).double(), torch.randint(0, 3, (20, 1))
    experts.check((hidden, index, torch.rand(20, 1).double()), "experts")
    for part in experts.routed((hidden, index, torch.rand(20, 1).double())):
        expected = module.act_fn(part.inputs @ module.up_proj[part.expert].T)
        torch.testing.assert_close(experts.inner(part.expert, part.inputs), expected)


def test_the_reference_is_no_module_of_experts():
    assert Experts.of(Unrolled("mixtral", network("mixtral").model.layers[0].mlp.experts)) is None


# Saved expert by expert under names of their own, as they are in memory (with biases), and flat.
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_the_mask_of_a_saved_mixture_is_found(family, tmp_path):
    pruned, ours = network(family, torch.float32), network(family, torch.float32)
    rows = alps_exp.prune_model(pruned, tokens(4, 32), method="wanda", sparsity="2:4")["layers"]
    pruned.save_pretrained(tmp_path)
    alps_exp.prune_model(ours, tokens(4, 32), Given(mask=str(tmp_path)), "2:4", losses=False)
    assert any(".experts.3.down_proj" in row["name"] for row in rows)
    for name, weight in pruned.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    with pytest.raises(UserError, match=r"experts.* is not 1:4: give its sparsity"):
        alps_exp.prune_model(network(family), tokens(4, 32), Given(mask=str(tmp_path)), "1:4", include=["*experts.*"])
