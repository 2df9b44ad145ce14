"""Reading of lists in all formats, in batches of rows: text files, tables, tars, and folders or globs of these.

A row has the URL of an image, or contains the image itself.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from imagerag.corpus.packed import Part, is_binary, is_image_column, located, read_samples, web_urls
from imagerag.corpus.records import BATCH_ROWS, Batch, Choose, as_batch, read_csv, read_json, read_lines
from imagerag.corpus.sniff import HEAD_BYTES, seems
from imagerag.corpus.stores import BUFFER_BYTES, image_leaf, open_table
from imagerag.errors import UserError

_TEXT_FORMATS = ("csv", "tsv", "txt", "json", "jsonl")
_TABLE = ".lance"
_FIRST = (".tar", ".parquet")  # formats that take precedence in a folder, in this order
FORMATS = (".parquet", *(f".{name}{packed}" for name in _TEXT_FORMATS for packed in ("", ".gz", ".zst")), ".tar")
FORMS = f"file, or a folder or a glob of files, named {', '.join(FORMATS)}, or a Lance table, named {_TABLE}"
"""Description of what a list can be, for messages."""

_BATCH_IMAGES = 64
_NUM_NAMES = 5  # names listed in a message
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def read_batches(uri: str, what: str, choose: Choose) -> Iterator[Batch]:
    """Yield the rows of a file or Lance table, or of all files in a folder or glob.

    Args:
        what: kind of file, for messages.
        choose: called for the columns of every file.

    Raises:
        UserError: if it is missing, or not of the format that its name says.
    """
    with _named_errors(uri, what):
        parts = _parts(uri, what)
    for part in parts:
        with _named_errors(part.uri, what):
            if is_table(part.uri):
                yield from _read_lance(part, choose)
                continue
            suffix = next(each for each in sorted(FORMATS, key=len, reverse=True) if part.uri.lower().endswith(each))
            with _opened(part.uri, suffix) as stream:
                yield from _read_file(part, suffix, stream, choose)


def _read_file(part: Part, suffix: str, stream: IO[bytes], choose: Choose) -> Iterator[Batch]:
    if suffix == ".parquet":
        return _read_parquet(part, stream, choose)
    if suffix == ".tar":
        return _read_tar(part, stream, choose)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")  # with universal newlines
    match suffix.split(".")[1]:
        case "txt":
            return read_lines(text, choose)
        case "json" | "jsonl":
            return read_json(part.uri, text, choose)
        case kind:
            return read_csv(text, "\t" if kind == "tsv" else None, choose)


def folder_of(uri: str) -> str:
    """Return the folder that `Part.member` is relative to, as a path or URI; for a Lance table, the table itself."""
    fs, path = fsspec.core.url_to_fs(uri)
    return _uri(fs, _root_of(fs, path))


def is_folder(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Return whether a path is a folder. HTTP has no folders, and the check would request the whole file."""
    return "http" not in fs.protocol and bool(fs.isdir(path))


def _root_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    if is_folder(fs, path):
        return path.rstrip("/")
    is_file = "http" in fs.protocol or fs.isfile(path)
    return (path if is_file else re.split(r"[*?[]", path)[0]).rpartition("/")[0]


