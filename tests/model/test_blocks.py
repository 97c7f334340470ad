"""The model cut into blocks does what the whole model does, for every family."""

import pytest
import torch
import transformers
from tiny import load, mixtral, random_tokens
from torch import nn

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.evaluation.perplexity import perplexity
from alps_exp.model.blocks import BlockModel
from alps_exp.model.hidden import HiddenStates
from alps_exp.model.structure import block_layers, find_blocks

FAMILIES = ["opt", "llama", "gpt2", "gemma3", "qwen3"]
CPU = torch.device("cpu")


@pytest.fixture(params=FAMILIES)
def network(request) -> nn.Module:
    return load(request.getfixturevalue(f"tiny_{request.param}"))


def bloom() -> nn.Module:
    config = transformers.BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config).eval()


def whole(network: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(ids).logits


def blockwise(model: BlockModel, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    hidden = HiddenStates(model, ids, batch_size)
    for index in range(len(model)):
        with model.block(index) as block:
            hidden.advance(model, index, block)
    return torch.cat([model.head(c, h) for c, h in zip(ids.split(batch_size), hidden, strict=True)])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_block_by_block_equals_the_whole_model(network, batch_size):
    ids = random_tokens(5, 40)
    expected = whole(network, ids)
    torch.testing.assert_close(blockwise(BlockModel(network, CPU), ids, batch_size), expected, rtol=1e-4, atol=1e-4)
    # The stubs are gone afterwards.
    torch.testing.assert_close(whole(network, ids), expected)


def test_windows_of_another_length_get_their_own_arguments(network):
    model = BlockModel(network, CPU)
    for ids in (random_tokens(3, 40), random_tokens(3, 24), random_tokens(1, 56)):
        torch.testing.assert_close(blockwise(model, ids, 2), whole(network, ids), rtol=1e-4, atol=1e-4)


def test_blocks_that_return_tuples_and_take_batch_sized_arguments():
    network, ids = bloom(), random_tokens(5, 40)
    torch.testing.assert_close(blockwise(BlockModel(network, CPU), ids, 2), whole(network, ids), rtol=1e-4, atol=1e-4)


def test_offloaded_blocks_visit_the_device_and_go_home(tiny_llama):
    network, ids = load(tiny_llama), random_tokens(5, 40)
    expected = whole(network, ids)
    model = BlockModel(network, CPU, offload=True)
    assert find_blocks(network)[1] is model.blocks
    torch.testing.assert_close(blockwise(model, ids, 1), expected, rtol=1e-4, atol=1e-4)


def test_not_a_number_names_the_block(tiny_llama):
    network = load(tiny_llama)
    network.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"model\.layers\.1 produces \d+ NaN or infinite activations"):
        perplexity(BlockModel(network, CPU), random_tokens(5, 40), quiet=True)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="Sequential has no decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(3, 3)))


def test_fused_experts_are_refused_by_name_unless_excluded():
    prefix, blocks = find_blocks(transformers.AutoModelForCausalLM.from_config(mixtral()))
    blocks[0].mlp.experts.is_transposed = None  # a layout that is not known
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj is a fused weight.*, 85% of"):
        block_layers(blocks[0], f"{prefix}.0")
    linears = block_layers(blocks[0], f"{prefix}.0", lambda name: "experts" in name)
    assert {name.rsplit(".", 1)[-1] for name in linears} >= {"q_proj", "k_proj", "v_proj", "o_proj"}


def dbrx() -> nn.Module:
    """Its experts lie side by side in matrices, without a linear layer."""
    config = transformers.DbrxConfig(
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        vocab_size=384,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    )
    return transformers.DbrxForCausalLM(config).eval()


def test_experts_in_matrices_are_refused_by_name_unless_excluded():
    """As they are in a layout that is not known."""

    def other() -> nn.Module:
        network = dbrx()
        for block in network.transformer.blocks:
            block.ffn.experts.__class__ = type("Others", (type(block.ffn.experts),), {})
        return network

    with pytest.raises(
        UserError, match=r"blocks\.0\.ffn\.experts\.mlp\.w1 is a fused weight of shape \(384, 64\)"
    ) as e:
        alps_exp.prune_model(other(), random_tokens(5, 40), method="wanda", sparsity=0.5)
    globs = ["*mlp.w1", "*mlp.v1", "*mlp.w2"]
    assert str(e.value).endswith(f"layers.exclude=[{','.join(map(repr, globs))}]")
    summary = alps_exp.prune_model(other(), random_tokens(5, 40), method="wanda", sparsity=0.5, exclude=globs)[
        "summary"
    ]
    assert summary["weights"] == 2 * (64 * 128 + 64 * 64)
    assert summary["share"] == summary["weights"] / summary["block_weights"] < 0.2


def test_a_large_matrix_beside_the_layers_is_refused_whatever_holds_it(tiny_llama):
    for holder in (nn.Embedding(300, 64), nn.Conv1d(64, 64, 3), nn.MultiheadAttention(64, 4)):
        network = load(tiny_llama)
        network.model.layers[1].extra = holder
        with pytest.raises(UserError, match=r"model\.layers\.1\.extra\.(in_proj_)?weight is a fused weight"):
            alps_exp.prune_model(network, random_tokens(5, 40), method="magnitude", sparsity=0.5, losses=False)
        record = alps_exp.prune_model(
            network, random_tokens(5, 40), method="magnitude", sparsity=0.5, losses=False, exclude=["extra*"]
        )
        assert record["summary"]["share"] < 0.9


def test_a_large_buffer_that_is_saved_counts_like_a_parameter(tiny_llama):
    network = load(tiny_llama)
    block = network.model.layers[0]
    block.register_buffer("mask", torch.ones(256, 256, dtype=torch.bool))
    block.register_buffer("table", torch.ones(256, 256), persistent=False)
    assert len(block_layers(block, "b")) == 7
    block.register_buffer("packed", torch.ones(64, 160, dtype=torch.int32))
    with pytest.raises(UserError, match=r"b\.packed is a fused weight of shape \(64, 160\)"):
        block_layers(block, "b")


def test_small_tables_and_states_are_no_layers():
    config = transformers.MambaConfig(vocab_size=384, hidden_size=64, num_hidden_layers=1, state_size=16)
    block = transformers.MambaForCausalLM(config).backbone.layers[0]
    assert set(block_layers(block, "b")) == {f"b.mixer.{name}_proj" for name in ("in", "x", "dt", "out")}


def test_quantised_weights_are_refused_by_name(tiny_llama):
    network = load(tiny_llama)
    layer = network.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"mlp\.up_proj holds quantised weights"):
        block_layers(network.model.layers[0], "model.layers.0")


def test_arguments_that_depend_on_the_tokens_are_refused(tiny_llama):
    network = load(tiny_llama)
    model = BlockModel(network, CPU)
    inner = network.model.forward

    def forward(input_ids, **kwargs):
        return inner(input_ids, extra=input_ids.float(), **kwargs)

    network.model.forward = forward
    with pytest.raises(UserError, match="arguments that depend on the tokens"):
        HiddenStates(model, random_tokens(5, 40), len(random_tokens(5, 40)))
    alike = torch.arange(3, 6)[:, None].expand(3, 40)  # no window shows it by itself
    with pytest.raises(UserError, match="arguments that depend on the tokens"):
        HiddenStates(BlockModel(network, CPU), alike, 1)
