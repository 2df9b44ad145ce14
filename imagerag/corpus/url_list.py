"""Reading and validation of image URL lists: valid rows in normalised form, and counts of bad rows with reasons.

A bad row is not an error: it is counted, with its reason. A bad list is an error: a file that is not of the format that
its name says, a missing column, or more bad rows than allowed.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from imagerag.config import Config
from imagerag.corpus.forms import folder_of, read_batches
from imagerag.corpus.records import Batch, exploded
from imagerag.errors import UserError
from imagerag.plain import printable
from imagerag.storage.spool import Spool, distinct

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("url", "caption", "source", "licence", "sha256", "folder", "member")]
)
"""Schema of a validated list: `source` defaults to the URL's host; `licence` and `sha256` may be null.

An image that is read from the user's storage rather than fetched by URL is `member` of `folder` (see `stores`); both
are null for all other rows. As they give access to files, they are never taken from columns of a list.
"""

_REQUIRED = ("url", "file", "caption")
_URL_GUESSES = {"url": ("url", "image_url", "img_url", "image_link", "link", "uri")}
_IMAGE_GUESSES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_OTHER_GUESSES = {
    "caption": ("caption", "text", "txt", "alt", "alt_text", "title", "description", "name"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "sha256": ("sha256", "image_sha256"),
}
_SPACE = r"^[\x00-\x20\x7f-\xa0\p{Z}\x{200b}\x{feff}]+|[\x00-\x20\x7f-\xa0\p{Z}\x{200b}\x{feff}]+$"
_CONTROL = r"[\x00-\x1f\x7f-\x9f]"
_SCHEME = r"^[A-Za-z][A-Za-z0-9+.-]*://"
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?(?P<host>\[[^\]]*\]|[^/?#:]+)"
_SHA256 = r"^[0-9a-fA-F]{64}$"
_MAX_URL_BYTES = 8_192  # servers refuse longer ones
_MAX_CAPTION_BYTES = 64 * 2**10
_NUM_EXAMPLES = 5
_HOPELESS_ROWS = 100_000
"""A list that begins with as many bad rows is not read further. With fewer, it may be sorted, the bad ones first."""


class UrlColumns(Config):
    """Columns of a list to read. Columns that are not given are guessed by their usual names, ignoring case."""

    url: str | None = Field(
        default=None, description="Column of the image URLs; in a captions file for a folder, column of the file names."
    )
    caption: str | None = Field(default=None, description="Column of the captions.")
    source: str | None = Field(default=None, description="Column of the images' origins (optional).")
    licence: str | None = Field(default=None, description="Column of the images' licences (optional).")
    sha256: str | None = Field(default=None, description="Column of the image files' SHA-256 (optional).")
    image: str | None = Field(
        default=None, description="Column of a parquet file or Lance table that contains the images (optional)."
    )


class BadRows(Config):
    """How a list's bad rows are handled."""

    on_bad_row: Literal["keep_count", "stop"] = Field(
        default="keep_count", description="Count bad rows and continue with the others, or stop at the first one."
    )
    max_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Maximum share of a list's bad rows; above it (probably a wrong column), a run stops before "
        f"fetching. Below 1, a list that begins with {_HOPELESS_ROWS:,} bad rows is not read to its end.",
    )


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """The valid rows of a list, without duplicates of (url, caption)."""

    rows: Spool
    """Columns as in `SCHEMA`, rows in the order of the list."""
    num_duplicates: int = 0
    """Number of rows dropped because an earlier row has the same URL and caption."""
    num_named_by_file: int = 0
    """Number of rows whose caption is made of the file name, because there is no other."""
    num_invalid: int = 0
    """Number of bad rows."""
    invalid: tuple[str, ...] = ()
    """Messages about the first bad rows."""

    @property
    def num_rows(self) -> int:
        """Number of rows in the list; a row with several captions counts as several."""
        return self.rows.num_rows + self.num_duplicates + self.num_invalid


