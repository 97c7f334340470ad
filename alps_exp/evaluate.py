"""Perplexity over non-overlapping windows, block by block, and a text sample for the eye."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .blocks import BlockModel, HiddenStates
from .errors import UserError
from .models import context_length
from .progress import Progress


@torch.no_grad()
def perplexity(model: BlockModel, tokens: Tensor, batch_size: int = 1, label: str = "", quiet: bool = False) -> float:
    """exp of the mean over windows of the mean loss of their seqlen - 1 targets (SparseGPT, Wanda, ALPS).

    The blocks run one after the other over all windows, so a model larger than the device is evaluated like any other.

    Args:
        model: the model.
        tokens: (windows, seqlen).
        batch_size: windows per forward.
        label: name of the text, for the progress.

    Raises:
        UserError: NaN or infinite activations (the block is named).
    """
    hidden = HiddenStates(model, tokens, batch_size)
    for index in Progress(range(len(model)), f"perplexity {label}".strip(), lines=2, quiet=quiet):
        with model.block(index) as block:
            hidden.advance(model, index, block)
    losses = []
    for chunk, states in zip(tokens.split(batch_size), hidden, strict=True):
        logits = model.head(chunk, states)
        for row, targets in zip(logits, chunk.to(logits.device), strict=True):
            losses.append(functional.cross_entropy(row[:-1].float(), targets[1:]).double())
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise UserError(f"the loss on {label or 'the text'} is {mean}: the model's head overflows; try dtype=float32")
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def sample(model: BlockModel, tokenizer, prompt: str, new_tokens: int) -> str | None:
    """The model's greedy continuation of a prompt.

    Returns:
        The continuation, or None for a model that does not fit on the device as a whole.

    Raises:
        UserError: a prompt without tokens, or with the continuation longer than the model's context.
    """
    network, device = model.model, model.device
    inputs = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    length, context = inputs.shape[1], context_length(network.config)
    if not length:
        raise UserError(f"eval.prompt={prompt!r} has no tokens: give a text, or eval.sample_tokens=0")
    if context is not None and length + new_tokens > context:
        raise UserError(
            f"eval.prompt ({length} tokens) and eval.sample_tokens={new_tokens} are beyond the model's context of "
            f"{context} tokens: shorten either"
        )
    if model.offload:
        size = sum(p.numel() * p.element_size() for p in network.parameters())
        if size > 0.8 * torch.cuda.mem_get_info(device)[0]:
            return None
        home = [next(block.parameters()).device for block in model.blocks]
        network.to(device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
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
    finally:
        if model.offload:
            for block, place in zip(model.blocks, home, strict=True):
                block.to(place)
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
