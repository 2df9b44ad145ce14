"""Rows that contain their images: cells of a table, or samples of a webdataset tar. Lists refer to images by location.

The bytes are not copied; each image is read once for its SHA-256, so that a changed image is a changed row.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from imagerag.corpus.stores import BUFFER_BYTES, image_bytes, member_of

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
)
"""File name suffixes of images, including formats that are not decoded: these are counted as failures, not ignored."""

_WEB_URL = r"^https?://"
_MAX_TEXT_BYTES = 2**20  # limit of a sample's caption or JSON


@dataclass(frozen=True)
class Part:
    """A file of a list, or a table."""

    uri: str
    member: str
    """Its path relative to the list's folder."""

    @property
    def url(self) -> str:
        """`uri` as a URL, even if it is a local path."""
        return self.uri if "://" in self.uri else Path(self.uri).absolute().as_uri()


def is_image_column(kind: pa.DataType) -> bool:
    """Return whether a column holds images as Hugging Face's datasets store them: structs of `bytes` and `path`."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type)


def is_binary(kind: pa.DataType) -> bool:
    """Return whether a column holds binary values, which may be images."""
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def located(
    part: Part, texts: Mapping[str, pa.Array], images: pa.Array, *, first: int, column: str, version: int | None = None
) -> tuple[dict[str, pa.Array], pa.Array]:
    """Add the locations of their images to rows of a table; also return the fault of each row, null if valid.

    Args:
        part: the table.
        texts: the rows' other fields. A row's web URL is kept as the image's URL; otherwise its URL is the location.
        images: the column of images.
        first: number of the first row in the table.
        column: name of the column of images.
        version: version of a Lance table.
    """
    images = image_bytes(images)
    rows = range(first, first + len(images))
    query = {"column": column} | ({} if version is None else {"version": version})
    places = [f"{part.url}#row={row}" for row in rows]
    columns = dict(texts) | {
        "url": web_urls(texts.get("url"), places),
        "member": pa.array([member_of(part.member, row=row, **query) for row in rows], pa.string()),
        "sha256": pa.array([_sha256([image.as_buffer()]) if image.is_valid else None for image in images], pa.string()),
    }
    is_missing = pc.fill_null(pc.equal(pc.binary_length(images), 0), True)
    faults = pc.if_else(is_missing, f"has no bytes in {column!r}", pa.scalar(None, pa.string()))
    return columns, faults


def web_urls(urls: pa.Array | None, places: Sequence[str]) -> pa.Array:
    """Return the web URLs of images, or the locations of images that have none."""
    place = pa.array(places, pa.string())
    if urls is None:
        return place
    return pc.if_else(pc.fill_null(pc.match_substring_regex(urls, _WEB_URL), False), urls, place)


def _sha256(pieces: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


@dataclass
class Sample:
    """The entries of a tar with the same key."""

    row: dict[str, Any]
    """The fields of its JSON file, and its caption."""
    url: str = ""
    member: str | None = None
    sha256: str | None = None
    fault: str | None = None


def read_samples(part: Part, file: IO[bytes]) -> Iterator[Sample]:
    """Yield the samples of a webdataset tar: consecutive entries whose names are equal up to the first dot.

    Nothing is extracted to disk, so names are never used as paths. Links, devices and sparse files count as faults.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for _, entries in groupby(filter(lambda entry: not entry.isdir(), tar), lambda entry: _key_and_kind(entry)[0]):
            sample = Sample({})
            for entry in entries:
                _add(sample, part, tar, entry)
            if sample.member is None and sample.fault is None:
                sample.fault = f"has no image: {entry.name!r:.80}"
            yield sample


def _key_and_kind(entry: tarfile.TarInfo) -> tuple[str, str]:
    folder, slash, name = entry.name.rpartition("/")
    stem, dot, kind = name.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{kind}".lower()


def _add(sample: Sample, part: Part, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
    """Add a tar entry to its sample."""
    kind = _key_and_kind(entry)[1]
    if kind not in (".txt", ".json", *SUFFIXES):
        return
    file = tar.extractfile(entry) if entry.isreg() and not entry.issparse() else None
    if file is None:
        sample.fault = f"is no regular file: {entry.name!r:.80}"
    elif kind not in SUFFIXES:
        try:
            _add_text(sample, kind, file.read(_MAX_TEXT_BYTES + 1))
        except (ValueError, RecursionError) as error:
            sample.fault = f"has a {kind} that can't be read ({error}): {entry.name!r:.80}"
    elif sample.member is not None:
        sample.fault = f"has more than one image: {entry.name!r:.80}"
    else:
        sample.member = member_of(part.member, offset=entry.offset_data, size=entry.size)
        sample.url = f"{part.url}#{quote(entry.name, errors='surrogateescape')}"
        sample.sha256 = _sha256(iter(lambda: file.read(BUFFER_BYTES), b""))


def _add_text(sample: Sample, kind: str, content: bytes) -> None:
    if len(content) > _MAX_TEXT_BYTES:
        raise ValueError(f"more than {_MAX_TEXT_BYTES} bytes")
    text = content.decode("utf-8-sig")
    if kind == ".txt":
        sample.row["caption"] = text
        return
    told = json.loads(text)
    if not isinstance(told, dict):
        raise ValueError("no object")
    # The JSON's SHA-256 is that of the file as it was fetched, which may differ from the file in the tar.
    sample.row = {name: value for name, value in told.items() if name != "sha256"} | sample.row
