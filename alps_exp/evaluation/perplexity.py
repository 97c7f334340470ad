"""Perplexity over non-overlapping windows, block by block, and a text sample for the eye."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..base.errors import UserError
from ..data.texts import refuse_surrogates
from ..model.blocks import BlockModel
from ..model.loading import context_length
from ..model.loss import next_token_loss
from ..model.tokenization import refuse_unknown, special_tokens, vocabulary_of


def perplexity(model: BlockModel, tokens: Tensor, batch_size: int = 1, label: str = "", quiet: bool = False) -> float:
    """exp of the mean over windows of the mean loss of their seqlen - 1 targets (SparseGPT, Wanda, ALPS).

    Args:
        model: the model.
        tokens: (windows, seqlen).
        batch_size: windows per forward.
        label: name of the text, for the progress.

    Raises:
        UserError: NaN or infinite activations (the block is named).
    """
    mean = next_token_loss(model, tokens, batch_size, f"perplexity {label}".strip(), quiet)
    if not math.isfinite(mean):
        raise UserError(f"the loss on {label or 'the text'} is {mean}: the model's head overflows; try dtype=float32")
    return math.exp(mean) if mean < 700 else math.inf


@contextmanager
def whole_model(model: BlockModel) -> Iterator[bool]:
    """The network ready for its own forward on the device: moved there as a whole if it fits, else block by block.

    Yields:
        Whether the blocks stay on the device; otherwise each comes for its own forward, which is slow.
    """
    with model.whole() as whole:
        if whole is not None:
            yield True
            return
    handles = []
    for index, block in enumerate(model.blocks):
        visit = []

        def enter(*_, index=index, visit=visit):
            visit.append(model.block(index, changing=False))
            visit[-1].__enter__()

        def leave(*_, visit=visit):
            visit.pop().__exit__(None, None, None)

        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)]
    try:
        yield False
    finally:
        for handle in handles:
            handle.remove()


def prompt_ids(tokenizer, prompt: str, new_tokens: int, config: PreTrainedConfig) -> list[int]:
    """Token ids of a prompt that is to be continued: without the special tokens that the tokenizer puts after a text.

    Raises:
        UserError: a prompt that is no text, has no tokens or ids beyond the vocabulary, or is with its continuation
            longer than the model's context.
    """
    refuse_surrogates(prompt, f"eval.prompt={prompt!r}")
    ids, context = tokenizer(prompt)["input_ids"], context_length(config)
    ids = ids[: len(ids) - len(special_tokens(tokenizer)[1])]
    if not ids:
        raise UserError(f"eval.prompt={prompt!r} has no tokens: give a text, or eval.sample_tokens=0")
    if context is not None and len(ids) + new_tokens > context:
        raise UserError(
            f"eval.prompt ({len(ids)} tokens) and eval.sample_tokens={new_tokens} are beyond the model's context of "
            f"{context} tokens: shorten either"
        )
    refuse_unknown(ids, tokenizer, vocabulary_of(config), f"eval.prompt={prompt!r}")
    return ids


@torch.no_grad()
def sample(model: BlockModel, tokenizer, prompt: str, new_tokens: int) -> str | None:
    """The model's greedy continuation of a prompt.

    Returns:
        The continuation, or None for a model that does not fit on the device as a whole.

    Raises:
        UserError: as `prompt_ids`.
    """
    network = model.model
    inputs = torch.tensor([prompt_ids(tokenizer, prompt, new_tokens, network.config)], device=model.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with whole_model(model) as resident:
        if not resident:
            return None
        output = network.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=padding if padding is not None else 0,
            use_cache=True,
        )
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
