"""Models for which one block after the other is not their own forward are refused before anything is pruned."""

import copy

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.evaluation.perplexity import perplexity
from alps_exp.model import faithful, loading
from alps_exp.model.blocks import BlockModel
from alps_exp.model.hidden import HiddenStates
from alps_exp.model.structure import find_blocks

CPU = torch.device("cpu")
_COMMON = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROTARY = {**tiny_models._ROTARY, **_COMMON}
_HEADS = {key: value for key, value in _ROTARY.items() if key != "head_dim"}
_LAYERS = {"num_hidden_layers": 4}
_VISION = {"num_attention_heads": 4, "image_size": 32, "patch_size": 16}
_GEMMA4 = {**_LAYERS, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 384, "sliding_window": 8}
_GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
_GPT = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_RWKV = {**_COMMON, "hidden_size": 64, "context_length": 256}
_XLM = {"vocab_size": 384, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "causal": True, "use_lang_emb": False}

# Families whose blocks return tuples or lists, come in several types, or are not the largest list: kind → (type,
# configuration, the list that is pruned).
FAITHFUL = {
    "bamba": ("bamba", {**_ROTARY, **_LAYERS, **_MAMBA, "attn_layer_indices": [1]}, "model.layers"),
    "openai-gpt": ("openai-gpt", _GPT, "transformer.h"),
    "rwkv": ("rwkv", {**_RWKV, **_LAYERS}, "rwkv.blocks"),
    "jamba": (
        "jamba",
        {**_HEADS, **_LAYERS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_dt_rank": 4}
        | {"num_experts_per_tok": 1, "use_mamba_kernels": False},
        "model.layers",
    ),
    "gemma4": ("gemma4_text", {**_ROTARY, **_GEMMA4, "num_kv_shared_layers": 0}, "model.layers"),
    "git": (
        "git",
        {**_HEADS, "num_hidden_layers": 2}
        | {"vision_config": {**_VISION, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}},
        "git.encoder.layer",
    ),
    "gemma3": (
        "gemma3",
        {"text_config": {**_ROTARY, "num_hidden_layers": 2, "sliding_window": 8, "query_pre_attn_scalar": 16}}
        | {"vision_config": {**_VISION, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}}
        | {"mm_tokens_per_image": 4, "image_token_index": 380, "boi_token_index": 381, "eoi_token_index": 382},
        "model.language_model.layers",
    ),
}

# kind → (type, configuration, what is said).
REFUSED = {
    "keys and values of earlier blocks": (
        "gemma4_text",
        {**_ROTARY, **_GEMMA4, "num_kv_shared_layers": 2},
        r"layers\.2 of Gemma4ForCausalLM does not run by itself \(KeyError: .*is handed what the blocks before it make",
    ),
    "two stacks in loops": (
        "hrm_text",
        {**_ROTARY, **_LAYERS},
        r"runs model\.L_module\.layers\.0 again after 4 of its",
    ),
    "lists of parts": ("xlm", _XLM, r"runs the blocks of transformer\.attentions beside those of transformer\.ffns"),
    "several streams": (
        "prophetnet",
        {"vocab_size": 384, "hidden_size": 64, "decoder_ffn_dim": 96, "num_decoder_layers": 2}
        | {"num_decoder_attention_heads": 4, "is_decoder": True, "add_cross_attention": False},
        r"take hidden states of shape \(1, 96, 64\) for tokens of shape \(1, 32\)",
    ),
}


def build(kind: str, options: dict) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), dtype=torch.float32)
        for name, parameter in network.named_parameters():  # the initialisation hardly mixes positions and blocks
            if parameter.ndim >= 2 and "A_log" not in name:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return network.eval()


def tokens(windows: int = 3, seqlen: int = 32) -> torch.Tensor:
    return torch.randint(3, 370, (windows, seqlen), generator=torch.Generator().manual_seed(0))


def llama(blocks: int = 3) -> nn.Module:
    return build("llama", {**_ROTARY, "num_hidden_layers": blocks})


def assert_refused(network: nn.Module, message: str) -> None:
    """By `prune_model` before a weight has changed, and by the evaluation."""
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=message) as error:
        alps_exp.prune_model(network, tokens(), method="wanda", sparsity=0.5)
    assert "\n" not in str(error.value) and str(error.value).endswith("choose another model")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match=message):
        perplexity(BlockModel(network, CPU), tokens(), quiet=True)


