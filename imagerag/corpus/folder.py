"""Reading of a folder of images, local or on any fsspec file system: every image becomes a row.

Its URL is that of the file (`file:///…`, `s3://…`), and its expected SHA-256 that of the current file, so a changed
file is a changed row.
"""

import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, Protocol
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from imagerag.corpus.forms import some_of
from imagerag.corpus.packed import SUFFIXES
from imagerag.corpus.stores import BUFFER_BYTES, member_of
from imagerag.corpus.url_list import SCHEMA, BadRows, Count, UrlColumns, UrlList, read_columns
from imagerag.errors import UserError
from imagerag.progress import OnProgress, silent
from imagerag.storage.digests import sha256_of
from imagerag.storage.spool import Spool, first_of_each

_FILE_GUESSES = {"file": ("file", "file_name", "filename", "file_path", "filepath", "path", "image", "image_path")}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as in Hugging Face's `imagefolder`
_MAX_CAPTION_BYTES = 64 * 2**10
_NUM_READERS = 32


class Folder(Protocol):
    """The visible files of a folder and its subfolders, by relative path."""

    root: str
    """Path on its file system."""
    uri: str
    """Path of a local folder, URI of any other."""
    files: list[str]

    def url_of(self, name: str) -> str:
        """Return the URL of a file."""

    def sha256_of(self, name: str) -> str:
        """Return the SHA-256 of a file."""

    def head_of(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file."""


def open_folder(uri: str) -> Folder:
    """List a folder.

    Raises:
        UserError: if it can't be read, or if one of its images or metadata files is not a regular file or lies outside.
    """
    fs, path = fsspec.core.url_to_fs(uri)
    return _LocalFolder(Path(path)) if isinstance(fs, LocalFileSystem) else _RemoteFolder(fs, path)


def images_of(folder: Folder) -> list[str]:
    """Return the names of the images in a folder."""
    return [name for name in folder.files if name.lower().endswith(SUFFIXES)]


def read_folder(
    folder: Folder,
    captions: str | None = None,
    columns: UrlColumns | None = None,
    on_progress: OnProgress = silent,
    bad_rows: BadRows | None = None,
) -> UrlList:
    """List every image in a folder and its subfolders, except hidden ones, with its caption.

    Args:
        folder: the folder; links in it must not lead out of it.
        captions: a table of file names, relative to the folder, and captions (optionally `source`, `licence`,
            `sha256`), with any number of rows per image. By default, `metadata.csv`, `.jsonl` and `.parquet` in the
            folders are such tables, as in Hugging Face's `imagefolder`. Without these, the caption of `name.jpg` is the
            text in `name.txt`, or else the words of its name.
        columns: columns of these tables; `url` is the column of file names.
        on_progress: progress callback, which counts images; each is read once for its SHA-256.
        bad_rows: how to handle rows of these tables that are invalid or name no image of the folder, and images without
            a row.

    Raises:
        UserError: if there are no images, if a file with a caption lies outside the folder, if captions are unreadable,
            or if there are more bad rows than `bad_rows` allows.
    """
    names = images_of(folder)
    if not names:
        raise UserError(f"{folder.uri} has no images: no file in it is named {', '.join(SUFFIXES)}")
    sha256s = _sha256s(folder, names, on_progress)
    tables = {name: os.path.dirname(name) for name in folder.files if name.rpartition("/")[2] in _METADATA}  # noqa: PTH120
    count = Count(folder.uri, bad_rows or BadRows())
    num_named_by_file = 0
    if captions is not None:
        rows = _read_captions(count, {captions: ""}, folder, sha256s, columns)
    elif tables:
        at = {f"{folder.uri}/{name}": place for name, place in tables.items()}
        rows = _read_captions(count, at, folder, sha256s, columns)
    else:
        files = set(folder.files)
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            texts = list(pool.map(lambda name: _text_beside(folder, name, files), names))
        num_named_by_file = texts.count(None)
        words = [text or _words(name) for text, name in zip(texts, names, strict=True)]
        rows = pa.table({"file": names, "caption": words})
    complete = _complete(rows, folder, sha256s)
    table = first_of_each(complete)
    return UrlList(
        rows=Spool.of(table),
        num_duplicates=complete.num_rows - table.num_rows,
        num_named_by_file=num_named_by_file,
        num_invalid=count.num_invalid,
        invalid=tuple(count.invalid),
    )


class _LocalFolder:
    """A folder on this machine; links must not lead out of it."""

    def __init__(self, folder: Path) -> None:
        self._root = folder.resolve()
        self.root = self.uri = str(self._root)
        self.files = self._find()

    def _find(self) -> list[str]:
        found: list[Path] = []
        unfit: list[Path] = []
        for place, folders, files in os.walk(self._root, onerror=_refuse_unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(place, name) for name in folders):
                if path.is_symlink() and not path.resolve().is_relative_to(self._root):  # inside, its target is listed
                    unfit.append(path)
            for path in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
                is_read = path.name.lower().endswith(SUFFIXES) or path.name in _METADATA
                fits = not is_read or (self._is_inside(path) and _is_utf8(path))
                (found if fits else unfit).append(path)
        images = any(path.name.lower().endswith(SUFFIXES) for path in found + unfit)
        if unfit and images:
            raise UserError(
                f"{self.uri} has what can't be read, {some_of([str(path.relative_to(self._root)) for path in unfit])}: "
                "links have to stay in the folder (or copy it by `cp -rL`), images and metadata have to be regular "
                "files, and names UTF-8"
            )
        return [str(path.relative_to(self._root)) for path in found]

    def _is_inside(self, path: Path) -> bool:
        """Return whether a path is a regular file in the folder, or a link to one; its parents must not be links."""
        mode = path.lstat().st_mode
        return stat.S_ISREG(mode) or (
            stat.S_ISLNK(mode) and path.is_file() and path.resolve().is_relative_to(self._root)
        )

    def url_of(self, name: str) -> str:
        return (self._root / name).as_uri()

    def sha256_of(self, name: str) -> str:
        try:
            return sha256_of(self._root / name)
        except OSError as error:
            _refuse_unreadable(error)

    def head_of(self, name: str, num_bytes: int) -> bytes:
        path = self._root / name
        if not self._is_inside(path):
            raise UserError(f"{path} has to be a regular file in {self.uri}")
        with path.open("rb") as file:
            return file.read(num_bytes)


class _RemoteFolder:
    """A folder on another file system, such as a prefix of an object store."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs, self.root = fs, path.rstrip("/")
        self.uri = str(fs.unstrip_protocol(self.root))
        try:
            names = [found[len(self.root) + 1 :] for found in fs.find(self.root)]
        except OSError as error:
            raise UserError(f"{self.uri} can't be read: {error}") from error
        self.files = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    def url_of(self, name: str) -> str:
        return f"{self.uri}/{quote(name)}"

    def sha256_of(self, name: str) -> str:
        digest = hashlib.sha256()
        try:
            with self._fs.open(f"{self.root}/{name}", "rb") as file:
                while piece := file.read(BUFFER_BYTES):
                    digest.update(piece)
        except OSError as error:
            raise UserError(f"{self.url_of(name)} can't be read: {error}") from error
        return digest.hexdigest()

    def head_of(self, name: str, num_bytes: int) -> bytes:
        with self._fs.open(f"{self.root}/{name}", "rb") as file:
            return bytes(file.read(num_bytes))


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} can't be read: {error.strerror}") from error


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_beside(folder: Folder, image: str, files: set[str]) -> str | None:
    """Return the text of `name.txt` next to the image, or None if there is no such file."""
    name = f"{os.path.splitext(image)[0]}.txt"  # noqa: PTH122
    if name not in files:
        return None
    try:
        text = folder.head_of(name, _MAX_CAPTION_BYTES + 1).decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder.uri}/{name} is not readable as text in UTF-8: {error}") from error
    if not text or len(text.encode()) > _MAX_CAPTION_BYTES:
        raise UserError(f"{folder.uri}/{name} has to hold a caption of 1 to {_MAX_CAPTION_BYTES} bytes")
    return text


