"""What prune_layer and prune_model refuse, each in one line, and what they leave as the user has set it."""

import pytest
import torch
from tiny import random_tokens
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from alps_exp import prune_layer, prune_model
from alps_exp.base.errors import UserError
from alps_exp.baselines.sparsegpt import SparseGPT

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


def correlated(width: int = 24, tokens: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)


X = correlated()
GRAM = X.T @ X
SIGNS = torch.ones(24).where(torch.arange(24) % 2 == 0, -1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gram": GRAM.triu()}, "not symmetric .* both triangles"),
        ({"gram": GRAM.tril()}, "not symmetric"),
        ({"gram": GRAM.roll(1, 0).roll(1, 1) + 1e-2 * GRAM.triu(1)}, "not symmetric"),
        ({"gram": GRAM * SIGNS}, "not symmetric|negative diagonal"),
        ({"gram": GRAM + 5 * GRAM.abs().max() * (1 - torch.eye(24))}, "entries beyond"),
        ({"gram": -GRAM}, "negative diagonal"),
        ({"gram": GRAM.to(torch.complex64)}, "gram must hold real floating-point numbers, got torch.complex64"),
        ({"weight": torch.ones(4, 24, dtype=torch.complex64), "gram": GRAM}, "weight must hold real"),
        ({"weight": torch.ones(4, 24, dtype=torch.int64), "gram": GRAM}, "weight must hold real"),
        (
            {"weight": torch.ones(4, 24, device="meta"), "gram": GRAM},
            "weight must be a dense tensor with values, got a meta",
        ),
        ({"gram": GRAM.to_sparse()}, "gram must be a dense tensor with values, got a torch.sparse_coo one"),
        ({"gram": GRAM[0]}, r"gram must have shape \(24, 24\), got \(24,\)"),
        (
            {"inputs": X.to(torch.complex64)},
            "inputs must be a dense tensor of real numbers, got a torch.strided torch.com",
        ),
        (
            {"gram": GRAM, "var": -X.var(0), "mean": X.mean(0), "tokens": 200, "sequences": 1},
            "var has negative entries",
        ),
        ({"gram": GRAM / 200, "var": X.var(0), "mean": 9 + X.mean(0), "tokens": 200}, "plain sum over tokens"),
    ],
)
@pytest.mark.parametrize("method", ["alps", "dsnot"])
def test_prune_layer_refuses_what_no_inputs_have(given, message, method):
    with pytest.raises(UserError, match=message) as error:
        prune_layer(**{"weight": torch.ones(4, 24)} | given, method=method, sparsity=0.5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0])
def test_prune_layer_takes_matrices_that_were_rounded(dtype, scale):
    """Also of inputs that are always zero, that are the same, and of very unequal size."""
    x = X.double() * torch.logspace(-1, 1, 24)
    x[:, 3], x[:, 5] = 0, x[:, 4]
    gram = (scale * x.T @ x / 2000).to(dtype)
    assert prune_layer(torch.ones(4, 24), gram=gram, sparsity=0.5).weight.count_nonzero() == 48
    gram = (scale * x.T.float() @ x.float()).double()  # not quite symmetric
    assert prune_layer(torch.ones(4, 24), gram=gram, sparsity=0.5).weight.count_nonzero() == 48


