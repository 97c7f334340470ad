"""Fresh text: windows of a data set that share nothing with texts that are spoken for, such as evaluation's.

The documents are joined in their order to pieces of about 32 windows, and the pieces are read in random order, so that
neighbours stay together and only as much is tokenised as is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..base.errors import UserError
from ..model.tokenization import refuse_unknown
from .settings import DataSettings
from .texts import Text, calibration_text
from .windows import Encoder

RUN = 32  # windows share text if they share so many tokens in a row, a sentence or two
_PIECE = 128  # characters per token of a window: 32 windows of 4 characters a token
_AT_ONCE = 8  # pieces that are tokenised together


class Spoken:
    """Text that is spoken for.

    Args:
        windows: its windows (any number, any length) of token ids.
    """

    def __init__(self, windows: Iterable[Tensor]) -> None:
        windows = list(windows)
        lengths = [tokens.shape[1] for tokens in windows if len(tokens)]
        self._length = 1 << (min([RUN, *lengths]).bit_length() - 1)
        found = [_runs(tokens, self._length).flatten() for tokens in windows if len(tokens)]
        self._digests = torch.cat(found).unique() if found else None

    def within(self, windows: Tensor) -> Tensor:
        """(windows,) which of the windows (windows, seqlen) share text with it."""
        if self._digests is None or not len(windows) or windows.shape[1] < self._length:
            return torch.zeros(len(windows), dtype=torch.bool)
        return torch.isin(_runs(windows, self._length), self._digests).any(1)


def _runs(tokens: Tensor, length: int) -> Tensor:
    """(windows, seqlen - length + 1) digests of all runs of `length` tokens, a power of two.

    Those of a run are its tokens' polynomial modulo 2⁶⁴; each pass joins neighbours to runs twice as long.
    """
    digests, factor, reach = tokens.to("cpu", torch.int64) + 1, 0x5851F42D4C957F2D, 1
    while reach < length:
        digests = digests[:, :-reach] * factor + digests[:, reach:]
        factor = (factor * factor + (1 << 63)) % (1 << 64) - (1 << 63)  # as int64 wraps
        reach *= 2
    return digests


def fresh_tokens(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    seqlen: int,
    seed: int,
    spoken: Spoken,
    bos: str | bool = "auto",
    vocabulary: int | None = None,
) -> tuple[torch.LongTensor, dict]:
    """Windows of a data set's calibration text.

    Args:
        data: where it is.
        tokenizer: the model's.
        windows: how many.
        seqlen: tokens in a window.
        seed: same seed, same windows.
        spoken: windows that share text with it are left out.
        bos: as in `windows.calibration_tokens`; a piece is one text.
        vocabulary: ids that the model has an embedding for; None is unknown.

    Returns:
        Tokens (windows, seqlen), and their description for the record.

    Raises:
        UserError: no such file or hub, too little text (says how many windows there are), ids beyond the vocabulary.
    """
    encoder, text = Encoder(tokenizer, bos, seqlen), calibration_text(data, "finish")
    kept, count, left_out = [], 0, 0
    for rows in _windows(text, encoder, seed):
        taken = spoken.within(rows)
        left_out += int(taken.sum())
        kept.append(rows[~taken][: windows - count])
        count += len(kept[-1])
        if count == windows:
            break
    if count < windows:
        beside = f" beside {left_out} that are calibrated on, held out or evaluated on" if left_out else ""
        raise UserError(
            f"finish.data={data.name}: the text has only {count} windows of seqlen={seqlen} tokens{beside}, {windows} "
            "were asked; lower finish.tokens, or give a longer text"
        )
    tokens = torch.cat(kept)
    what = f"finish.data={data.name}: the text"
    refuse_unknown((int(row.max()) for row in tokens), tokenizer, vocabulary, what)
    return tokens, {
        "dataset": data.name,
        "source": text.source,
        "split": text.split,
        "revision": text.revision,
        "windows": windows,
        "seqlen": seqlen,
        "bos": encoder.describe(),
        "protocol": f"consecutive windows of random pieces of the documents joined by {text.join!r}",
        "left_out": left_out,
        "seed": seed,
    }


def _windows(text: Text, encoder: Encoder, seed: int) -> Iterator[Tensor]:
    """(windows, seqlen) of some pieces after the others; what a piece has beyond its last whole window is dropped."""
    pieces = _pieces(text.documents, _PIECE * encoder.payload)
    random.Random(f"fresh {seed}").shuffle(pieces)
    for start in range(0, len(pieces), _AT_ONCE):
        texts = [text.join.join(text.documents[begin:end]) for begin, end in pieces[start : start + _AT_ONCE]]
        rows = [
            encoder.window(ids, begin)
            for ids in encoder.encode(texts)
            for begin in range(0, len(ids) - encoder.payload + 1, encoder.payload)
        ]
        if rows:
            yield torch.tensor(rows)


def _pieces(documents: list[str], characters: int) -> list[tuple[int, int]]:
    """First document, and the one after the last, of runs of at least so many characters, but for the last run."""
    found, begin, size = [], 0, 0
    for end, document in enumerate(documents, 1):
        size += len(document)
        if size >= characters or end == len(documents):
            found.append((begin, end))
            begin, size = end, 0
    return found