@pytest.mark.parametrize("kind", FAITHFUL)
def test_blocks_of_any_form_give_the_models_own_logits(kind):
    family, options, prefix = FAITHFUL[kind]
    network, ids = build(family, options), tokens()
    with torch.no_grad():
        expected = network(ids, use_cache=False).logits
    model = BlockModel(network, CPU)
    assert model.prefix == prefix
    hidden = HiddenStates(model, ids, 2)
    for index in range(len(model)):
        with model.block(index) as block:
            hidden.advance(model, index, block)
    logits = torch.cat([model.head(part, states) for part, states in zip(ids.split(2), hidden, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    # Windows of a shape that the blocks have seen: some fill what they are handed.
    first = perplexity(model, ids, quiet=True, batch_size=1)
    assert perplexity(model, ids, quiet=True, batch_size=1) == first


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_do_otherwise_are_refused_by_name(kind):
    family, options, message = REFUSED[kind]
    assert_refused(build(family, options), message)


def test_what_a_model_does_between_its_blocks_is_found():
    network = build("rwkv", {**_RWKV, **_LAYERS, "rescale_every": 2})  # halves its hidden states after every second one
    with pytest.raises(UserError, match=r"rwkv\.blocks\.2 does not receive what the block before it gives"):
        HiddenStates(BlockModel(network, CPU), tokens(), 1)


def test_a_state_that_blocks_share_behind_the_arguments_is_found():
    network = llama()
    kept, blocks = {}, network.model.layers
    blocks[0].register_forward_hook(lambda block, args, output: kept.update(state=output))
    blocks[2].register_forward_hook(lambda block, args, output: output + 0.3 * kept["state"])
    assert_refused(network, r"model\.layers\.2 is random, or shares something with other blocks")


@pytest.mark.parametrize("kind", [dict, list], ids=["dictionary", "list"])
def test_a_state_that_blocks_share_in_what_they_are_handed_is_found(kind):
    """By whom it is handed, although a block without it runs."""
    network = llama()

    def before(block, args, kwargs):
        state = kwargs.pop("state")
        kept = state["kept"] if kind is dict else state[0]
        hidden = args[0] + 0.3 * kept[-1] if kept else args[0]
        kept.append(hidden)
        return (hidden, *args[1:]), kwargs

    for block in network.model.layers:
        block.register_forward_pre_hook(before, with_kwargs=True)
    inner = network.model.forward
    state = {dict: lambda: {"kept": []}, list: lambda: [[]]}[kind]
    network.model.forward = lambda *args, **kwargs: inner(*args, **kwargs, state=state())
    assert_refused(network, r"differ by 0\.\d+ .*model\.layers\.1 is handed what the blocks before it make")


def test_a_block_that_cannot_run_by_itself_is_named():
    network = llama()
    kept, blocks = [], network.model.layers
    blocks[0].register_forward_hook(lambda block, args, output: kept.__setitem__(slice(None), [output]))
    blocks[1].register_forward_pre_hook(lambda block, args: (kept.pop(), None)[1])
    assert_refused(network, r"model\.layers\.1 of LlamaForCausalLM does not run by itself \(IndexError: pop from empty")


def test_a_head_that_mixes_positions_is_found():
    network = llama()
    network.lm_head.register_forward_hook(lambda head, args, output: output.cumsum(1))
    assert_refused(network, "its head takes more than the last hidden states")


def test_work_between_the_last_block_and_the_embedding_is_part_of_the_model():
    """A residual connection around all blocks: head and loop see the same embedding."""
    network = llama()
    kept = []
    network.model.embed_tokens.register_forward_hook(lambda module, args, output: kept.append(output))
    network.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + kept[-1],))
    assert perplexity(BlockModel(network, CPU), tokens(), quiet=True) > 1


def test_a_block_that_stands_twice_in_the_list_is_refused():
    network = llama()
    network.model.layers[1] = network.model.layers[0]
    forward = network.model.layers[0].forward
    with pytest.raises(UserError, match=r"runs model\.layers\.1 after 0 of its blocks"):
        HiddenStates(BlockModel(network, CPU), tokens(), 1)
    assert network.model.layers[0].forward == forward and "forward" not in vars(network.model.layers[0])


def test_a_model_that_fails_by_itself_is_named():
    network = llama()
    network.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"LlamaForCausalLM fails when it runs block by block \(ZeroDivisionError"):
        HiddenStates(BlockModel(network, CPU), tokens(), 1)


