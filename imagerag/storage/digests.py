"""SHA-256 digests of files; those of large files are cached by path, size and modification time."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from imagerag.settings import Settings
from imagerag.storage.files import read_json, write_json

_LARGE_BYTES = 64 * 2**20
"""Smaller files are hashed each time, which is fast."""
_CACHE_NAME = "digests.json"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: Mapping[str, Path]) -> str:
    """Return one digest over the names and contents of all `files`; their paths do not matter."""
    cache = Settings().home / _CACHE_NAME
    remembered = _read(cache)
    keys = {name: _key(path) for name, path in files.items()}
    unknown = {keys[name]: path for name, path in files.items() if keys[name] not in remembered}
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        computed = dict(zip(unknown, pool.map(sha256_of, unknown.values()), strict=True))
    lasting = {key: sha256 for key, sha256 in computed.items() if unknown[key].stat().st_size >= _LARGE_BYTES}
    if lasting:
        write_json(str(cache), _read(cache) | lasting)
    known = remembered | computed
    return hashlib.sha256("".join(f"{name}\0{known[keys[name]]}\n" for name in sorted(files)).encode()).hexdigest()


def _key(path: Path) -> str:
    resolved = path.resolve()
    stat = resolved.stat()
    return f"{resolved}\0{stat.st_size}\0{stat.st_mtime_ns}"


def _read(cache: Path) -> dict[str, str]:
    with suppress(json.JSONDecodeError):
        return read_json(str(cache)) or {}
    return {}
