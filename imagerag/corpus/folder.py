"""Reading a folder of images on this machine: every image becomes a row, as if it had come from a list of URLs.

Its URL is `file:///…`, its expected SHA-256 that of the file now, so a changed file is a changed row.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from imagerag.corpus.records import FORMATS
from imagerag.corpus.url_list import SCHEMA, BadRows, Rows, UrlColumns, UrlList, fold, read_columns, read_url_list
from imagerag.digests import sha256_of
from imagerag.errors import UserError
from imagerag.progress import OnProgress, silent

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
)
"""Names that images have. Formats that are not decoded are among them: they end as failures, not as nothing."""

_FILE_GUESSES = {"file": ("file", "file_name", "filename", "file_path", "filepath", "path", "image", "image_path")}
_MAX_CAPTION_BYTES = 64 * 2**10
_NUM_NAMES = 5  # in a message


def read_images(
    source: str,
    captions: str | None = None,
    columns: UrlColumns | None = None,
    on_progress: OnProgress = silent,
    bad_rows: BadRows | None = None,
) -> UrlList:
    """Read a folder of images on this machine with `read_folder`, or else a list with `read_url_list`.

    A folder without an image and with files of a list is a list in parts.

    Raises:
        UserError: if `source` is neither, if a list comes with `captions`, or as those two do.
    """
    check_source(source, captions)
    if (folder := _path(source)).is_dir() and (captions is not None or not _is_list_in_parts(folder)):
        return read_folder(folder, captions, columns, on_progress, bad_rows)
    return read_url_list(source, columns, bad_rows)


def check_source(source: str, captions: str | None = None) -> None:
    """Check all that can be told without reading.

    Raises:
        UserError: if `source` is no folder on this machine and not named as a list is, or a list comes with `captions`.
    """
    if _path(source).is_dir():
        return
    if not source.lower().endswith(FORMATS) and "://" not in source:
        raise UserError(f"there is no folder {source} on this machine; a URL list is a file named {', '.join(FORMATS)}")
    if captions is not None:
        raise UserError(
            f"captions ({captions}) go with a folder of images; {source} is a URL list, which has them in a column"
        )


def _is_list_in_parts(folder: Path) -> bool:
    names = [name.lower() for _, _, files in os.walk(folder) for name in files if not name.startswith(".")]
    return any(name.endswith(".parquet") for name in names) and not any(name.endswith(SUFFIXES) for name in names)


def read_folder(
    folder: Path,
    captions: str | None = None,
    columns: UrlColumns | None = None,
    on_progress: OnProgress = silent,
    bad_rows: BadRows | None = None,
) -> UrlList:
    """List every image in a folder and the folders in it, but for hidden ones, with its caption.

    Args:
        folder: where they are; no link in it may lead out of it.
        captions: a table of file names, relative to the folder, and captions (also `source`, `licence`, `sha256`), any
            number for an image. Without it, the caption of `name.jpg` is the text in `name.txt`, or else its name.
        columns: of that table; `url` is the file names'.
        on_progress: is told of images, each of which is read once for its SHA-256.
        bad_rows: what happens to rows of that table that name no image of the folder or are bad in themselves, and to
            images without a row.

    Raises:
        UserError: if there are no images; if an image or the file of a caption leads out of the folder; if captions
            are unreadable, or more rows bad than `bad_rows` allows.
    """
    root = folder.resolve()
    names = _find(root)
    if not names:
        raise UserError(f"{folder} has no images: no file in it is named {', '.join(SUFFIXES)}")
    sha256s = _sha256s(root, names, on_progress)
    if captions is not None:
        rows = _read_captions(captions, root, sha256s, columns, bad_rows or BadRows())
        num_named_by_file = 0
    else:
        rows = Rows(str(folder), BadRows())
        texts = [_text_beside(root, name) for name in names]
        num_named_by_file = texts.count(None)
        words = [text or _words(name) for text, name in zip(texts, names, strict=True)]
        rows.columns = {"file": pa.array(names), "caption": pa.array(words)}
    complete = _complete(rows.columns, root, sha256s)
    table = fold(complete)
    return UrlList(
        table=table,
        num_duplicates=complete.num_rows - table.num_rows,
        num_named_by_file=num_named_by_file,
        num_invalid=rows.num_invalid,
        invalid=tuple(rows.invalid),
    )


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # noqa: PTH111 - which leaves as it is what it can't expand


def _find(root: Path) -> list[str]:
    """The images by their paths from `root`, in order."""
    found: list[Path] = []
    unfit: list[Path] = []
    for place, folders, files in os.walk(root, onerror=_refuse_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in folders):
            if path.is_symlink() and not path.resolve().is_relative_to(root):  # one within is listed where it leads
                unfit.append(path)
        for path in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
            if path.name.lower().endswith(SUFFIXES):
                (found if _is_inside(path, root) and _is_utf8(path) else unfit).append(path)
    if unfit:
        raise UserError(
            f"{root} has what can't be read, {_listed([str(path.relative_to(root)) for path in unfit])}: links have to "
            "stay in the folder (or copy it by `cp -rL`), images have to be regular files, and names UTF-8"
        )
    return [str(path.relative_to(root)) for path in found]


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} can't be read: {error.strerror}") from error


def _is_inside(path: Path, root: Path) -> bool:
    """Whether it is a regular file in `root`, the folders above it being no links."""
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and path.is_file() and path.resolve().is_relative_to(root))


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_beside(root: Path, name: str) -> str | None:
    """What `name.txt` beside the image says, if it is there."""
    path = (root / name).with_suffix(".txt")
    if not os.path.lexists(path):
        return None
    if not _is_inside(path, root):
        raise UserError(f"{path} has to be a regular file in {root}")
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CAPTION_BYTES + 1).decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as text in UTF-8: {error}") from error
    if not text or len(text.encode()) > _MAX_CAPTION_BYTES:
        raise UserError(f"{path} has to hold a caption of 1 to {_MAX_CAPTION_BYTES} bytes")
    return text


def _words(name: str) -> str:
    stem = Path(name).stem
    return re.sub(r"[\s_+.-]+", " ", stem).strip() or stem


def _read_captions(
    uri: str, root: Path, sha256s: Mapping[str, str], columns: UrlColumns | None, bad_rows: BadRows
) -> Rows:
    """The rows of a table of captions that are of the folder's images."""
    named = (columns or UrlColumns()).model_dump(exclude_none=True)
    if "url" in named:
        named["file"] = named.pop("url")
    rows = read_columns(uri, "captions file", _FILE_GUESSES, named, bad_rows)
    cells = rows.columns["file"].to_pylist()
    files = [os.path.relpath(root / cell, root) for cell in cells]
    stated = rows.columns["sha256"].to_pylist()
    faults = [_fault(*row, root, sha256s) for row in zip(cells, files, stated, strict=True)]
    rows.refuse(fault for fault in faults if fault is not None)
    uncaptioned = sorted(set(sha256s).difference(files))
    rows.num_rows += len(uncaptioned)
    rows.refuse(f"{name!r:.200} of {root} has no row" for name in uncaptioned)
    rows.check_share()
    good = pa.array([fault is None for fault in faults], pa.bool_())
    rows.columns = {name: column.filter(good) for name, column in rows.columns.items()}
    rows.columns["file"] = pa.chunked_array([pa.array(files, pa.string()).filter(good)])
    return rows


