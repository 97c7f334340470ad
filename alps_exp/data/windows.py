"""Token windows for calibration and evaluation, by the protocols of the published codes.

Calibration follows SparseGPT's and Wanda's loaders: windows at random offsets in documents longer than a window; with
the C4 shard that they use and the same seed, the same windows. Where too few documents are that long, the windows are
pieces of the joined documents, and the description that goes into the record says so. Evaluation cuts the joined text
into consecutive windows, or draws them from documents in the same way (ALPS on C4), the same ones every time.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..base.errors import UserError
from ..model.tokenization import describe_bos, refuse_unknown
from .settings import DataSettings, check_bos
from .texts import Text, calibration_text, evaluation_text

# Joining a whole C4 shard would hold tens of GB of token offsets; a run of documents of this many characters is joined.
_MOST_CHARACTERS = 64_000_000


def calibration_tokens(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    holdout: int = 0,
    fresh: int = 0,
    training: int = 0,
    bos: str | bool = "auto",
    vocabulary: int | None = None,
) -> tuple[torch.LongTensor, dict]:
    """Random windows of a data set's calibration text.

    Args:
        data: where it is; its `sampling` is "documents", "concatenated", or "auto" (documents, if at least `nsamples`
            of them are longer than a window).
        tokenizer: the model's.
        nsamples: windows.
        seqlen: tokens in a window.
        seed: same seed, same windows; no global generator is used or changed. With the data set's `disjoint_seeds`
            of N, the windows of the joined text are dealt out to the seeds 0 to N - 1: none is in two seeds' windows.
        holdout: more windows, which overlap none of the others (of a joined text) or come from other documents; the
            windows before them are the same with and without.
        fresh: still more windows of the same kind, after those.
        training: windows to train on, after those: other windows of a joined text; of documents consecutive windows of
            all the others, joined in random order, since few are longer than a window.
        bos: "auto": each document (or the joined text) is tokenised with the special tokens that the tokenizer adds,
            as the published codes do; true/false: with or without a first BOS; "window": every window starts with BOS.
        vocabulary: ids that the model has an embedding for; None is unknown.

    Returns:
        Tokens (nsamples + holdout + fresh + training, seqlen), and their description for the record.

    Raises:
        UserError: no such file or hub, too little text (says how many windows there are), ids beyond the vocabulary.
    """
    encoder = Encoder(tokenizer, bos, seqlen)
    data.check(seed)
    _at_least_one("nsamples", nsamples)
    text = calibration_text(data)
    counts = nsamples, holdout, fresh, training
    from_documents = _documents_suffice(data, text, encoder, nsamples)
    rows, facts = (_of_documents if from_documents else _of_stream)(data, text, encoder, seed, *counts)
    description = _description(data, text, encoder, nsamples) | facts
    more = {"held_out_windows": holdout, "fresh_windows": fresh, "training_windows": training}
    description |= {key: count for key, count in more.items() if count}
    description |= {"partial": False, "documents_available": _holding_text(text.documents), "seed": seed}
    return _known(rows, encoder, vocabulary, f"data={data.name}: the calibration text"), description


def evaluation_tokens(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int,
    windows: int | None = None,
    bos: str | bool = "auto",
    path: str | None = None,
    vocabulary: int | None = None,
) -> tuple[torch.LongTensor, dict]:
    """Windows of a data set's evaluation text: consecutive ones from its start, or a fixed draw from documents.

    Args:
        data: where it is; its `evaluation_sampling` is "consecutive" (of the joined text), or "documents": its
            `evaluation_windows` windows at random offsets in random documents longer than a window, seed 0.
        tokenizer: the model's.
        seqlen: tokens in a window; a last, shorter piece is dropped.
        windows: how many; None is all that the protocol has.
        bos, vocabulary: as in `calibration_tokens`.
        path: a local file in place of its evaluation text, read by the same rules.

    Returns:
        Tokens (windows, seqlen), and their description for the record.

    Raises:
        UserError: no such file or hub, too little text (says how many windows there are), ids beyond the vocabulary.
    """
    encoder = Encoder(tokenizer, bos, seqlen, "eval.bos")
    if windows is not None:
        _at_least_one("windows", windows)
    text = evaluation_text(data, path)
    limit, sampled = data.evaluation_windows, data.evaluation_sampling == "documents"
    if sampled:
        available = limit if encoder.longer_than_window(text.documents, 1) else 0
        reading = f"{limit} windows at random offsets in random documents longer than a window, seed 0"
    else:
        ids = encoder.encode([text.joined])[0]
        available = len(ids) // encoder.payload
        available = available if limit is None else min(available, limit)
        reading = f"documents joined by {text.join!r}, consecutive windows"
        reading += "" if limit is None else f", at most {limit}"
    count = available if windows is None else windows
    if count > available or not available:
        raise _too_short(data.name, "evaluation", available, max(count, 1), seqlen, "windows")
    if sampled:
        rows, *_ = _from_documents(text, encoder, count, random.Random(0), 0, data.name)
    else:
        rows = [encoder.window(ids, index * encoder.payload) for index in range(count)]
    description = _description(data, text, encoder, count) | {
        "reading": f"{reading}, {'all' if count == available else f'the first {count}'} of {available}",
        "join": None if sampled else text.join,
        "total_windows": available,
        "partial": count < available,
    }
    return _known(rows, encoder, vocabulary, f"data={data.name}: the evaluation text"), description


class Encoder:
    """A tokenizer under one rule for BOS, and windows of one length made of its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: str | bool, seqlen: int, key: str = "model.bos"):
        self.tokenizer, self.rule, self.seqlen = tokenizer, str(bos).lower(), seqlen
        check_bos(key, bos, tokenizer)
        if seqlen < 2:
            raise UserError(f"seqlen={seqlen} is not allowed: give a whole number from 2")
        self.payload = seqlen - (self.rule == "window")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, of any length."""
        # verbose=False: a text longer than the model's context is what is wanted here, not a mistake to warn of.
        ids = self.tokenizer(
            texts,
            add_special_tokens=self.rule == "auto",
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [[self.tokenizer.bos_token_id, *row] for row in ids] if self.rule == "true" else ids

    def window(self, ids: list[int], start: int) -> list[int]:
        """The window of `seqlen` tokens that begins at token `start` of a text."""
        first = [self.tokenizer.bos_token_id] if self.rule == "window" else []
        return first + ids[start : start + self.payload]

    def may_be_longer(self, document: str) -> bool:
        """False for a document that cannot fill a window: tokens are at least one byte each, but for a few at the ends.

        Spares tokenising three of four documents of C4.
        """
        return len(document) > self.payload or len(document.encode()) + 8 > self.payload

    def longer_than_window(self, documents: list[str], enough: int) -> int:
        """How many documents are longer than a window, counted until there are enough of them."""
        candidates = [document for document in documents if self.may_be_longer(document)]
        found = 0
        for start in range(0, len(candidates), 64):
            found += sum(len(ids) > self.payload for ids in self.encode(candidates[start : start + 64]))
            if found >= enough:
                break
        return found

    def describe(self) -> str:
        """What happened to BOS, for the record."""
        return describe_bos(self.tokenizer, self.rule)


def _documents_suffice(data: DataSettings, text: Text, encoder: Encoder, nsamples: int) -> bool:
    """Whether windows come from single documents, by the data set's `sampling` and how many are longer than one."""
    sampling = str(data.sampling or "auto")
    if sampling == "concatenated":
        return False
    long = encoder.longer_than_window(text.documents, nsamples)
    if sampling == "documents" and not long:
        raise UserError(
            f"data={data.name}: no document is longer than seqlen={encoder.seqlen} tokens; lower seqlen, or "
            "data.sampling=concatenated"
        )
    return sampling == "documents" or long >= nsamples


