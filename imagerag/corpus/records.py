"""The rows of a list's file, in whichever form it is, a batch at a time: what is in its cells, unjudged.

A row that can't be read is a row with a fault. Only a file that isn't the list that its name says is an error.
"""

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from imagerag.corpus.sniff import HEAD_BYTES, seems
from imagerag.errors import UserError

_TEXT_FORMATS = ("csv", "tsv", "txt", "json", "jsonl")
FORMATS = (".parquet", *(f".{name}{packed}" for name in _TEXT_FORMATS for packed in ("", ".gz", ".zst")))

_BATCH_ROWS = 10_000
_MAX_QUOTED_LINES = 1_000  # of one cell
_CHUNK = 2**20  # characters of a JSON array read at a time
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

Choose = Callable[[Sequence[str]], dict[str, str]]
"""Takes the names of a file's columns and returns the column of each field; raises where one is missing."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a file."""

    columns: dict[str, pa.Array]
    """The texts of each field; of a caption, there may be a list in a row."""
    faults: pa.Array
    """Why a row can't be read; null for those that can."""


def read_batches(uri: str, what: str, choose: Choose) -> Iterator[Batch]:
    """Yield the rows of a file, or of all files that a folder or a glob of them has.

    Args:
        what: what the file is, for messages.
        choose: is asked for the columns of every file.

    Raises:
        UserError: if it is missing, or not of the format that its name says.
    """
    for part in _parts(uri, what):
        suffix = next(suffix for suffix in sorted(FORMATS, key=len, reverse=True) if part.lower().endswith(suffix))
        with _named_errors(part, what), _opened(part, suffix) as stream:
            if suffix == ".parquet":
                yield from _read_parquet(part, stream, choose)
                continue
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")  # every kind of line end is one
            match suffix.split(".")[1]:
                case "txt":
                    yield from _read_lines(text, choose)
                case "json" | "jsonl":
                    yield from _read_json(part, text, choose)
                case kind:
                    yield from _read_csv(part, text, "\t" if kind == "tsv" else None, choose)


def _parts(uri: str, what: str) -> list[str]:
    """The files that `uri` means, in order."""
    is_glob = re.search(r"[*?[]", uri) is not None
    if uri.lower().endswith(FORMATS) and not is_glob:
        return [uri]
    with _named_errors(uri, what):
        fs, path = fsspec.core.url_to_fs(uri)
        if fs.isfile(path) and uri.lower().endswith(FORMATS):  # a name with a bracket in it
            return [uri]
        found = fs.glob(path) if is_glob else fs.find(path)
    parts = sorted(part for part in found if part.lower().endswith(FORMATS))
    if not parts:
        raise UserError(f"a {what} is a file, or a folder or a glob of files, named {', '.join(FORMATS)}; got {uri}")
    return [fs.unstrip_protocol(part) for part in parts]


@contextmanager
def _opened(uri: str, suffix: str) -> Iterator[Any]:
    """The file's content, unpacked, after a look at what it seems to be."""
    with fsspec.open(uri, "rb") as file:
        compression = next((name for end, name in _COMPRESSIONS.items() if suffix.endswith(end)), None)
        _check_kind(uri, file, {compression or ("parquet" if suffix == ".parquet" else None)})
        if compression is None:
            yield file
            return
        with pa.CompressedInputStream(pa.PythonFile(file, "r"), compression) as unpacked:
            yield unpacked


def _check_kind(uri: str, file: IO[bytes], wanted: set[str | None]) -> None:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    kind = seems(head)
    if None in wanted:  # text, a stray control character or another encoding in it notwithstanding
        is_text = kind == "an unknown kind of data" and len(re.findall(rb"[\x00-\x08\x0e-\x1f]", head)) * 20 < len(head)
        fits = is_text or kind in ("text", "JSON", "an empty file")
    else:
        fits = kind in wanted
    if not fits:
        raise UserError(f"{uri} is not readable as the list that its name says: it seems to be {kind}")


@contextmanager
def _named_errors(uri: str, what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"there is no {what} at {uri}") from None
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{uri} is not readable as the list that its name says: {error}") from error


