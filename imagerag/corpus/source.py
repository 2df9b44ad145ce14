"""Reading of a user's images: from a folder of images, or from a list, which may contain the images themselves.

Both give the same rows of an image, its caption and its metadata, with the columns of `url_list.SCHEMA`.
"""

import os

import fsspec

from imagerag.corpus.folder import images_of, open_folder, read_folder
from imagerag.corpus.forms import FORMATS, FORMS, is_folder, is_part, is_table, some_of
from imagerag.corpus.packed import SUFFIXES
from imagerag.corpus.url_list import BadRows, UrlColumns, UrlList, read_url_list
from imagerag.errors import UserError
from imagerag.progress import OnProgress, silent


def read_images(
    source: str,
    captions: str | None = None,
    columns: UrlColumns | None = None,
    on_progress: OnProgress = silent,
    bad_rows: BadRows | None = None,
) -> UrlList:
    """Read a folder of images with `read_folder`, or a list with `read_url_list`.

    A folder that contains no images, but files of a list, is read as a list in parts.

    Raises:
        UserError: if `source` is neither, if a list is combined with `captions`, or for the reasons of these functions.
    """
    check_source(source, captions)
    source = os.path.expanduser(source)  # noqa: PTH111 - it returns unchanged what it can't expand
    if not _is_folder(source):
        return read_url_list(source, columns, bad_rows)
    folder = open_folder(source)
    if captions is not None or images_of(folder):
        return read_folder(folder, captions, columns, on_progress, bad_rows)
    if not any(map(is_part, folder.files)):
        has = some_of(folder.files) if folder.files else "no files"
        raise UserError(
            f"{source} has no images, named {', '.join(SUFFIXES)}, and no part of a list, named {', '.join(FORMATS)}; "
            f"it has {has}"
        )
    return read_url_list(source, columns, bad_rows)


def check_source(source: str, captions: str | None = None) -> None:
    """Check what can be checked without access to other machines.

    Raises:
        UserError: if a local `source` is neither a folder nor named like a list, or if a list is combined with
            `captions`.
    """
    is_list = source.lower().endswith(FORMATS) or is_table(source)
    if "://" not in source and not is_list and not os.path.isdir(os.path.expanduser(source)):  # noqa: PTH111, PTH112
        raise UserError(f"there is no folder {source} on this machine; a list is a {FORMS}")
    if captions is not None and is_list and not os.path.isdir(os.path.expanduser(source)):  # noqa: PTH111, PTH112
        raise UserError(f"captions ({captions}) go with a folder of images; {source} is a list, which has them itself")


def _is_folder(source: str) -> bool:
    if is_table(source):
        return False
    try:
        return is_folder(*fsspec.core.url_to_fs(source))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{source} can't be read: {error}") from error
