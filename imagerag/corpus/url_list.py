"""Reading lists of image URLs: parquet, csv and jsonl, the latter two also gzipped, on any fsspec path."""

import csv
import json
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import IO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from pydantic import Field

from imagerag.config import Config
from imagerag.errors import UserError

SCHEMA = pa.schema([(name, pa.string()) for name in ("url", "caption", "source", "licence", "sha256", "folder")])
"""A checked list: `source` is the URL's host where the list has none; `licence` and `sha256` may be null.

`folder` is the one that may be read for a row which `folder.read_folder` made, and null for all others: it is what
makes a `file:` URL readable, so it is never taken from a file.
"""

FORMATS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")

_REQUIRED = ("url", "file", "caption")
_URL_GUESSES = {"url": ("url", "image_url", "img_url", "image_link", "link", "uri")}
_OTHER_GUESSES = {
    "caption": ("caption", "text", "alt", "alt_text", "title", "description", "name"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "sha256": ("sha256", "image_sha256"),
}
_BLANK = r"[\x00-\x20\x7f-\x9f\p{Z}]"
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?(?P<host>\[[^\]]*\]|[^/?#:]+)"
_SHA256 = r"^[0-9a-fA-F]{64}$"
_CSV_OPTIONS = pa.csv.ParseOptions(newlines_in_values=True)
_JSON_OPTIONS = pa.json.ReadOptions(block_size=16 * 2**20)  # bytes; a line has to fit


class UrlColumns(Config):
    """Which columns of a list to read. Those not named are guessed by their usual names, case ignored."""

    url: str | None = Field(
        default=None, description="Column of the image URLs; in captions for a folder, of the file names."
    )
    caption: str | None = Field(default=None, description="Column of the captions.")
    source: str | None = Field(default=None, description="Column that says where an image comes from (optional).")
    licence: str | None = Field(default=None, description="Column of the images' licences (optional).")
    sha256: str | None = Field(default=None, description="Column of the files' SHA-256 (optional).")


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """A checked list in which every (url, caption) is there once."""

    table: pa.Table
    """Columns as in `SCHEMA`, rows in the order of the list."""
    num_duplicates: int = 0
    """Rows left out because an earlier row has the same URL and caption."""
    num_named_by_file: int = 0
    """Rows whose caption is made of their file's name, because there is no other."""


def read_url_list(uri: str, columns: UrlColumns | None = None) -> UrlList:
    """Read and check a whole list. Rows count from 1; a header is no row.

    Raises:
        UserError: with file, column and row, if the file is missing, unreadable or not of the format that its name
            says, lacks a URL or caption column, has no rows, or has a cell that is no text, a null or empty URL or
            caption, a URL with blanks in it, or a SHA-256 that isn't one.
    """
    named = (columns or UrlColumns()).model_dump(exclude_none=True)
    complete = _complete(read_columns(uri, "URL list", _URL_GUESSES, named))
    table = fold(complete)
    return UrlList(table=table, num_duplicates=complete.num_rows - table.num_rows)


def read_columns(
    uri: str, what: str, guesses: Mapping[str, Collection[str]], named: Mapping[str, str]
) -> dict[str, pa.ChunkedArray]:
    """Read and check the columns of a table, by field.

    Args:
        uri: a file of one of `FORMATS`.
        what: what the file is, for messages.
        guesses: usual names of the column that is beside those of every list.
        named: columns, by field, that are not guessed.

    Raises:
        UserError: see `read_url_list`.
    """
    if not uri.lower().endswith(FORMATS):
        raise UserError(f"a {what} is a file named {', '.join(FORMATS)}; got {uri}")
    try:
        with fsspec.open(uri, "rb", compression="gzip" if uri.lower().endswith(".gz") else None) as file:
            table, names = _read(uri, file, {**guesses, **_OTHER_GUESSES}, named)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no {what} at {uri}") from None
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError, ImportError) as error:
        raise UserError(f"{uri} is not readable as the list that its name says: {error}") from error
    if table.num_rows == 0:
        raise UserError(f"{uri} has no rows")
    return {field: _check(f"{uri}, column {name!r}", field, table[name]) for field, name in names.items()}


def _read(
    uri: str, file: IO[bytes], guesses: Mapping[str, Collection[str]], named: Mapping[str, str]
) -> tuple[pa.Table, dict[str, str]]:
    """The list's table, and which of its columns is which field."""
    plain_uri = uri.lower().removesuffix(".gz")
    if plain_uri.endswith(".parquet"):
        parquet = pa.parquet.ParquetFile(file)
        names = _choose(uri, parquet.schema_arrow.names, guesses, named)
        return parquet.read(columns=list(names.values())), names
    first_line = file.readline().decode("utf-8-sig")
    file.seek(0)
    if plain_uri.endswith(".csv"):
        names = _choose(uri, next(csv.reader([first_line]), []), guesses, named)
        return _read_csv(uri, file, names.values()), names
    first_row = json.loads(first_line or "{}")
    names = _choose(uri, list(first_row) if isinstance(first_row, dict) else [], guesses, named)
    return _read_jsonl(uri, file, names.values()), names


def _choose(
    uri: str, found: list[str], guesses: Mapping[str, Collection[str]], named: Mapping[str, str]
) -> dict[str, str]:
    """The column of each field: the one named, else the first of the field's usual names that is there."""
    by_usual_name = {column.lower(): column for column in reversed(found)}
    chosen = {}
    for field, usual in guesses.items():
        column = named.get(field) or next((by_usual_name[name] for name in usual if name in by_usual_name), None)
        if column is None and field in _REQUIRED:
            raise UserError(f"{uri} has no column that looks like {field!r}: say which of its columns {found} it is")
        if column is not None and found.count(column) != 1:
            raise UserError(f"{uri} has {found.count(column)} columns {column!r} instead of 1; it has {found}")
        if column is not None:
            chosen[field] = column
    return chosen


def _read_csv(uri: str, file: IO[bytes], names: Collection[str]) -> pa.Table:
    options = pa.csv.ConvertOptions(include_columns=list(names), column_types=dict.fromkeys(names, pa.string()))
    try:
        return pa.csv.read_csv(file, parse_options=_CSV_OPTIONS, convert_options=options)
    except pa.ArrowInvalid:
        file.seek(0)
    try:  # only a reader with one thread says which row it is; it counts the header
        return pa.csv.read_csv(file, pa.csv.ReadOptions(use_threads=False), _CSV_OPTIONS, options)
    except pa.ArrowInvalid as error:
        detail = re.sub(r"Row #(\d+)", lambda match: f"row {int(match[1]) - 1}", str(error))
        raise UserError(f"{uri}: {detail}") from error


def _read_jsonl(uri: str, file: IO[bytes], names: Collection[str]) -> pa.Table:
    text_columns = pa.schema([(name, pa.string()) for name in names])
    options = pa.json.ParseOptions(explicit_schema=text_columns, unexpected_field_behavior="ignore")
    try:
        return pa.json.read_json(file, _JSON_OPTIONS, options)
    except pa.ArrowInvalid:
        file.seek(0)
        _raise_at_first_bad_line(uri, file, names)
        raise


def _raise_at_first_bad_line(uri: str, file: IO[bytes], names: Collection[str]) -> None:
    for number, line in enumerate(filter(bytes.strip, file), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{uri}, row {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{uri}, row {number} is no JSON object: {row!r:.80}")
        for name in names:
            if not isinstance(row.get(name), str | None):
                raise UserError(f"{uri}, column {name!r}, row {number}: text is needed, got {row[name]!r:.80}")


def _check(where: str, field: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as text; empty cells of optional fields as nulls."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"{where}, row 1: text is needed, got {column[0].as_py()!r:.80} (the column is of type {kind})")
    column = column.cast(pa.string())
    empty = pc.equal(pc.utf8_trim_whitespace(column), "")
    if field in _REQUIRED:
        _require(where, pc.is_valid(column), column, "is null")
        _require(where, pc.invert(empty), column, "is empty")
    else:
        column = pc.if_else(empty, None, column)
    if field == "url":
        _require(where, pc.invert(pc.match_substring_regex(column, _BLANK)), column, "has a blank or control character")
    if field == "sha256":
        _require(where, pc.fill_null(pc.match_substring_regex(column, _SHA256), True), column, "is no SHA-256 in hex")
        column = pc.utf8_lower(column)
    return column


def _require(where: str, good: pa.ChunkedArray, column: pa.ChunkedArray, fault: str) -> None:
    first_bad = pc.index(good, False).as_py()
    if first_bad >= 0:
        raise UserError(f"{where}, row {first_bad + 1}: {column[first_bad].as_py()!r:.200} {fault}")


def _complete(columns: dict[str, pa.ChunkedArray]) -> pa.Table:
    """All fields of `SCHEMA`; the host stands in for a missing source."""
    url = columns["url"]
    for field in SCHEMA.names:
        columns.setdefault(field, pa.chunked_array([pa.nulls(len(url), pa.string())]))
    host = pc.struct_field(pc.extract_regex(url, _HOST), "host")
    columns["source"] = pc.coalesce(columns["source"], pc.utf8_lower(host), pa.scalar("unknown"))
    return pa.table({field: columns[field] for field in SCHEMA.names}, schema=SCHEMA)


def fold(table: pa.Table) -> pa.Table:
    """Keep the first row of every (url, caption), and the order."""
    numbered = table.select(["url", "caption"]).append_column("row", pa.array(np.arange(table.num_rows)))
    first = numbered.group_by(["url", "caption"]).aggregate([("row", "min")])
    return table.take(first["row_min"].sort()) if first.num_rows < table.num_rows else table