@dataclass
class Count:
    """Number of rows in a file, number of bad rows, and messages about the first bad ones."""

    uri: str
    policy: BadRows
    num_rows: int = 0
    num_invalid: int = 0
    invalid: list[str] = field(default_factory=list)

    def refuse(self, what: Iterable[str]) -> None:
        """Count bad rows, each described by a line."""
        for line in what:
            if self.policy.on_bad_row == "stop":
                raise UserError(f"{self.uri}, {line}; `on_bad_row` is stop")
            self.num_invalid += 1
            if len(self.invalid) < _NUM_EXAMPLES:
                self.invalid.append(printable(line))

    def add(self, part: "Count") -> None:
        """Add the counts of another file."""
        self.num_rows += part.num_rows
        self.num_invalid += part.num_invalid
        self.invalid = (self.invalid + part.invalid)[:_NUM_EXAMPLES]

    def check_start(self) -> None:
        """Raise a UserError if many rows were read, and all of them are bad."""
        if self.num_rows >= _HOPELESS_ROWS and self.num_rows == self.num_invalid:
            self._check_share()

    def check_whole(self) -> None:
        """Raise a UserError if, of all rows, too large a share is bad, or none is good."""
        self._check_share()
        if self.num_rows == self.num_invalid:
            raise UserError(f"{self.uri} has no rows that could be used")

    def _check_share(self) -> None:
        if self.num_invalid > self.policy.max_share * self.num_rows:
            first = "; ".join(self.invalid[:2])
            raise UserError(
                f"{self.uri}: {self.num_invalid:,} of {self.num_rows:,} rows are bad, more than the "
                f"{self.policy.max_share:.0%} that `bad_rows.max_share` allows; the first: {first}"
            )


def read_url_list(uri: str, columns: UrlColumns | None = None, bad_rows: BadRows | None = None) -> UrlList:
    """Read and validate a whole list. Messages number rows from 1 in every table, without the header.

    URLs and captions are stripped, and `&amp;` in URLs becomes `&`. A row with a list of captions becomes one row per
    caption. A row that contains its image is not fetched; its URL is its web URL, if any, or else the image's location.

    Raises:
        UserError: if the file is missing, unreadable or not of the format that its name says, lacks a URL or caption
            column, has no rows, or has more bad rows than `bad_rows` allows: rows with a missing or invalid URL or
            caption, or an invalid SHA-256.
    """
    named = (columns or UrlColumns()).model_dump(exclude_none=True)
    count, folder = Count(uri, bad_rows or BadRows()), cache(lambda: folder_of(uri))
    good = read_columns(count, "URL list", _URL_GUESSES, named)
    rows = Spool(SCHEMA)
    for part in distinct(_complete(part, folder) for part in good):
        rows.append(part)
    count.check_whole()
    return UrlList(
        rows=rows,
        num_duplicates=count.num_rows - count.num_invalid - rows.num_rows,
        num_invalid=count.num_invalid,
        invalid=tuple(count.invalid),
    )


def read_columns(
    count: Count, what: str, guesses: Mapping[str, Collection[str]], named: Mapping[str, str]
) -> Iterator[pa.Table]:
    """Yield the valid rows of a table, with columns named by field, and count all rows.

    The caller checks the share of bad rows, when it has read all tables of a list.

    Args:
        count: has the table's URI (see `forms.read_batches`), and is updated.
        what: kind of file, for messages.
        guesses: usual names of the column that identifies images, in addition to the columns of all lists.
        named: columns by field, given rather than guessed.

    Raises:
        UserError: see `read_url_list`.
    """
    fields = [*guesses, *_OTHER_GUESSES]
    first = 1

    def choose(found: Sequence[str], images: Mapping[str, bool]) -> dict[str, str]:
        return _choose(count.uri, found, images, {**guesses, **_OTHER_GUESSES}, named)

    for batch in read_batches(count.uri, what, choose):
        several, parents = exploded(batch)
        columns, faults = _judge(several, fields)
        count.num_rows += len(faults)
        bad = pc.indices_nonzero(pc.is_valid(faults))
        count.refuse(
            f"row {first + parent} {fault}"
            for parent, fault in zip(parents.take(bad).to_pylist(), faults.take(bad).to_pylist(), strict=True)
        )
        count.check_start()
        first += len(batch.faults)
        yield pa.table(columns).filter(pc.is_null(faults))
    if not count.num_rows:
        raise UserError(f"{count.uri} has no rows")


