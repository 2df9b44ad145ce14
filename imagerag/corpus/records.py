"""Reading of lists in text files, in batches: the cells of each row, before validation.

A row that can't be read becomes a row with a fault. Only a file that is not of the format that its name says is an
error.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from imagerag.errors import UserError

BATCH_ROWS = 10_000
"""Number of rows read at a time."""
_MAX_QUOTED_LINES = 1_000  # maximum number of lines of a quoted cell
_CHUNK = 2**20  # characters of a JSON array read at a time
_MAX_ITEM = 16 * 2**20  # characters of an item of a JSON array, which can't be told from a broken one before its end
_BETWEEN_ITEMS = re.compile(r"[ \t\r\n,]*")
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")

Choose = Callable[[Sequence[str], Mapping[str, bool]], dict[str, str]]
"""A function that chooses the column of each field. It receives the names of a file's columns, and those columns that
may contain images, each with whether it certainly does. It raises an error if a required column is missing; `url` is
optional if there is an `image` column.
"""


@dataclass(frozen=True)
class Batch:
    """A batch of rows of a file."""

    columns: dict[str, pa.Array]
    """Text columns by field; `caption` may have a list of texts per row. Rows that contain their images also have
    `member` and `sha256`."""
    faults: pa.Array
    """Reason why each row can't be read; null for readable rows."""


def read_lines(text: Iterable[str], choose: Choose) -> Iterator[Batch]:
    """Yield batches of a text file with one URL per line; captions are made of the words in the URLs' file names."""
    lines = (line for line in text if line.strip())
    while some := list(islice(lines, BATCH_ROWS)):
        rows = [{"url": line, "caption": _words_of(line)} for line in some]
        yield as_batch(rows, [None] * len(rows), choose(["url", "caption"], {}))


def _words_of(url: str) -> str | None:
    try:
        name = PurePosixPath(unquote(urlsplit(url.strip()).path)).stem
    except ValueError:  # an invalid URL, which validation reports later
        return url
    return re.sub(r"[\s_+.-]+", " ", name).strip() or url.strip()


def read_json(uri: str, text: io.TextIOWrapper, choose: Choose) -> Iterator[Batch]:
    """Yield batches of a JSON array of objects, or of JSON lines."""
    start = text.read(1)
    while start.isspace():
        start = text.read(1)
    rows = _array_items(uri, text) if start == "[" else map(_parsed, _lines_from(start, text))
    seen: dict[str, None] = {}  # an ordered set: later rows may have more columns
    while some := list(islice(rows, BATCH_ROWS)):
        objects: list[dict[str, Any]] = [row if isinstance(row, dict) else {} for row in some]
        faults = [None if isinstance(row, dict) else row for row in some]
        seen |= dict.fromkeys(chain.from_iterable(objects))
        names = choose(list(seen), {})
        yield as_batch(objects, faults, names)


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
    decoder, buffer, place, number = json.JSONDecoder(), "", 0, 1
    while True:
        place += len(_BETWEEN_ITEMS.match(buffer, place)[0])  # type: ignore[index]
        if buffer.startswith("]", place):
            return
        try:
            item, place = decoder.raw_decode(buffer, place)
        except (ValueError, RecursionError) as error:
            buffer, place = buffer[place:], 0
            may_be_cut = isinstance(error, ValueError) and len(buffer) < _MAX_ITEM
            more = text.read(_CHUNK) if may_be_cut else ""
            if not more:
                raise UserError(f"{uri}, row {number} of the JSON array can't be read: {error}") from error
            buffer += more
            continue
        number += 1
        yield item if isinstance(item, dict) else f"is no JSON object: {item!r:.80}"


def read_csv(text: Iterable[str], delimiter: str | None, choose: Choose) -> Iterator[Batch]:
    """Yield batches of a CSV file with or without a header. If `delimiter` is None, it is guessed."""
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
    names = choose(header, {})
    rows.url_column = header.index(names["url"]) if "url" in names else None
    while some := list(islice(rows, BATCH_ROWS)):
        objects = [{} if isinstance(row, str) else dict(zip(header, row, strict=True)) for row in some]
        yield as_batch(objects, [row if isinstance(row, str) else None for row in some], names)


def _invented(first_row: Sequence[str]) -> list[str]:
    """Return column names for a file without a header.

    Columns are numbered, except that the URL column is named `url`, and the other one of two columns `caption`.
    """
    names = [str(number) for number in range(1, len(first_row) + 1)]
    url = next(index for index, cell in enumerate(first_row) if _URL.match(cell))
    names[url] = "url"
    if len(names) == 2:
        names[1 - url] = "caption"
    return names


class _Rows:
    """The rows of a CSV file, each as its cells or as a message that says what is wrong with it.

    Stricter than readers that treat an unclosed quote as closed many rows later, at the end of the file: lines after
    an open quote that are rows by themselves are read as rows.
    """

    def __init__(self, lines: Iterator[str], delimiter: str, width: int) -> None:
        self._lines, self._pushed = lines, list[str]()
        self._delimiter, self._width = delimiter, width
        self.url_column: int | None = None

    def push_back(self, *lines: str) -> None:
        self._pushed[:0] = lines

    def __iter__(self) -> Iterator[list[str] | str]:
        while (line := self._next_line()) is not None:
            if line.strip() or self._delimiter in line:  # a line of tabs only is a row of empty cells
                cells = _cells(line, self._delimiter)
                yield self._checked(self._over_lines(line) if cells == _OPEN else cells, line)

    def _next_line(self) -> str | None:
        return self._pushed.pop(0) if self._pushed else next(self._lines, None)

    def _checked(self, cells: list[str] | str, line: str) -> list[str] | str:
        if isinstance(cells, str) and self._delimiter == "\t":
            cells = line.split("\t")  # TSV cells are rarely quoted, so a quote is an ordinary character
        if isinstance(cells, list) and len(cells) != self._width:
            return f"has {len(cells)} cells instead of {self._width}"
        return cells

    def _over_lines(self, line: str) -> list[str] | str:
        """Return the cells of a row with a quoted cell that continues on the next lines, or `_OPEN`."""
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
    """Return the cells of a row, or a message that says what is wrong with it."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        return _OPEN if "unexpected end" in str(error) else f"is no CSV ({error})"


def as_batch(rows: Sequence[dict[str, Any]], faults: list[str | None], names: dict[str, str]) -> Batch:
    """Return a batch of text columns; a cell that is not text is a fault of its row."""
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
    """Return a cell's text, and a message if it is not valid text."""
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
    """Return a batch with one row per caption, and each new row's index in the original batch."""
    captions = batch.columns.get("caption")
    count = len(batch.faults)
    if captions is None or not pa.types.is_list(captions.type):
        return batch, pa.array(range(count), pa.int64())
    # A row without captions is kept, with a null caption.
    captions = pc.if_else(
        pc.fill_null(pc.equal(pc.list_value_length(captions), 0), True), pa.scalar([None], captions.type), captions
    )
    parents = pc.list_parent_indices(captions)
    columns = {field: column.take(parents) for field, column in batch.columns.items() if field != "caption"}
    return Batch(columns | {"caption": pc.list_flatten(captions)}, batch.faults.take(parents)), parents