def _of_documents(
    data: DataSettings, text: Text, encoder: Encoder, seed: int, nsamples: int, holdout: int, fresh: int, training: int
) -> tuple[list, dict]:
    """Windows of single documents, and what the record says of them."""
    generator = _generator(data, seed)
    rows, used, others = _from_documents(text, encoder, nsamples, generator, holdout, data.name, fresh)
    packed = _packed(others, text.join, encoder, training, seed)
    if len(packed) < training:
        raise _too_short_to_train_on(data.name, len(packed), training, nsamples, encoder.seqlen)
    rows += packed
    return rows, {
        "sampling": "documents",
        "documents": used,
        "total_windows": None,
        "protocol": "random offsets in random documents longer than a window",
    }


def _of_stream(
    data: DataSettings, text: Text, encoder: Encoder, seed: int, nsamples: int, holdout: int, fresh: int, training: int
) -> tuple[list, dict]:
    """Windows of the joined documents, and what the record says of them."""
    parts = data.disjoint_seeds or 1
    part = slice(seed if parts > 1 else 0, None, parts)
    rows, used, available = _from_stream(
        text, encoder, nsamples, _generator(data, seed), data.name, holdout, part, fresh, training
    )
    dealt = f", dealt out to {parts} seeds" if parts > 1 else ""
    return rows, {
        "sampling": "concatenated",
        "documents": used,
        "total_windows": available,
        "protocol": f"random distinct windows of the documents joined by {text.join!r}{dealt}",
    }


