"""GGUF checkpoints as ordinary transformers folders, converted once and kept in the hub's cache of assets.

transformers reads a GGUF file by parsing it anew for the configuration, the tokenizer and the weights; here it is
parsed once. The model that it returns refuses `save_pretrained`, and its tokenizer can miss a pre-tokenizer. The folder
written here is dequantised to float32 (exact), loads in a second, and is like any other checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from unittest import mock

from safetensors import SafetensorError

from ..base.errors import UserError
from ..base.files import file_sha256, leftovers, lock, remove, replacing
from .hub import first_line

# Part of the folder's name: raise it whenever `_convert` writes something else than before.
_CONVERSION = 2

# Types of a tokenizer's pieces in GGUF files: ordinary ones, and those that the user of SentencePiece has defined.
_NORMAL, _DEFINED = 1, 4


def converted_folder(file: Path) -> Path:
    """The folder with config, tokenizer and float32 weights of a GGUF file; written at the first call.

    Raises:
        UserError: not a GGUF file that transformers can read, or the cache cannot be written.
    """
    try:
        stat = file.stat()
        return _converted(file, stat.st_size, stat.st_mtime_ns)
    except (OSError, SafetensorError) as error:  # the latter when the disk is full
        raise UserError(
            f"cannot convert {file.name} ({first_line(error)}): make room, or set HF_ASSETS_CACHE to a writable folder"
        ) from None


@lru_cache(maxsize=8)
def _converted(file: Path, size: int, modified: int) -> Path:
    from huggingface_hub import cached_assets_path

    try:
        cache = cached_assets_path("alps_exp", namespace="gguf", subfolder="converted")
    except ValueError as error:  # a file where the folder should be
        raise OSError(first_line(error)) from None
    target = cache / f"{file.stem}-{file_sha256(file)[:16]}-{_CONVERSION}"
    return made_once(target, lambda scratch: _convert(file, scratch))


def made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """The folder `target`, which appears whole: `make` fills another one beside it first, unless it is there.

    Processes that want the same folder wait for the one that makes it; what a killed one left is removed.
    """
    if not target.is_dir():
        with target.with_name(f"{target.name}.lock").open("w") as file:
            lock(file.fileno(), wait=True)
            if not target.is_dir():
                for leftover in leftovers(target.parent, target.name):
                    remove(leftover)
                with replacing(target) as scratch:
                    scratch.mkdir()
                    make(scratch)
    return target


def _convert(file: Path, folder: Path) -> None:
    """Write the checkpoint in `file` to `folder` as float32 safetensors, configuration and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "trust_remote_code": False}
    try:
        with _parsed_once():
            config = AutoConfig.from_pretrained(**where)
            tokenizer = AutoTokenizer.from_pretrained(**where)
            loaded = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=torch.float32)
            pre_tokenizer, pieces = _field(file, "pre"), _pieces(file)
    except ImportError as error:
        raise UserError(f"reading {file.name} needs the package gguf: pip install gguf ({first_line(error)})") from None
    except MemoryError:
        raise
    except Exception as error:  # gguf and transformers raise whatever their parsers stumble on
        raise UserError(
            f"{file.name} is not a GGUF checkpoint that transformers can read ({first_line(error)}); "
            f"give a folder with config.json and safetensors files"
        ) from None
    if pieces is not None and config.model_type.startswith("gemma"):
        _mend_pieces(tokenizer, *pieces)
    _mend_tokenizer(pre_tokenizer, tokenizer, config)
    tokenizer.save_pretrained(folder)
    # `loaded` is marked as quantised and refuses to be saved: move its tensors into a model that is not.
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):  # its random weights would take seconds, and are not used
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """While transformers reads a GGUF file: keep what the package gguf has parsed and the names that it has listed."""
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


def _mend_tokenizer(pre_tokenizer: str | None, tokenizer, config) -> None:
    """Put back what transformers' conversion of GGUF tokenizers loses: SmolLM2's digit splitting, the special tokens.

    The file names its pre-tokenizer in `tokenizer.ggml.pre`; llama.cpp splits digits one by one for `smollm`.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if pre_tokenizer == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
        )
    tokenizer.clean_up_tokenization_spaces = False
    for role in ("bos", "eos", "pad"):
        index = getattr(config, f"{role}_token_id", None)
        if isinstance(index, int) and 0 <= index < len(tokenizer):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(index))


def _mend_pieces(tokenizer, pieces: list[str], scores: list[float], types: list[int]) -> None:
    """Let Gemma's tokenizer merge pieces as SentencePiece does: the pair whose piece has the highest score first.

    transformers' conversion takes the scores, which are ranks of merges, for log-probabilities of a unigram model, and
    cuts words into far more pieces ("▁E ng li sh"). Pieces that the user has defined come before all others: runs of
    blanks and line breaks by merging, the rest as added tokens.
    """
    from tokenizers import AddedToken, decoders, models, normalizers

    known = {" " * len(piece): "▁" * len(piece) for piece in pieces if piece and not piece.strip(" ")}
    known |= {} if "\t" in pieces else {"<0x09>": "\t"}
    names = [known.get(piece, piece) for piece in pieces]
    vocabulary = {name: index for index, name in enumerate(names)}
    ranks = {
        name: (kind == _NORMAL, -score if kind == _NORMAL else vocabulary[name])
        for name, score, kind in zip(names, scores, types, strict=True)
        if kind in (_NORMAL, _DEFINED)
    }
    pairs = [
        (rank, vocabulary[name[:cut]], vocabulary[name[cut:]])
        for name, rank in ranks.items()
        for cut in range(1, len(name))
        if name[:cut] in ranks and name[cut:] in ranks
    ]
    merges = [(names[left], names[right]) for _, left, right in sorted(pairs)]
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend.normalizer, backend.pre_tokenizer = normalizers.Replace(" ", "▁"), None
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    defined = [name for name, kind in zip(names, types, strict=True) if kind == _DEFINED and name.strip("▁\n\t")]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in defined])


def _pieces(file: Path) -> tuple[list[str], list[float], list[int]] | None:
    """The pieces of a SentencePiece tokenizer, their scores and their types; None where the file has none."""
    found = tuple(_field(file, name) for name in ("tokens", "scores", "token_type"))
    return None if _field(file, "model") != "llama" or None in found else found


def _field(file: Path, name: str):
    """What the file says about its tokenizer under this name; None if nothing."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(f"tokenizer.ggml.{name}")
    return None if field is None else field.contents()