def _words(name: str) -> str:
    stem = Path(name).stem
    return re.sub(r"[\s_+.-]+", " ", stem).strip() or stem


def _read_captions(
    count: Count, tables: Mapping[str, str], folder: Folder, sha256s: Mapping[str, str], columns: UrlColumns | None
) -> pa.Table:
    """Return the rows of tables of captions that belong to images of the folder, and count the others.

    Args:
        tables: the tables, each with the subfolder that its file names are relative to.
    """
    named = (columns or UrlColumns()).model_dump(exclude_none=True)
    if "url" in named:
        named["file"] = named.pop("url")
    parts: list[pa.Table] = []
    mentioned: set[str] = set()
    for uri, place in tables.items():
        of_table = Count(uri, count.policy)
        read = pa.concat_tables(read_columns(of_table, "captions file", _FILE_GUESSES, named))
        count.add(of_table)
        cells = read["file"].to_pylist()
        files = [os.path.relpath(os.path.join(folder.root, place, cell), folder.root) for cell in cells]  # noqa: PTH118
        mentioned.update(files)
        stated = read["sha256"].to_pylist()
        faults = [_fault(*row, folder.uri, sha256s) for row in zip(cells, files, stated, strict=True)]
        count.refuse(fault for fault in faults if fault is not None)
        good = pa.array([fault is None for fault in faults], pa.bool_())
        named_by_path = read.set_column(read.column_names.index("file"), "file", pa.array(files, pa.string()))
        parts.append(named_by_path.filter(good))
    uncaptioned = sorted(set(sha256s) - mentioned)
    count.num_rows += len(uncaptioned)
    count.refuse(f"{name!r:.200} of {folder.uri} has no row" for name in uncaptioned)
    count.check_whole()
    return pa.concat_tables(parts)