def load(folder, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def wanda(network, **options) -> dict:
    return prune_model(network, random_tokens(), method="wanda", sparsity=0.5, **options)


def test_globs_come_from_anything_that_can_be_gone_through_once(tiny_llama):
    names = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")]
    record = wanda(load(tiny_llama), include=iter(names), exclude=(name for name in names[1:]))
    assert [row["name"] for row in record["layers"]] == names[:1]
    assert record["config"]["layers"] == {"include": names, "exclude": names[1:], "sparsity": {}}
    with pytest.raises(UserError, match=r"layers\.include=\[1, 2\] is not allowed"):
        wanda(load(tiny_llama), include=iter([1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_of_late_blocks_are_checked_before_the_first_is_pruned(tiny_llama, value, dtype):
    network = load(tiny_llama, dtype=dtype)
    network.model.layers[1].mlp.down_proj.weight.data[1, 2] = value
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj: the weight has 1 NaN or infinite"):
        wanda(network)
    assert network.model.layers[0].mlp.up_proj.weight.count_nonzero() == 160 * 64
    assert len(wanda(network, exclude=["layers.1.*"], losses=False)["layers"]) == 7  # what is left out may be so


def test_what_is_set_on_a_model_stays(tiny_llama):
    network, calls = load(tiny_llama), []
    network.config.use_cache = True
    network.train()
    network.model.layers[1].eval()
    network.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    network.gradient_checkpointing_enable()
    network.model.layers[0].register_forward_hook(lambda *_: calls.append("after"))
    network.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    modes = {name: module.training for name, module in network.named_modules()}
    grads = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    record = wanda(network)
    assert network.config.use_cache and network.is_gradient_checkpointing
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == grads
    assert {name: parameter.data_ptr() for name, parameter in network.named_parameters()} == places
    assert calls == ["before", "after"] * (len(calls) // 2)
    calls.clear()
    with torch.no_grad():
        network.eval()(random_tokens())
    assert calls == ["before", "after"]
    losses = [row["relative_loss"] for row in wanda(load(tiny_llama))["layers"]]
    assert [row["relative_loss"] for row in record["layers"]] == losses


@pytest.mark.parametrize("how", ["forward", "hook", "pre-hook"])
def test_what_is_changed_on_a_block_is_part_of_the_model_and_stays(tiny_llama, how):
    """Doubled outputs of the first block: the second is calibrated on them, and they are doubled once."""
    network, expected = load(tiny_llama), load(tiny_llama)
    block, own, calls = network.model.layers[0], network.model.layers[0].forward, []

    def doubled(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs) * 2

    if how == "forward":
        block.forward = doubled
    elif how == "hook":
        block.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    else:
        network.model.layers[1].register_forward_pre_hook(lambda module, args: calls.append(1) or (args[0] * 2,))
    seen = []
    network.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    record = wanda(network, exclude=["layers.0.*"])
    # The norm before the first linear layers takes the factor out; the residual connection does not.
    reference = wanda(expected, exclude=["layers.0.*"])
    losses = [[row["relative_loss"] for row in found["layers"]] for found in (record, reference)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3) and losses[0][-1] != losses[1][-1]
    if how == "forward":
        assert block.forward is doubled
    calls.clear()
    with torch.no_grad():
        network.eval()(random_tokens())
    assert calls == [1]


@pytest.mark.slow
def test_a_compiled_model_is_the_one_behind_it(tiny_llama):
    expected, network = load(tiny_llama), load(tiny_llama)
    compiled = torch.compile(network, backend="eager")
    record = wanda(compiled)
    assert record["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    wanda(expected)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), expected.parameters(), strict=True))
    network = load(tiny_llama)
    for block in network.model.layers:
        block.compile(backend="eager")
    with torch.no_grad():
        network(random_tokens())
    wanda(network)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), expected.parameters(), strict=True))


def test_blocks_that_are_wrapped_by_a_compiler_are_refused(tiny_llama):
    network = load(tiny_llama)
    network.model.layers[1] = torch.compile(network.model.layers[1], backend="eager")
    with pytest.raises(UserError, match=r"blocks of model\.layers are wrapped by torch\.compile.*block\.compile\(\)"):
        wanda(network)


def test_models_with_hooks_of_accelerate(tiny_llama, tmp_path):
    from accelerate import dispatch_model

    expected, network = load(tiny_llama), dispatch_model(load(tiny_llama), {"": "cpu"}, force_hooks=True)
    forwards = [vars(block)["forward"] for block in network.model.layers]
    wanda(network), wanda(expected)
    assert [vars(block)["forward"] for block in network.model.layers] == forwards
    assert all(hasattr(block, "_hf_hook") for block in network.model.layers)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), expected.parameters(), strict=True))
    network.model.layers[1]._hf_hook.execution_device = "cuda:1"
    with pytest.raises(UserError, match=r"hook of accelerate runs model\.layers\.1 on cuda:1, not cpu: .*device_map"):
        wanda(network)

    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    network = load(tiny_llama, device_map=places, offload_folder=tmp_path)
    with pytest.raises(UserError, match=r"has its weights on cpu, meta: load it without device_map"):
        wanda(network)
    assert network.model.layers[0].mlp.up_proj.weight.count_nonzero() == 160 * 64


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_are_no_layers_until_they_are_merged(tiny_llama, whole):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    network = peft.get_peft_model(load(tiny_llama), options)
    with pytest.raises(UserError, match=r"adapter of peft .*merge_and_unload"):
        wanda(network if whole else network.base_model.model)
    assert len(wanda(network.merge_and_unload())["layers"]) == 14


@pytest.mark.parametrize("part", ["layer", "mlp"])
def test_weights_that_layers_share_are_not_pruned_twice(tiny_llama, part):
    network = load(tiny_llama)
    if part == "mlp":
        network.model.layers[1].mlp = network.model.layers[0].mlp
    else:
        network.model.layers[1].mlp.up_proj.weight = network.model.layers[0].mlp.up_proj.weight
    name = r"mlp\.(gate|up)_proj"
    with pytest.raises(UserError, match=rf"layers\.0\.{name} shares its weight with model\.layers\.1\.{name}"):
        wanda(network)
    assert len(wanda(network, exclude=["mlp.*"])["layers"]) == 8


@pytest.mark.parametrize("kind", ["parametrization", "weight_norm", "mask"])
def test_weights_that_are_made_anew_in_every_forward_are_refused(tiny_llama, kind):
    """What is written there would be gone after it."""
    network = load(tiny_llama)
    layer = network.model.layers[1].mlp.up_proj
    if kind == "parametrization":
        nn.utils.parametrizations.weight_norm(layer)
    elif kind == "weight_norm":
        nn.utils.weight_norm(layer)
    else:
        prune.l1_unstructured(layer, "weight", 0.3)
    with pytest.raises(
        UserError, match=r"model\.layers\.1\.mlp\.up_proj makes its weight anew .*make it permanent first"
    ):
        wanda(network)
    assert network.model.layers[0].mlp.up_proj.weight.count_nonzero() == 160 * 64
    assert len(wanda(network, exclude=["up_proj", "up_proj.*"])["layers"]) == 12


@pytest.mark.parametrize("change", ["hook", "return_dict", "dtype"])
def test_a_model_whose_own_forward_fails_or_is_random_is_told_so(tiny_llama, change):
    network = load(tiny_llama)
    message = "LlamaForCausalLM fails when it runs block by block .*where its own forward does not fail"
    if change == "hook":
        network.model.embed_tokens.register_forward_hook(lambda module, args, output: output + torch.rand(output.shape))
        message = r"model\.layers\.0 does not receive what the embedding gives"
    elif change == "return_dict":
        network.config.return_dict = False
    else:
        network.lm_head.double()
    with pytest.raises(UserError, match=message):
        wanda(network)