def _read_parquet(uri: str, file: IO[bytes], choose: Choose) -> Iterator[Batch]:
    parquet = pa.parquet.ParquetFile(file)
    names = choose(parquet.schema_arrow.names)
    kinds = {field: parquet.schema_arrow.field(name).type for field, name in names.items()}
    for field, kind in kinds.items():
        if not _is_text(kind) and not (field == "caption" and _is_list(kind) and _is_text(kind.value_type)):
            raise UserError(f"{uri}, column {names[field]!r}: text is needed, the column is of type {kind}")
    for batch in parquet.iter_batches(columns=list(names.values())):
        columns = {}
        for field, name in names.items():
            listed = _is_list(kinds[field])
            columns[field] = batch.column(name).cast(pa.list_(pa.string()) if listed else pa.string())
        yield Batch(columns, pa.nulls(batch.num_rows, pa.string()))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _read_lines(text: Iterable[str], choose: Choose) -> Iterator[Batch]:
    """One URL a line, its caption the words of the file's name."""
    lines = (line for line in text if line.strip())
    while some := list(islice(lines, _BATCH_ROWS)):
        yield _batch(
            [{"url": line, "caption": _words_of(line)} for line in some], [None] * len(some), choose(["url", "caption"])
        )


def _words_of(url: str) -> str | None:
    try:
        name = PurePosixPath(unquote(urlsplit(url.strip()).path)).stem
    except ValueError:  # a bad URL, which is found out where URLs are judged
        return url
    return re.sub(r"[\s_+.-]+", " ", name).strip() or url.strip()


def _read_json(uri: str, text: io.TextIOWrapper, choose: Choose) -> Iterator[Batch]:
    """An array of objects, or an object a line."""
    start = text.read(1)
    while start.isspace():
        start = text.read(1)
    rows = _array_items(uri, text) if start == "[" else map(_parsed, _lines_from(start, text))
    seen: dict[str, None] = {}  # an ordered set: a column may appear late
    while some := list(islice(rows, _BATCH_ROWS)):
        objects: list[dict[str, Any]] = [row if isinstance(row, dict) else {} for row in some]
        faults = [None if isinstance(row, dict) else row for row in some]
        seen |= dict.fromkeys(chain.from_iterable(objects))
        names = choose(list(seen))
        yield _batch(objects, faults, names)


def _lines_from(start: str, text: Iterable[str]) -> Iterator[str]:
    lines = iter(text)
    first = start + next(lines, "")
    return (line for line in chain([first], lines) if line.strip())