def _fault(cell: str, file: str, stated_sha256: str | None, root: str, sha256s: Mapping[str, str]) -> str | None:
    """Return the reason why a row of a table of captions belongs to no image of the folder, or None if it does."""
    if file == ".." or file.startswith("../"):
        return f"{cell!r:.200} lies outside {root}"
    if file not in sha256s:
        return f"{cell!r:.200} is no image in {root}; file names count from the folder"
    if stated_sha256 not in (None, sha256s[file]):
        return f"{cell!r:.200} has another SHA-256 than the captions state"
    return None


def _sha256s(folder: Folder, names: Sequence[str], on_progress: OnProgress) -> dict[str, str]:
    sha256s: dict[str, str] = {}
    with ThreadPoolExecutor(_NUM_READERS) as pool:  # hashing releases the GIL
        for name, sha256 in zip(names, pool.map(folder.sha256_of, names), strict=True):
            sha256s[name] = sha256
            on_progress(len(sha256s), len(names))
    return sha256s


def _complete(rows: pa.Table, folder: Folder, sha256s: Mapping[str, str]) -> pa.Table:
    """Return rows with all fields of `url_list.SCHEMA`; a missing source becomes the folder's name."""
    files = rows["file"].to_pylist()
    missing = pa.nulls(len(files), pa.string())
    given = {name: rows[name] for name in rows.column_names}
    columns = {
        "url": [folder.url_of(file) for file in files],
        "caption": rows["caption"],
        "source": pc.coalesce(given.get("source", missing), folder.root.rpartition("/")[2] or "unknown"),
        "licence": given.get("licence", missing),
        "sha256": [sha256s[file] for file in files],
        "folder": pa.repeat(folder.uri, len(files)),
        "member": [member_of(file) for file in files],
    }
    return pa.table(columns, schema=SCHEMA)
