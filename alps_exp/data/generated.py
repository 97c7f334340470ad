"""Calibration text that the dense model writes itself (`data=generated`), by transformers' `generate`.

Windows are sampled in batches with seeds of their own, from BOS, a random token or a prompt, and kept on disk under a
digest of all that decides them: checkpoint, versions, device, dtype, keys, first tokens. An end of text does not end a
window: what the model writes behind it belongs to the window, as in the joined texts that models are trained on.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..base.errors import UserError
from ..base.files import remove, sha256
from ..base.progress import Progress
from ..checkpoints.gguf_files import made_once
from ..checkpoints.hub import first_line
from ..model import loading
from ..model.loading import ModelSettings
from ..model.tokenization import refuse_unknown, special_tokens
from .settings import CalibrationSettings, GeneratedSettings
from .windows import Encoder

_FILE = "tokens.safetensors"
_SPAN, _NEARLY = 16, 20  # docs/decisions.md has the measurement


def generated_tokens(
    asked: CalibrationSettings,
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    network: Callable[[], PreTrainedModel],
    device: torch.device,
    dtype: torch.dtype | str,
) -> tuple[torch.LongTensor, dict]:
    """Windows that the model has written, held-out ones behind the first, then fresh ones, those to train on last, and
    their description for the record.

    Args:
        asked: `asked.data` says how to sample.
        model: whose text it is.
        tokenizer: the model's.
        network: gives the dense model, for windows that are not kept yet.
        device: where it writes.
        dtype: of its weights, as it was asked for.

    Returns:
        Tokens (nsamples + holdout + fresh + training, seqlen), no two windows alike, and their description.

    Raises:
        UserError: prompts that fill a window, bad logits, windows that repeat, too little memory or disk.
    """
    data, seqlen = asked.data, asked.seqlen
    loading.check_weights(model, download=True)
    same = {
        **{f"checkpoint {name}": value for name, value in loading.identity(model.source).items()},
        "checkpoint changed": loading.changed(model.source),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype),
        "sampling": [data.temperature, data.top_k, data.top_p, data.batch_size],
        "seqlen": seqlen,
    }
    parts, begun = [], 0
    counts = {"calibration": asked.nsamples, "held-out": data.holdout, "fresh": asked.fresh}
    for purpose, count in (counts | {"training": asked.training}).items():
        if not count:
            continue
        seed = sha256(f"{purpose} {asked.seed}")
        starts = first_tokens(data, tokenizer, count, seqlen, asked.bos, seed, model.vocabulary)
        begun = max(begun, *map(len, starts))
        digest = sha256(json.dumps([same, seed, starts], sort_keys=True))[:32]
        parts.append(_kept(digest, lambda s=starts, seed=seed: write(network(), s, seqlen, data, seed, device)))
    tokens = torch.cat(parts)
    repeated = refuse_repetition(tokens, data.temperature, begun)
    return tokens, {
        "dataset": data.name,
        "source": "written by the dense model",
        "split": f"temperature {data.temperature:g}, top_k {data.top_k}, top_p {data.top_p:g}",
        "revision": None,
        "windows": asked.nsamples,
        "seqlen": seqlen,
        "bos": _begin(data, tokenizer, asked.bos),
        "sampling": "generated",
        "protocol": f"sampled with transformers' generate, {data.batch_size} at a time",
        **({"held_out_windows": data.holdout} if data.holdout else {}),
        **({"fresh_windows": asked.fresh} if asked.fresh else {}),
        **({"training_windows": asked.training} if asked.training else {}),
        "partial": False,
        "repeated_spans": round(float(repeated.mean()), 6),
        "prompts": list(data.prompts),
        "sha256": sha256(tokens.numpy().tobytes())[:16],
        "seed": asked.seed,
    }


def first_tokens(
    data: GeneratedSettings,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    bos: str | bool,
    seed: str,
    vocabulary: int | None,
) -> list[list[int]]:
    """What each window begins with: a prompt, what the tokenizer puts before a text, or one random token.

    Args:
        data: its prompts.
        tokenizer: the model's.
        count: of windows.
        seqlen: tokens in a window.
        bos: the rule for BOS; "auto" goes by the tokenizer, "false" means none.
        seed: of the random tokens.
        vocabulary: ids that the model has an embedding for; None is unknown.

    Raises:
        UserError: a prompt that leaves no room in a window, or with ids beyond the vocabulary.
    """
    encoder = Encoder(tokenizer, bos, seqlen)
    before, after = special_tokens(tokenizer) if encoder.rule == "auto" else ([], [])
    if data.prompts:
        found = [encoder.window(ids[: len(ids) - len(after)], 0) for ids in encoder.encode(list(data.prompts))]
        for prompt, ids in zip(data.prompts, found, strict=True):
            if not 0 < len(ids) < seqlen:
                raise UserError(
                    f"data.prompts: {prompt[:40]!r} has {len(ids)} tokens or more, and a window of seqlen={seqlen} "
                    "must hold it and what follows: shorten it"
                )
    elif encoder.rule in ("true", "window"):
        found = [[tokenizer.bos_token_id]]
    elif before:
        found = [tokenizer.convert_tokens_to_ids(before)]
    else:
        ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        ordinary = [token for token in ordinary if vocabulary is None or token < vocabulary]
        generator = random.Random(seed)
        return [[generator.choice(ordinary)] for _ in range(count)]
    refuse_unknown((max(ids) for ids in found), tokenizer, vocabulary, "data=generated: the beginning of a window")
    return [found[index % len(found)] for index in range(count)]


def write(
    network: PreTrainedModel,
    starts: Sequence[Sequence[int]],
    seqlen: int,
    data: GeneratedSettings,
    seed: str,
    device: torch.device,
    quiet: bool = False,
) -> torch.LongTensor:
    """Let a model write on; no global generator is changed.

    Args:
        network: the model, which is back where it was afterwards.
        starts: first tokens of each window.
        seqlen: tokens in a window.
        data: how to sample.
        seed: of the samples; every batch has one of its own.
        device: where to write.
        quiet: no progress.

    Returns:
        Tokens (windows, seqlen) in host memory.

    Raises:
        UserError: NaN or infinite logits, or too little device memory.
    """
    order = sorted(range(len(starts)), key=lambda index: len(starts[index]))
    batches: list[list[int]] = []  # of windows that begin with equally many tokens, so that none is padded
    for index in order:
        fits = batches and len(batches[-1]) < data.batch_size and len(starts[batches[-1][0]]) == len(starts[index])
        batches[-1].append(index) if fits else batches.append([index])
    home, written = next(network.parameters()).device, torch.empty(len(starts), seqlen, dtype=torch.long)
    try:
        network.to(device)
        with _own_rules(network), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in Progress(batches, "writing calibration text", quiet=quiet):
                torch.manual_seed(int(sha256(f"{seed} {batch[0]}")[:15], 16))
                ids = torch.tensor([list(starts[index]) for index in batch], device=device)
                config = GenerationConfig(
                    do_sample=True,
                    temperature=float(data.temperature),
                    top_k=data.top_k,
                    top_p=float(data.top_p),
                    max_new_tokens=seqlen - ids.shape[1],
                    use_cache=True,
                )
                found = network.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([_Finite()]),
                )
                written[batch] = found.cpu()  # of another length than seqlen it would not fit
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"data=generated: the whole model and {data.batch_size} windows do not fit on {device} "
            f"({first_line(error)}): lower data.batch_size or seqlen, or give a text (data=c4, data=local)"
        ) from None
    finally:
        network.to(home)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what is free decides where hidden states go
    return written


def refuse_repetition(tokens: Tensor, temperature: float, begun: int = 0) -> Tensor:
    """Raise UserError for windows that are alike, or nearly so in more than one of `_NEARLY`: they say nothing new, and
    held-out ones would be calibrated on. Prompts, the first `begun` tokens at most, are alike by intent: returns
    `repeated_spans` of what is behind them.
    """
    alike = len(tokens) - len(torch.unique(tokens, dim=0))
    repeated = repeated_spans(tokens[:, min(begun, tokens.shape[1] - 1) :])
    nearly = int((repeated > 0.5).sum())
    if alike or nearly * _NEARLY > len(tokens):
        what = "repeat others" if alike else f"have more than half of their spans of {_SPAN} tokens from others"
        raise UserError(
            f"data=generated: {alike or nearly} of {len(tokens)} windows {what}: raise "
            f"data.temperature={temperature:g} or seqlen, or give more data.prompts"
        )
    return repeated


def repeated_spans(tokens: Tensor) -> Tensor:
    """What share of each window's spans of consecutive tokens another window has, too, anywhere in it.

    Args:
        tokens: (windows, seqlen).

    Returns:
        (windows,) from 0 to 1, in float64.
    """
    length = min(_SPAN, tokens.shape[1])
    factors = torch.randint(-(2**62), 2**62, (length,), generator=torch.Generator().manual_seed(0))
    count = tokens.shape[1] - length + 1
    spans = torch.zeros(len(tokens), count, dtype=torch.int64)  # a number for each, modulo 2⁶⁴
    for place, factor in enumerate(factors):
        spans.addcmul_(tokens[:, place : place + count], factor)
    _, places = spans.unique(return_inverse=True)
    there = (places * len(tokens) + torch.arange(len(tokens))[:, None]).unique()  # each span once for each window
    return (torch.bincount(there // len(tokens))[places] > 1).double().mean(1)


class _Finite(LogitsProcessor):
    """Refuses logits from which nothing can be sampled; on a GPU the sampler would end the process."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores.amax(-1)).all()):
            raise UserError(
                f"data=generated: the dense model's logits are NaN or infinite after {input_ids.shape[1]} tokens: use "
                "dtype=float32 or bfloat16, or check the checkpoint"
            )
        return scores


