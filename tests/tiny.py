"""What tests of runs of a tiny model share: a run in this process, its saved weights, a model on its own."""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)

from alps_exp.cli.overrides import compose
from alps_exp.runs import run
from alps_exp.runs.workspace import Workspace

SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "granite": GraniteConfig(**GATED, residual_multiplier=0.4),
    "gemma3": Gemma3TextConfig(**GATED, sliding_window=8),
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "opt-350m": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=16, dropout=0.0, do_layer_norm_before=False),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=64),
}


# Of a run whose perplexity matters, without text of its own.
FEW_WINDOWS = ("nsamples=8", "seqlen=64", "batch_size=4", "eval.windows=6", "eval.sample_tokens=0")


def words_for(model: Path | str, text: Path | str, *more: str) -> list[str]:
    """The words of a run on the CPU of the model in a folder, calibrated on a text file."""
    where = ["model=local", f"model.path={model}", "data=local", f"data.path={text}"]
    return [*where, "device=cpu", *more]


@cache
def _composed(words: tuple[str, ...], folder: str) -> DictConfig:
    return compose(words)


def execute(settings: list[str], folder: Path, *more: str, workspace: Workspace | None = None) -> dict:
    """The record of a run in a folder, by the words of the command line; the same words are composed once."""
    return run.run(copy.deepcopy(_composed((*settings, *more), os.getcwd())), folder, workspace)


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors that the run in a folder has saved, by name."""
    files = (folder / "model").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def load(folder: Path) -> nn.Module:
    """The model in a folder, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def network(family: str) -> nn.Module:
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for name, parameter in made.named_parameters():  # as large as trained ones, and norms that are not all alike
        if parameter.ndim == 2:
            parameter.data.mul_(6)
        elif "norm" in name:
            parameter.data.add_(0.3 * torch.rand_like(parameter))
        else:
            parameter.data.normal_(std=0.2)
    return made.double()


def tokens(windows: int = 12, seqlen: int = 24) -> Tensor:
    """For the networks of `CONFIGS`."""
    return torch.randint(3, 90, (windows, seqlen), generator=torch.Generator().manual_seed(1))


def random_tokens(windows: int = 4, seqlen: int = 32) -> Tensor:
    """For the models of tiny_models.py, whose text they are not."""
    return torch.randint(3, 384, (windows, seqlen), generator=torch.Generator().manual_seed(0))


def mixtral() -> MixtralConfig:
    """A tiny mixture of experts."""
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralConfig(**sizes, **heads, num_local_experts=4, max_position_embeddings=256)
