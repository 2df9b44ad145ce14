"""Reading of images from the user's storage: files of a folder, and bytes in parquet files, tars and Lance tables.

A row whose image is not fetched by URL refers to it by `member`, a URL relative to the `folder` that the user gave:

    cups/blue%20cup.png                   a file
    00000.tar?offset=1536&size=40213      a part of a file
    train-0.parquet?row=12&column=image   a cell of a parquet file
    ?row=12&column=image&version=3        a cell of a Lance table, which is the folder itself
"""

import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from imagerag.corpus.guard import FetchError, Reason
from imagerag.errors import UserError

if TYPE_CHECKING:
    import lance

_BATCH_ROWS = 32  # images decoded from a parquet file at a time
BUFFER_BYTES = 2**20
"""Bytes read from a file at a time: a parquet column of images may be larger than memory."""


def member_of(path: str, **query: str | int) -> str:
    """Return the `member` of an image, in the form that this module's docstring shows."""
    return quote(path) + (f"?{urlencode(query)}" if query else "")


def is_read_in_order(member: str) -> bool:
    """Return whether an image is a cell of a parquet file, which is read by one thread, in file order.

    A Lance table finds a row without reading those before it.
    """
    query = dict(parse_qsl(urlsplit(member).query))
    return "row" in query and "version" not in query


class FolderOpener:
    """The images of a folder, opened with the same interface as URLs by `opener.guarded_opener`."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._fs, self._root = fsspec.core.url_to_fs(folder)
        self._column = cache(self._open_column)  # a file is opened once for all of its rows
        self._opening = Lock()

    def open(self, member: str | None, timeout: float | None = None) -> "Stored":
        """Open an image. `timeout` is ignored, because the user's own storage is trusted.

        Raises:
            FetchError: if there is no such image, or it lies outside the folder.
        """
        try:
            parts = urlsplit(member or "")
            path, query = unquote(parts.path), dict(parse_qsl(parts.query))
            if "row" in query:
                with self._opening:
                    column = self._column(path, query["column"], query.get("version"))
                image = column(int(query["row"]))
                return Stored(len(image), lambda _: image, self._max_bytes)
            if "offset" in query:
                start, size = int(query["offset"]), int(query["size"])
                path = f"{self._root}/{path}"
                return Stored(
                    size,
                    lambda most: self._fs.cat_file(path, start=start, end=start + min(size, most)),
                    self._max_bytes,
                )
            if isinstance(self._fs, LocalFileSystem):
                return _open_local(Path(self._root), path, self._max_bytes)
            file = self._fs.open(f"{self._root}/{path}", "rb")
            return Stored(file.size, file.read, self._max_bytes, file.close)
        except (OSError, pa.ArrowException, ValueError, LookupError) as error:
            raise _unreadable(error) from error

    def _open_column(self, path: str, column: str, version: str | None) -> Callable[[int], bytes]:
        if version is not None:
            table = open_table(self._folder, int(version))
            return lambda row: _image(image_bytes(table.take([row], columns=[column])[column].combine_chunks()), 0)
        return _ParquetColumn(self._fs.open(f"{self._root}/{path}", "rb"), column)


@dataclass
class Stored:
    """An open image, with the interface of a response."""

    length: int
    """Its size in bytes."""
    _read: Callable[[int], bytes]
    """Returns the given number of bytes, or all if there are fewer."""
    _max_bytes: int
    _close: Callable[[], None] = lambda: None
    deadline: float = math.inf
    headers: Message = field(default_factory=Message)

    def read(self) -> bytes:
        """Return the whole image."""
        too_many = FetchError(Reason.TOO_MANY_BYTES, f"more than {self._max_bytes} bytes")
        if self.length > self._max_bytes:
            raise too_many
        try:
            content = self._read(self._max_bytes + 1)
        except (OSError, ValueError) as error:
            raise _unreadable(error) from error
        if len(content) > self._max_bytes:
            raise too_many
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _open_local(root: Path, name: str, max_bytes: int) -> Stored:
    """Open a regular file of a folder on this machine."""
    path = root / name
    resolved = path.resolve(strict=True)
    if not resolved.is_relative_to(root):
        raise FetchError(Reason.OUTSIDE_FOLDER, f"{path} leads to {resolved}")
    # The checked path may become a link or a pipe before it is opened: do not follow or wait for these.
    file = open(os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # noqa: PTH123, SIM115
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise FetchError(Reason.UNREADABLE_FILE, "no regular file")
    return Stored(status.st_size, file.read, max_bytes, file.close)


def _unreadable(error: Exception) -> FetchError:
    return FetchError(Reason.UNREADABLE_FILE, getattr(error, "strerror", None) or str(error) or type(error).__name__)


class _ParquetColumn:
    """A column of images, read by row number.

    A row group may be larger than memory, and parquet can reach a row only by reading those before it: rows are read in
    small batches, and the last batch is kept. An earlier row costs reading its row group from the beginning again.
    """

    def __init__(self, file: Any, column: str) -> None:
        self._parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES)
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes)
        self._name = column
        self._leaf = image_leaf(self._parquet.schema_arrow.field(column))
        self._kept: pa.Array = pa.array([], pa.binary())
        self._next = -1  # first row of the next batch, which follows those kept
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._lock = Lock()

    def __call__(self, row: int) -> bytes:
        with self._lock:
            return self._find(row)

    def _find(self, row: int) -> bytes:
        while not self._next - len(self._kept) <= row < self._next:
            group = int(np.searchsorted(self._ends, row, "right"))
            if group == len(self._ends):
                raise LookupError(f"there is no row {row}")
            start = int(self._ends[group - 1]) if group else 0
            if not start <= self._next <= row:
                self._kept, self._next = self._kept[:0], start
                self._batches = self._parquet.iter_batches(
                    _BATCH_ROWS, row_groups=range(group, len(self._ends)), columns=[self._leaf]
                )
            batch = next(self._batches)
            self._kept = image_bytes(batch.column(self._name))
            self._next += batch.num_rows
        return _image(self._kept, row - self._next + len(self._kept))


def _image(images: pa.Array, row: int) -> bytes:
    image: bytes | None = images[row].as_py()
    if image is None:
        raise LookupError("the row has no image")
    return image


def open_table(uri: str, version: int | None = None) -> "lance.LanceDataset":
    """Open a Lance table, a folder named `….lance` as in LanceDB.

    Raises:
        UserError: if there is no readable table.
    """
    import lance

    try:
        return lance.dataset(uri, version=version)
    except (ValueError, OSError) as error:
        raise UserError(f"{uri} is no Lance table that can be read: {error}") from error


def image_leaf(column: pa.Field) -> str:
    """Return the parquet path of the bytes in a column of images."""
    return f"{column.name}.bytes" if pa.types.is_struct(column.type) else str(column.name)


def image_bytes(images: pa.Array) -> pa.Array:
    """Return the bytes of a column of images: the column itself, or field `bytes` of Hugging Face's structs."""
    return pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