@contextmanager
def _own_rules(network: PreTrainedModel):
    """Without what the checkpoint says about generation: penalties, ends of text, forms of sampling."""
    kept = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = kept


def _begin(data: GeneratedSettings, tokenizer: PreTrainedTokenizerBase, bos: str | bool) -> str:
    """How windows begin, for the record."""
    rule = str(bos).lower()
    before = " ".join(special_tokens(tokenizer)[0]) if rule == "auto" else ""
    before = "BOS" if rule in ("true", "window") else before
    if data.prompts:
        return f"{before} and a prompt" if before else "a prompt"
    return f"every window starts with {before}" if before else "every window starts with a random token"


def _kept(digest: str, make: Callable[[], Tensor]) -> Tensor:
    """The windows of a digest, written once."""
    from huggingface_hub import cached_assets_path

    try:
        folder = Path(cached_assets_path("alps_exp", namespace="generated", subfolder="text")) / digest
        found = _read(folder)
        if found is None:
            remove(folder)  # damaged
            made_once(folder, lambda scratch: _save(make(), scratch))
            found = _read(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot keep generated text ({first_line(error)}): make room, or set HF_ASSETS_CACHE to a writable folder"
        ) from None
    return found


def _save(tokens: Tensor, folder: Path) -> None:
    save_file({"tokens": tokens}, folder / _FILE, metadata={"sha256": sha256(tokens.numpy().tobytes())})


def _read(folder: Path) -> Tensor | None:
    """The windows in a folder; None where there are none, or others than were written.

    Raises:
        OSError: they may be there, and cannot be read.
    """
    try:
        with (folder / _FILE).open("rb"):
            pass
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        with safe_open(folder / _FILE, framework="pt") as opened:
            tokens, wanted = opened.get_tensor("tokens").clone(), (opened.metadata() or {}).get("sha256")
    except SafetensorError:
        return None
    return tokens if sha256(tokens.numpy().tobytes()) == wanted else None