def _fault(cell: str, file: str, stated_sha256: str | None, root: Path, sha256s: Mapping[str, str]) -> str | None:
    """Why a row of a table of captions is of no image in the folder, if it is so."""
    if file == ".." or file.startswith("../"):
        return f"{cell!r:.200} lies outside {root}"
    if file not in sha256s:
        return f"{cell!r:.200} is no image in {root}; file names count from the folder"
    if stated_sha256 not in (None, sha256s[file]):
        return f"{cell!r:.200} has another SHA-256 than the captions state"
    return None


def _listed(names: Sequence[str]) -> str:
    """Some of the names, and how many there are."""
    more = f" and {len(names) - _NUM_NAMES:,} more" if len(names) > _NUM_NAMES else ""
    return f"{', '.join(map(repr, names[:_NUM_NAMES]))}{more}"


def _sha256s(root: Path, names: Sequence[str], on_progress: OnProgress) -> dict[str, str]:
    sha256s: dict[str, str] = {}
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        for name, sha256 in zip(names, pool.map(lambda name: _sha256(root / name), names), strict=True):
            sha256s[name] = sha256
            on_progress(len(sha256s), len(names))
    return sha256s


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        _refuse_unreadable(error)


def _complete(rows: Mapping[str, pa.Array], root: Path, sha256s: Mapping[str, str]) -> pa.Table:
    """All fields of `url_list.SCHEMA`; the folder's name stands in for a missing source."""
    files = rows["file"].to_pylist()
    missing = pa.nulls(len(files), pa.string())
    columns = {
        "url": [(root / file).as_uri() for file in files],
        "caption": rows["caption"],
        "source": pc.coalesce(rows.get("source", missing), root.name or "unknown"),
        "licence": rows.get("licence", missing),
        "sha256": [sha256s[file] for file in files],
        "folder": pa.repeat(str(root), len(files)),
    }
    return pa.table(columns, schema=SCHEMA)
