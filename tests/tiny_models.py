"""Tiny language models of six families, each under 2 MB, for fast runs of the whole path.

    python tests/tiny_models.py DIR            builds all of them below DIR, trained for some seconds each

The text is made by a small grammar, so that a little training shows in the perplexity and pruning spoils it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
)

VOCABULARY = 384
CONTEXT = 256
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROTARY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
}

CONFIGS = {
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        **_TOKENS,
    ),
    "llama": lambda: LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **_ROTARY, **_TOKENS),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_TOKENS,
    ),
    # Sliding windows much shorter than a sequence, so that a mask of the wrong layer type changes the result.
    "gemma3": lambda: Gemma3TextConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=8,
        query_pre_attn_scalar=16,
        **_ROTARY,
        **_TOKENS,
    ),
    "qwen3": lambda: Qwen3Config(vocab_size=VOCABULARY, num_hidden_layers=2, **_ROTARY, **_TOKENS),
    # Some of whose eight experts are handed few tokens, beside a shared one.
    "qwen2_moe": lambda: Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=32,
        **{key: value for key, value in _ROTARY.items() if key != "head_dim"},
        **_TOKENS,
    ),
}

# The special token that a family's tokenizer puts before each text, as the real ones do.
_FIRST_TOKEN = {"opt": "</s>", "llama": "<s>", "gpt2": None, "gemma3": "<s>", "qwen3": None, "qwen2_moe": None}

_SUBJECTS = [
    "the old sailor",
    "a young painter",
    "my neighbour",
    "the quiet teacher",
    "an honest judge",
    "the tall farmer",
]
_VERBS = ["carries", "remembers", "repairs", "watches", "paints", "forgets"]
_OBJECTS = [
    "a wooden boat",
    "the red lantern",
    "seven letters",
    "an empty house",
    "the broken clock",
    "two silver coins",
]
_PLACES = ["by the river", "near the harbour", "in the market", "under the bridge", "behind the church"]
_TIMES = ["every morning", "after the storm", "before winter", "on Sundays", "in 1921", "at night"]


def sentence(generator: random.Random) -> str:
    """One sentence of the grammar. Subject and verb, object and place go together: there is something to learn."""
    subject, thing = generator.randrange(6), generator.randrange(6)
    verb = _VERBS[(subject + generator.randrange(2)) % 6]
    place = _PLACES[(thing + generator.randrange(2)) % 5]
    words = f"{_SUBJECTS[subject]} {verb} {_OBJECTS[thing]} {place} {generator.choice(_TIMES)}."
    return words[0].upper() + words[1:]


def documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 2 to 30 sentences, about 1100 characters on average."""
    generator = random.Random(seed)
    return [" ".join(sentence(generator) for _ in range(generator.randint(2, 30))) for _ in range(count)]


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the grammar's text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        documents(40, seed=1),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    first = _FIRST_TOKEN[kind]
    if first:
        core.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, core.token_to_id(first))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="</s>" if kind == "opt" else "<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
    )


def build(kind: str, folder: Path, steps: int = 0, seed: int = 0, blocks: int | None = None) -> Path:
    """Write a tiny model of a family and its tokenizer to `folder` (float32 safetensors).

    Args:
        kind: a key of CONFIGS.
        folder: made if absent.
        steps: of training; 0 leaves the random initialisation, 100 take about 3 s on one core.
        seed: of initialisation and of the batches; the same seed gives the same weights.
        blocks: decoder blocks, where it matters how many (not for gemma3).
    """
    config: PreTrainedConfig = CONFIGS[kind]()
    if blocks is not None:
        config.num_hidden_layers = blocks
    encoder = tokenizer(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if steps:
            _train(model, encoder, steps)
    model.save_pretrained(folder)
    encoder.save_pretrained(folder)
    return Path(folder)


def _train(model: torch.nn.Module, encoder: PreTrainedTokenizerFast, steps: int) -> None:
    text = " ".join(documents(200, seed=2))
    ids = torch.tensor(encoder(text, verbose=False, add_special_tokens=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 96, (8,))
        batch = torch.stack([ids[start : start + 96] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    for family in CONFIGS:
        print(build(family, options.folder / family, options.steps))
