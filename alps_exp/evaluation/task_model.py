"""A network in memory as lm-eval's model."""

from __future__ import annotations

import torch
from lm_eval.models.huggingface import HFLM

from ..model.tokenization import describe_bos


class TaskModel(HFLM):
    """lm-eval's model for `transformers`, around a loaded network.

    It differs from lm-eval's command line in two settings: log-probabilities are computed in float32 whatever the
    model's dtype (in bfloat16 many choices tie), and a BOS token is prepended where the configuration asks for one,
    also where the tokenizer does not add it by itself.

    Args:
        network: a `transformers` causal language model.
        tokenizer: its tokenizer, which gets a padding token if it has none.
        device: where the network reads its tokens.
        batch_size: requests per forward, or "auto".
        max_batch_size: what "auto" starts from.
        context: tokens that the network was made for; None is unknown.
        bos: as model.bos: "auto" is what the tokenizer adds, true and "window" prepend BOS, false adds nothing.
    """

    def __init__(self, network, tokenizer, device: torch.device, batch_size, max_batch_size: int, context, bos) -> None:
        rule = str(bos).lower()
        self._prepends = rule in ("true", "window")
        padding = tokenizer.pad_token_id
        if padding is not None and padding >= network.get_input_embeddings().num_embeddings:  # one that was only added
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(
            pretrained=network,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=context,
            softmax_dtype="float32",
            add_bos_token=False if rule == "false" else None,
        )
        self._device = device
        self._rule = "true" if self._prepends else rule

    def describe_bos(self) -> str:
        """What happened to BOS, for the record."""
        return describe_bos(self.tokenizer, self._rule)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
        if self._prepends and add_special_tokens is None:
            return [self.tokenizer.bos_token_id, *super().tok_encode(string, add_special_tokens=False, **options)]
        return super().tok_encode(string, add_special_tokens=add_special_tokens, **options)

    def tok_batch_encode(self, strings: list[str], **options):
        if self._prepends:  # lm-eval adds no second one to texts that begin with it
            strings = [f"{self.tokenizer.bos_token}{string}" for string in strings]
        return super().tok_batch_encode(strings, **options)