def _choose(
    uri: str,
    found: Sequence[str],
    images: Mapping[str, bool],
    guesses: Mapping[str, Collection[str]],
    named: Mapping[str, str],
) -> dict[str, str]:
    """Return the column of each field: the given one, or else the first of the field's usual names that exists."""
    by_usual_name = {column.lower(): column for column in reversed(found)}
    image = _choose_image(uri, found, images, named.get("image")) if "url" in guesses else None
    chosen = {} if image is None else {"image": image}
    for name, usual in guesses.items():
        column = named.get(name) or next((by_usual_name[each] for each in usual if each in by_usual_name), None)
        if column is None and name in _REQUIRED and not (name == "url" and image is not None):
            raise UserError(f"{uri} has no column that looks like {name!r}: say which of its columns {found} it is")
        if column is not None and found.count(column) != 1:
            raise UserError(f"{uri} has {found.count(column)} columns {column!r} instead of 1; it has {found}")
        if column is not None:
            chosen[name] = column
    return chosen


def _choose_image(uri: str, found: Sequence[str], images: Mapping[str, bool], named: str | None) -> str | None:
    """Return the column that contains the images, if there is one."""
    if named is not None:
        if named not in images:
            raise UserError(f"{uri} has no column {named!r} of images: of its columns {found}, {[*images]} have bytes")
        return named
    by_usual_name = {column.lower(): column for column in reversed([*images])}
    sure = [column for column, is_sure in images.items() if is_sure]
    usual = next((by_usual_name[each] for each in _IMAGE_GUESSES if each in by_usual_name), None)
    if usual is None and len(sure) > 1:
        raise UserError(f"{uri} has several columns of images, {sure}: say which of them is `image`")
    return usual or next(iter(sure), None)


def _judge(batch: Batch, fields: Collection[str]) -> tuple[dict[str, pa.Array], pa.Array]:
    """Return the normalised texts of `fields`, and the fault of each row, null for valid rows."""
    faults = batch.faults
    columns = {}
    for name in fields:
        column = batch.columns.get(name, pa.nulls(len(faults), pa.string()))
        column = pc.replace_substring_regex(column, _SPACE, "")
        if name == "url":
            column = pc.replace_substring(column, "&amp;", "&")
        for is_bad, fault in _rules(name, column):
            told = pc.binary_join_element_wise(
                f"has a {name} that {fault}: '", pc.utf8_slice_codeunits(column, 0, 80), "'", ""
            )
            told = pc.if_else(pc.equal(pc.fill_null(column, ""), ""), f"has a {name} that {fault}", told)
            faults = pc.if_else(pc.and_(pc.is_null(faults), pc.fill_null(is_bad, False)), told, faults)
        columns[name] = column if name in _REQUIRED else pc.if_else(pc.equal(column, ""), None, column)
    columns["sha256"] = pc.utf8_lower(columns["sha256"])
    columns["member"] = batch.columns.get("member", pa.nulls(len(faults), pa.string()))
    return columns, faults


def _rules(name: str, column: pa.Array) -> Sequence[tuple[pa.Array, str]]:
    """Return the rules for a column, each as a mask of the cells that break it and a description of the fault."""
    if name == "sha256":
        is_none = pc.and_(pc.not_equal(column, ""), pc.invert(pc.match_substring_regex(column, _SHA256)))
        return [(is_none, "is no SHA-256 in hex")]
    if name not in _REQUIRED:
        return []
    rules = [(pc.is_null(column), "is missing"), (pc.equal(column, ""), "is empty")]
    if name == "caption":
        rules.append((pc.greater(pc.binary_length(column), _MAX_CAPTION_BYTES), f"has over {_MAX_CAPTION_BYTES} bytes"))
    if name == "url":
        rules += [
            (pc.greater(pc.binary_length(column), _MAX_URL_BYTES), f"has over {_MAX_URL_BYTES} bytes"),
            (pc.match_substring_regex(column, _CONTROL), "has a control character"),
            (pc.invert(pc.match_substring_regex(column, _SCHEME)), "begins with no scheme://"),
        ]
    return rules


def _complete(rows: pa.Table, folder_of_list: Callable[[], str]) -> pa.Table:
    """Return rows with all fields of `SCHEMA`; a missing source becomes the host or the folder's name."""
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    url, is_member = columns["url"], pc.is_valid(columns["member"])
    folder = folder_of_list() if pc.any(is_member).as_py() else None
    columns["folder"] = pc.if_else(is_member, pa.scalar(folder, pa.string()), None)
    host = pc.struct_field(pc.extract_regex(url, _HOST), "host")
    name = (folder or "").rpartition("/")[2] or "unknown"
    columns["source"] = pc.coalesce(columns["source"], pc.utf8_lower(host), pa.scalar(name))
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)