def test_hidden_states_of_another_layout_are_refused():
    options = {"vocab_size": 384, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96}
    with pytest.raises(UserError, match=r"take hidden states of shape \(32, 1, 64\) for tokens of shape \(1, 32\)"):
        HiddenStates(BlockModel(build("xlnet", options), CPU), tokens(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3", "gpt2", "opt"])
def test_rounding_is_no_difference(request, kind, dtype, monkeypatch):
    """Two orders of magnitude below what is refused, on a CPU."""
    network = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"tiny_{kind}"), dtype=dtype).eval()
    seen, original = [], faithful._difference
    monkeypatch.setattr(faithful, "_difference", lambda *pair: [seen.append(original(*pair)), seen[-1]][1])
    faithful.ensure(BlockModel(network, CPU), tokens(2, 64))
    assert len(seen) == 1 and seen[0] < 0.1 * faithful._TOLERANCE[dtype]


def test_it_is_done_once_and_only_for_blocks_that_are_run():
    network = llama(4)
    ran, model = [], BlockModel(network, CPU)
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    faithful.ensure(model, tokens(), 2)
    # The first, to see in what form blocks answer; the model's own forward; two windows through each.
    assert ran == [0, 0, 1, 0, 0, 1, 1]
    faithful.ensure(model, tokens(), 1)
    assert len(ran) == 7
    faithful.ensure(model, tokens())
    assert set(ran[7:]) == {0, 1, 2, 3} and model.known.faithful == 4
    assert model.shapes == []
    before = len(ran)
    faithful.ensure(BlockModel(network, CPU, known=model.known), tokens())
    assert len(ran) == before


def test_long_windows_are_cut(monkeypatch):
    lengths, model = [], BlockModel(llama(1), CPU)
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda ids: [lengths.append(ids.shape[1]), original(ids)][1])
    monkeypatch.setattr(faithful, "_LOGITS", 20 * 384)
    faithful.ensure(model, tokens(1, 32))
    assert max(lengths[1:]) == 20  # after the first block's, which tells in what form it answers


def test_streamed_blocks_are_read_once_for_it_and_never_all_in_memory(tmp_path, monkeypatch):
    tiny_models.build("llama", tmp_path / "model", blocks=4)
    network, source = loading.load_streamed(loading.resolve({"name": "local", "path": str(tmp_path / "model")}))
    model, read, original = BlockModel(network, CPU, source=source), [], source._read
    monkeypatch.setattr(source, "_read", lambda index, shard: [read.append(index), original(index, shard)][1])
    loaded, forward = [], model.forward_block

    def noting(index, block, hidden):
        loaded.append([not next(other.parameters()).is_meta for other in model.blocks])
        return forward(index, block, hidden)

    monkeypatch.setattr(model, "forward_block", noting)
    faithful.ensure(model, tokens())
    assert sorted(read) == [0, 0, 1, 2, 3]
    assert all(sum(there) == 1 for there in loaded) and len(loaded) == 8


def test_a_streamed_model_is_refused_like_one_in_memory(tmp_path):
    family, options, message = REFUSED["keys and values of earlier blocks"]
    build(family, options).save_pretrained(tmp_path)
    network, source = loading.load_streamed(loading.resolve({"name": "local", "path": str(tmp_path)}))
    with pytest.raises(UserError, match=message):
        HiddenStates(BlockModel(network, CPU, source=source), tokens(), 1)
    assert all(parameter.is_meta for parameter in find_blocks(network)[1].parameters())


def test_a_model_with_two_text_configurations_has_blocks_all_the_same():
    network = llama()

    def ambiguous(decoder: bool):
        raise ValueError("two of them")

    network.config.get_text_config = ambiguous
    assert find_blocks(network)[0] == "model.layers"