def _generator(data: DataSettings, seed: int) -> random.Random:
    """The seed's own, or one for all seeds that share the windows out."""
    return random.Random(seed if (data.disjoint_seeds or 1) == 1 else 0)


def _from_documents(
    text: Text,
    encoder: Encoder,
    nsamples: int,
    generator: random.Random,
    holdout: int,
    name: str,
    fresh: int = 0,
) -> tuple[list, int, list[str]]:
    """Windows at random offsets in random documents that are longer, drawn in the order of SparseGPT's `get_c4`; from
    how many documents the calibration windows are, and the documents that no window is from.

    A document may be drawn twice, as there. At least one document must be longer than a window. Held-out and
    fresh windows come from documents that are neither among those nor copies of one.
    """
    rows: list[list[int]] = []
    used: set[int] = set()
    tokens: dict[int, list[int] | None] = {}
    while len(rows) < nsamples:
        index = generator.randint(0, len(text.documents) - 1)
        if index not in tokens:
            document = text.documents[index]
            ids = encoder.encode([document])[0] if encoder.may_be_longer(document) else []
            tokens[index] = ids if len(ids) > encoder.payload else None
        ids = tokens[index]
        if ids is not None:
            rows.append(encoder.window(ids, generator.randint(0, len(ids) - encoder.payload - 1)))
            used.add(index)
    more = holdout + fresh
    seen = {text.documents[index] for index in used} if more else set()
    others = [index for index, document in enumerate(text.documents) if document not in seen]
    for index in generator.sample(others, len(others)) if more else ():
        document = text.documents[index]
        ids = encoder.encode([document])[0] if encoder.may_be_longer(document) else []
        if len(ids) > encoder.payload:
            rows.append(encoder.window(ids, generator.randint(0, len(ids) - encoder.payload - 1)))
            seen.add(document)
        if len(rows) == nsamples + more:
            break
    _enough(name, len(rows) - nsamples, holdout, fresh, encoder.seqlen)
    seen |= {text.documents[index] for index in used}
    return rows, len(used), [document for document in text.documents if document not in seen]


