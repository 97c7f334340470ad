"""Tiny mixtures of experts, and the same models with their experts unrolled into linear layers."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

_SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TOP = {**_SIZES, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {**_TOP, "num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 24, **_LATENT}
_DEEPSEEK |= {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}

# Class of the configuration, its arguments, and where the experts lie in a block.
FAMILIES = {
    "mixtral": ("Mixtral", {**_TOP, "intermediate_size": 24, "num_local_experts": 4}, "mlp.experts"),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_TOP, "moe_intermediate_size": 24, "num_experts": 4, "shared_expert_intermediate_size": 40}
        | {"intermediate_size": 48},
        "mlp.experts",
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_TOP, "moe_intermediate_size": 24, "num_experts": 4, "intermediate_size": 48, "head_dim": 8},
        "mlp.experts",
    ),
    "olmoe": ("Olmoe", {**_TOP, "intermediate_size": 24, "num_experts": 4}, "mlp.experts"),
    "deepseek_v2": ("DeepseekV2", {**_DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1}, "mlp.experts"),
    "deepseek_v3": ("DeepseekV3", {**_DEEPSEEK, "n_group": 2, "topk_group": 1}, "mlp.experts"),
    "granitemoe": ("GraniteMoe", {**_TOP, "intermediate_size": 24, "num_local_experts": 4}, "block_sparse_moe.experts"),
    "glm4_moe": (
        "Glm4Moe",
        {**_TOP, "intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1},
        "mlp.experts",
    ),
    "phimoe": ("Phimoe", {**_TOP, "intermediate_size": 24, "num_local_experts": 4}, "mlp.experts"),
    "gpt_oss": (
        "GptOss",
        {**_TOP, "intermediate_size": 24, "num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
        "mlp.experts",
    ),
    "llama4": (
        "Llama4Text",
        {**_SIZES, "num_experts_per_tok": 1, "intermediate_size": 24, "intermediate_size_mlp": 48}
        | {"num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 1, "attention_chunk_size": 64},
        "feed_forward.experts",
    ),
    "dbrx": (
        "Dbrx",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 90}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}}
        | {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
        "ffn.experts",
    ),
    "jamba": (
        "Jamba",
        {**_TOP, "intermediate_size": 24, "num_experts": 4, "expert_layer_period": 1, "expert_layer_offset": 0}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "feed_forward.experts",
    ),
}


def network(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random model with weights as large as trained ones."""
    name, options, _ = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(options))
    own = "eager" if dtype == torch.float64 else None  # the grouped product, which is the default, has no float64
    made = AutoModelForCausalLM.from_config(config, experts_implementation=own).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim >= 2 and "conv" not in name:
            parameter.data.normal_(std=0.2)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return made.to(dtype)


class Expert(nn.Module):
    """One expert as linear layers, by the text of the model's paper or code."""

    def __init__(self, family: str, held: nn.Module, number: int) -> None:
        super().__init__()
        self._family, self._held = family, [held]
        biases = (None, None, None)
        if family == "gpt_oss":
            both, down = held.gate_up_proj[number].T, held.down_proj[number].T
            gate, up = both[0::2], both[1::2]
            bias = held.gate_up_proj_bias[number]
            biases = (bias[0::2], bias[1::2], held.down_proj_bias[number])
        elif family == "llama4":
            gate, up = held.gate_up_proj[number].T.chunk(2)
            down = held.down_proj[number].T
        elif family == "dbrx":
            rows = slice(24 * number, 24 * (number + 1))
            gate, up, down = held.mlp.w1[rows], held.mlp.v1[rows], held.mlp.w2[rows].T
        else:
            gate, up = held.gate_up_proj[number].chunk(2)
            down = held.down_proj[number]
        for name, weight, bias in zip(("gate_proj", "up_proj", "down_proj"), (gate, up, down), biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
            layer.weight.data = weight.detach().clone()
            if bias is not None:
                layer.bias.data = bias.detach().clone()
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self._family == "gpt_oss":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
            return self.down_proj(gate * torch.sigmoid(1.702 * gate) * up)
        return self.down_proj(nn.functional.silu(gate) * up)


class Unrolled(nn.Module):
    """All experts of a layer, token by token through linear layers."""

    def __init__(self, family: str, held: nn.Module) -> None:
        super().__init__()
        self._family = family
        for number in range(4):
            self.add_module(str(number), Expert(family, held, number))

    def forward(self, hidden: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if self._family == "llama4":
            parts = hidden.view(4, -1, hidden.shape[-1])
            outputs = torch.zeros_like(parts)
            for number, own in enumerate(parts):
                there = (own != 0).any(-1)
                if bool(there.any()):
                    outputs[number, there] = getattr(self, str(number))(own[there])
            return outputs.view(-1, hidden.shape[-1])
        shape = hidden.shape
        hidden = hidden.reshape(-1, shape[-1])
        output = torch.zeros_like(hidden)
        for number in range(4):
            row, place = (index == number).nonzero().T
            if len(row):
                made = getattr(self, str(number))(hidden[row])
                output.index_add_(0, row, made * weights[row, place, None].to(made.dtype))
        return output.view(shape)


def unrolled(family: str, model: nn.Module) -> nn.Module:
    """A copy whose experts are linear layers, under the names that alps_exp gives them."""
    made = copy.deepcopy(model)
    path = FAMILIES[family][2]
    for name, module in list(made.named_modules()):
        if name.endswith(path) and not isinstance(module, nn.ModuleList):
            owner, _, own = name.rpartition(".")
            setattr(made.get_submodule(owner), own, Unrolled(family, module))
    return made