def _parsed(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({error})"
    return row if isinstance(row, dict) else f"is no JSON object: {line.strip()!r:.80}"


def _array_items(uri: str, text: io.TextIOWrapper) -> Iterator[dict[str, Any] | str]:
    decoder, buffer, number = json.JSONDecoder(), "", 0
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        if buffer.startswith("]"):
            return
        try:
            item, end = decoder.raw_decode(buffer)
        except ValueError as error:
            more = text.read(_CHUNK)
            if not more:
                raise UserError(f"{uri}, row {number + 1} of the JSON array can't be read: {error}") from error
            buffer += more
            continue
        number, buffer = number + 1, buffer[end:]
        yield item if isinstance(item, dict) else f"is no JSON object: {item!r:.80}"


def _read_csv(uri: str, text: Iterable[str], delimiter: str | None, choose: Choose) -> Iterator[Batch]:
    lines = (line.rstrip("\n") for line in text)
    first = next((line for line in lines if line.strip()), "")
    if delimiter is None:
        delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    header = _cells(first, delimiter)
    if isinstance(header, str):
        header = first.split(delimiter)
    rows = _Rows(lines, delimiter, len(header))
    if any(map(_URL.match, header)):  # there is no header
        rows.push_back(first)
        header = _invented(header)
    names = choose(header)
    rows.url_column = header.index(names["url"]) if "url" in names else None
    while some := list(islice(rows, _BATCH_ROWS)):
        objects = [{} if isinstance(row, str) else dict(zip(header, row, strict=True)) for row in some]
        yield _batch(objects, [row if isinstance(row, str) else None for row in some], names)


def _invented(first_row: Sequence[str]) -> list[str]:
    """Names for the columns of a file without a header: the URL's, the other one's if it is one, else numbers."""
    names = [str(number) for number in range(1, len(first_row) + 1)]
    url = next(index for index, cell in enumerate(first_row) if _URL.match(cell))
    names[url] = "url"
    if len(names) == 2:
        names[1 - url] = "caption"
    return names


class _Rows:
    """The rows of a CSV file: its cells, or what is wrong with it.

    Stricter than readers that take a quote that is never closed for one that is closed at the end, rows later: lines
    behind a quote that are rows by themselves are rows.
    """

    def __init__(self, lines: Iterator[str], delimiter: str, width: int) -> None:
        self._lines, self._pushed = lines, list[str]()
        self._delimiter, self._width = delimiter, width
        self.url_column: int | None = None

    def push_back(self, *lines: str) -> None:
        self._pushed[:0] = lines

    def __iter__(self) -> Iterator[list[str] | str]:
        while (line := self._next_line()) is not None:
            if line.strip():
                cells = _cells(line, self._delimiter)
                yield self._checked(self._over_lines(line) if cells == _OPEN else cells, line)

    def _next_line(self) -> str | None:
        return self._pushed.pop(0) if self._pushed else next(self._lines, None)

    def _checked(self, cells: list[str] | str, line: str) -> list[str] | str:
        if isinstance(cells, str) and self._delimiter == "\t":
            cells = line.split("\t")  # where few quote, a quote is a letter
        if isinstance(cells, list) and len(cells) != self._width:
            return f"has {len(cells)} cells instead of {self._width}"
        return cells

    def _over_lines(self, line: str) -> list[str] | str:
        """The cells of a row whose quoted text goes on in the next lines."""
        block = [line]
        while len(block) < _MAX_QUOTED_LINES and (following := self._next_line()) is not None:
            block.append(following)
            if '"' in following:
                cells = _cells("\n".join(block), self._delimiter)
                if isinstance(cells, list) and not any(map(self._is_a_row, block[1:])):
                    return cells
                if cells != _OPEN:
                    break
        self.push_back(*block[1:])
        return _OPEN

    def _is_a_row(self, line: str) -> bool:
        cells = line.split(self._delimiter) if '"' in line else _cells(line, self._delimiter)
        at = self.url_column
        return at is not None and isinstance(cells, list) and len(cells) >= self._width and bool(_URL.match(cells[at]))


_OPEN = "has a quote that is not closed"


def _cells(line: str, delimiter: str) -> list[str] | str:
    """The cells of a row, or what is wrong with it."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        return _OPEN if "unexpected end" in str(error) else f"is no CSV ({error})"


def _batch(rows: Sequence[dict[str, Any]], faults: list[str | None], names: dict[str, str]) -> Batch:
    """Cells as text; a cell that is none is a fault of its row."""
    columns = {}
    for field, name in names.items():
        cells: list[Any] = []
        for index, row in enumerate(rows):
            cell = row.get(name)
            if field == "caption" and isinstance(cell, list):
                texts, wrong = zip(*map(_text, cell), strict=True) if cell else ((), ())
                cell, fault = list(texts), next(filter(None, wrong), None)
            else:
                cell, fault = _text(cell)
            if fault is not None and faults[index] is None:
                faults[index] = f"has {name!r} that {fault}"
            cells.append(cell)
        if any(isinstance(cell, list) for cell in cells):
            cells = [cell if isinstance(cell, list) else [cell] for cell in cells]
            columns[field] = pa.array(cells, pa.list_(pa.string()))
        else:
            columns[field] = pa.array(cells, pa.string())
    return Batch(columns, pa.array(faults, pa.string()))


def _text(cell: object) -> tuple[str | None, str | None]:
    """The text, and what is wrong with it."""
    if cell is None:
        return None, None
    if not isinstance(cell, str):
        return None, f"is no text: {cell!r:.80}"
    try:
        cell.encode()
    except UnicodeEncodeError:
        return None, f"is not UTF-8: {cell!r:.80}"
    return cell, None


def exploded(batch: Batch) -> tuple[Batch, pa.Array]:
    """One row for every caption, and the number in the batch of the row that each comes from."""
    captions = batch.columns.get("caption")
    count = len(batch.faults)
    if captions is None or not pa.types.is_list(captions.type):
        return batch, pa.array(range(count), pa.int64())
    # A row without any caption stays a row.
    captions = pc.if_else(
        pc.fill_null(pc.equal(pc.list_value_length(captions), 0), True), pa.scalar([None], captions.type), captions
    )
    parents = pc.list_parent_indices(captions)
    columns = {field: column.take(parents) for field, column in batch.columns.items() if field != "caption"}
    return Batch(columns | {"caption": pc.list_flatten(captions)}, batch.faults.take(parents)), parents
