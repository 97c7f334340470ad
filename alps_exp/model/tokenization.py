"""Tokenizers: loaded as their own files say, the special tokens that they put around a text, ids that a model knows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..base.errors import UserError

FILE = "tokenizer.json"
_VOCABULARIES = ("tekken.json", "*.model", "*.tiktoken")

# What normalizers and pre-tokenizers treat differently: spaces in every place, digits, case, accents, scripts, signs.
_SENTINELS = (
    "The old sailor repairs a wooden boat in 1921.",
    " Leading,  two   three    spaces \n\n\tand\r\na tab\n",
    "12345 3.14159 1,000,000 x2y",
    "Don't I'LL we’re HTTPServer snake_case f(a[0])==b; // <b>",
    "naïve café ÄÖÜß ﬁ e\u0301 Ελλάδα русский 日本語 한국어 עברית 🙂👍🏽",
)


def vocabulary_missing(tokenizer_class: type, folder: Path) -> bool:
    """Whether a checkpoint has no file with a tokenizer's vocabulary (some classes are happy with an empty one).

    Args:
        tokenizer_class: that transformers chose.
        folder: the checkpoint's.
    """
    if (folder / FILE).is_file() or not tokenizer_class.__module__.startswith("transformers."):
        return False
    names = [name for name in tokenizer_class.vocab_files_names.values() if name and "config" not in name]
    return bool(names) and not any(any(folder.glob(pattern)) for pattern in (*names, *_VOCABULARIES))


def as_its_file_says(
    tokenizer: PreTrainedTokenizerBase, folder: Path, arguments: dict
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """A tokenizer that splits texts as its tokenizer.json says, and a note where this one did not.

    transformers builds the class that tokenizer_config.json or the model's type names around the vocabulary, with the
    normalizer and pre-tokenizer of the class: a byte-level file under a class for SentencePiece loses every space. The
    file is what the model was trained with, so it decides; the special tokens around a text stay transformers' matter.
    A class that the checkpoint brings is trusted.

    Args:
        tokenizer: as transformers loads it.
        folder: the checkpoint's.
        arguments: of `from_pretrained`.
    """
    kind = type(tokenizer)
    if not (folder / FILE).is_file() or not kind.__module__.startswith("transformers."):
        return tokenizer, None
    file = Tokenizer.from_file(str(folder / FILE))
    file.no_truncation()
    file.no_padding()
    if _tokens(tokenizer) == [file.encode(text, add_special_tokens=False).ids for text in _SENTINELS]:
        return tokenizer, None
    plain = PreTrainedTokenizerFast.from_pretrained(**arguments)
    if _tokens(tokenizer) == _tokens(plain):  # the difference is in tokens that another file adds
        return tokenizer, None
    return plain, (
        f"{FILE} splits texts otherwise than transformers' {kind.__name__}, which tokenizer_config.json or the model's "
        f"type asks for: the run goes by {FILE}"
    )


def _tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in _SENTINELS]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The special tokens that a tokenizer puts before and after each text."""
    for text in ("a", "1", "."):  # the first that the vocabulary knows
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        if plain:
            break
    added = tokenizer(text)["input_ids"]
    rest = range(len(added) - len(plain) + 1)
    start = next((index for index in rest if added[index : index + len(plain)] == plain), len(added))
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(added)]
    return names[:start], names[start + len(plain) :]


def describe_bos(tokenizer: PreTrainedTokenizerBase, rule: str) -> str:
    """What a rule for BOS does with this tokenizer, for the record."""
    if rule == "window":
        return "every window starts with BOS"
    if rule != "auto":
        return "BOS before each text" if rule == "true" else "none"
    before, after = (" ".join(names) for names in special_tokens(tokenizer))
    if after:
        return f"auto: the tokenizer adds {f'{before} before and ' if before else ''}{after} after each text"
    return f"auto: the tokenizer adds {before} to each text" if before else "auto: the tokenizer adds none"


def vocabulary_of(config: PreTrainedConfig) -> int | None:
    """How many ids a model's embedding has; None where its configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)


def refuse_unknown(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, what: str) -> None:
    """Raise UserError for ids that a model's embedding does not have.

    Args:
        ids: of tokens.
        tokenizer: made them.
        vocabulary: ids that the model has; None is unknown.
        what: the tokens are of, opens the message.
    """
    largest = max(ids, default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise UserError(
            f"{what} has the token {tokenizer.convert_ids_to_tokens(largest)!r}, whose id {largest} is beyond the "
            f"model's {vocabulary} embeddings: give the tokenizer that the model was trained with, or resize the "
            f"model's embeddings (resize_token_embeddings) and train the new ones"
        )