def _packed(documents: list[str], join: str, encoder: Encoder, count: int, seed: int) -> list[Tensor]:
    """At most so many consecutive windows of the documents in random order, each tokenised by itself with `join`
    behind it."""
    rows: list[Tensor] = []
    if not count:
        return rows
    order = random.Random(f"training {seed}").sample(range(len(documents)), len(documents))
    ids: list[int] = []
    for start in range(0, len(order), 64):
        for row in encoder.encode([documents[index] + join for index in order[start : start + 64]]):
            ids += row
        whole = min(len(ids) // encoder.payload, count - len(rows))
        rows += [torch.tensor(encoder.window(ids, index * encoder.payload)) for index in range(whole)]
        del ids[: whole * encoder.payload]
        if len(rows) == count:
            break
    return rows


def _from_stream(
    text: Text,
    encoder: Encoder,
    nsamples: int,
    generator: random.Random,
    name: str,
    holdout: int,
    part: slice,
    fresh: int = 0,
    training: int = 0,
) -> tuple[list, int, int]:
    """Distinct, non-overlapping windows of the joined documents; also the documents joined and the windows there.

    Of several parts (`disjoint_seeds`) they are of one, a slice of all windows in random order.
    """
    documents = _run_of(text.documents, generator)
    ids = encoder.encode([text.join.join(documents)])[0]
    total = len(ids) // encoder.payload
    windows = range(total)
    if part != slice(0, None, 1):
        windows = generator.sample(windows, len(windows))[part]
    available = len(windows)
    if available < nsamples:
        raise _too_short(name, "calibration", available, nsamples, encoder.seqlen, "nsamples")
    picks = generator.sample(windows, nsamples)
    _enough(name, available - nsamples, holdout, fresh, encoder.seqlen)
    if (left := available - nsamples - holdout - fresh) < training:
        raise _too_short_to_train_on(name, left, training, nsamples, encoder.seqlen)
    picks += generator.sample(sorted(set(windows) - set(picks)), holdout)
    for count in (fresh, training):
        picks += generator.sample(sorted(set(windows) - set(picks)), count) if count else []
    return [encoder.window(ids, pick * encoder.payload) for pick in picks], _holding_text(documents), total


def _holding_text(documents: list[str]) -> int:
    return sum(bool(document.strip()) for document in documents)


def _run_of(documents: list[str], generator: random.Random) -> list[str]:
    """All documents, or a run of consecutive ones from a random start where they are too many to join."""
    if sum(map(len, documents)) <= _MOST_CHARACTERS:
        return documents
    start, run, characters = generator.randrange(len(documents)), [], 0
    for document in documents[start:] + documents[:start]:
        run.append(document)
        characters += len(document)
        if characters > _MOST_CHARACTERS:
            break
    return run


def _description(data: DataSettings, text: Text, encoder: Encoder, windows: int) -> dict:
    return {
        "dataset": data.name,
        "source": text.source,
        "split": text.split,
        "revision": text.revision,
        "windows": windows,
        "seqlen": encoder.seqlen,
        "bos": encoder.describe(),
    }


def _known(rows: list[list[int]], encoder: Encoder, vocabulary: int | None, what: str) -> torch.LongTensor:
    """The windows as a tensor, unless the model has no embedding for one of their tokens."""
    refuse_unknown((int(torch.as_tensor(row).max()) for row in rows), encoder.tokenizer, vocabulary, what)
    return torch.stack([torch.as_tensor(row, dtype=torch.long) for row in rows])


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{key}={value} is not allowed: give a whole number from 1")


def _enough(name: str, available: int, holdout: int, fresh: int, seqlen: int) -> None:
    """Raise UserError unless so many windows are there beside the calibration windows."""
    if available < holdout:
        raise _too_short(name, "held-out", available, holdout, seqlen, "data.holdout")
    if available - holdout < fresh:
        raise _too_short(name, "fresh", available - holdout, fresh, seqlen, "finish.distil.windows or finish.tokens")


def _too_short(name: str, purpose: str, available: int, asked: int, seqlen: int, key: str) -> UserError:
    return UserError(
        f"data={name}: the {purpose} text has only {available} windows of seqlen={seqlen} tokens, {asked} were asked; "
        f"lower {key} or seqlen, or give a longer text"
    )


def _too_short_to_train_on(name: str, available: int, asked: int, nsamples: int, seqlen: int) -> UserError:
    """The calibration windows are trained on, too, so `asked` and `available` are those beside them."""
    key = f"method.tokens (to {(available + nsamples) * seqlen} at most)"
    return _too_short(name, "training", available, asked, seqlen, key)