def _uri(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def _parts(uri: str, what: str) -> list[Part]:
    """Return the files that `uri` refers to, in order. In a folder, only tars are read, else parquet, else text."""
    if is_table(uri):
        return [Part(uri.rstrip("/"), "")]
    fs, path = fsspec.core.url_to_fs(uri)
    is_list = uri.lower().endswith(FORMATS) and not is_folder(fs, path)  # Spark names its folders like files
    is_glob = re.search(r"[*?[]", uri) is not None and not is_folder(fs, path)
    if is_list and (not is_glob or fs.isfile(path)):  # a file name may contain brackets
        return [Part(uri, path.rpartition("/")[2])]
    root = _root_of(fs, path)
    names = sorted(found[len(root) + 1 :] for found in (fs.glob(path) if is_glob else fs.find(path)))
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    parts = [name for name in visible if is_part(name)]
    if not is_glob:
        parts = next(filter(None, ([it for it in parts if it.lower().endswith(kind)] for kind in _FIRST)), parts)
    if not parts:
        has = f"; it has {some_of(visible)}" if visible else ""
        raise UserError(f"a {what} is a {FORMS}; got {uri}{has}")
    return [Part(_uri(fs, f"{root}/{name}"), name) for name in parts]


def is_part(name: str) -> bool:
    """Return whether a file in a folder may be part of a list; files inside a Lance table may not."""
    return name.lower().endswith(FORMATS) and f"{_TABLE}/" not in name


def is_table(uri: str) -> bool:
    """Return whether a path is named like a Lance table."""
    return uri.rstrip("/").endswith(_TABLE)


def some_of(names: Sequence[str]) -> str:
    """Return the first names, and the number of further ones."""
    more = f" and {len(names) - _NUM_NAMES:,} more" if len(names) > _NUM_NAMES else ""
    return f"{', '.join(map(repr, names[:_NUM_NAMES]))}{more}"


@contextmanager
def _opened(uri: str, suffix: str) -> Iterator[Any]:
    """Open a file decompressed, after a check of its type by its first bytes."""
    with fsspec.open(uri, "rb") as file:
        compression = next((name for end, name in _COMPRESSIONS.items() if suffix.endswith(end)), None)
        packed = suffix.removeprefix(".") if suffix in (".parquet", ".tar") else None
        _check_kind(uri, file, {compression or packed})
        if compression is None:
            yield file
            return
        with pa.CompressedInputStream(pa.PythonFile(file, "r"), compression) as unpacked:
            yield unpacked


def _check_kind(uri: str, file: IO[bytes], wanted: set[str | None]) -> None:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    kind = seems(head)
    if None in wanted:  # text, even with stray control characters or in another encoding
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
    except (OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException, ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{uri} is not readable as the list that its name says: {error}") from error


def _read_parquet(part: Part, file: IO[bytes], choose: Choose) -> Iterator[Batch]:
    parquet = pa.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES)
    schema = parquet.schema_arrow

    def read(names: Sequence[str], image: str | None) -> Iterator[pa.RecordBatch]:
        leaves = [*names, *([image_leaf(schema.field(image))] if image else [])]
        return parquet.iter_batches(columns=leaves, batch_size=_BATCH_IMAGES if image else BATCH_ROWS)  # type: ignore[no-any-return]

    return _read_table(part, schema, read, choose)


def _read_lance(part: Part, choose: Choose) -> Iterator[Batch]:
    table = open_table(part.uri)

    def read(names: Sequence[str], image: str | None) -> Iterator[pa.RecordBatch]:
        columns = list(dict.fromkeys([*names, *([image] if image else [])]))
        scanner = table.scanner(columns=columns, batch_size=_BATCH_IMAGES if image else BATCH_ROWS, scan_in_order=True)
        return scanner.to_batches()  # type: ignore[no-any-return]

    return _read_table(part, table.schema, read, choose, version=table.version)


def _read_table(
    part: Part,
    schema: pa.Schema,
    read: Callable[[Sequence[str], str | None], Iterator[pa.RecordBatch]],
    choose: Choose,
    version: int | None = None,
) -> Iterator[Batch]:
    """Yield the rows of a table: with URLs, or with image locations if it has a column of images.

    Args:
        read: takes the names of the text columns and of the column of images, and returns the table's batches.
        version: version of a Lance table.
    """
    images = {it.name: is_image_column(it.type) for it in schema if is_binary(it.type) or is_image_column(it.type)}
    names = choose(schema.names, images)
    image = names.pop("image", None)
    kinds = {field: schema.field(name).type for field, name in names.items()}
    for field, kind in kinds.items():
        if not _is_text(kind) and not (field == "caption" and _is_list(kind) and _is_text(kind.value_type)):
            raise UserError(f"{part.uri}, column {names[field]!r}: text is needed, the column is of type {kind}")
    first = 0
    for batch in read(list(names.values()), image):
        columns = {
            field: batch.column(name).cast(pa.list_(pa.string()) if _is_list(kinds[field]) else pa.string())
            for field, name in names.items()
        }
        faults = pa.nulls(batch.num_rows, pa.string())
        if image is not None:
            columns, faults = located(part, columns, batch.column(image), first=first, column=image, version=version)
        first += batch.num_rows
        yield Batch(columns, faults)


def _read_tar(part: Part, file: IO[bytes], choose: Choose) -> Iterator[Batch]:
    samples = read_samples(part, file)
    seen: dict[str, None] = {}
    while some := list(islice(samples, BATCH_ROWS)):
        seen |= dict.fromkeys(chain.from_iterable(sample.row for sample in some))
        names = choose([*seen, "image"], {"image": True})
        names.pop("image")
        batch = as_batch([sample.row for sample in some], [sample.fault for sample in some], names)
        stored = {
            name: pa.array([getattr(sample, name) for sample in some], pa.string()) for name in ("member", "sha256")
        }
        urls = web_urls(batch.columns.get("url"), [sample.url for sample in some])
        yield Batch(batch.columns | stored | {"url": urls}, batch.faults)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
