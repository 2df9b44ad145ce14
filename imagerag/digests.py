"""Digests of files. Those of large ones are remembered, as long as a file's size and time of change stay the same."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from imagerag.settings import Settings

_LARGE_BYTES = 64 * 2**20
"""Reading less takes no time that matters."""
_CACHE_NAME = "digests.json"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of one file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: Mapping[str, Path]) -> str:
    """Return one digest of all `files`, which are known by their names in the mapping, whatever their paths."""
    cache = Settings().home / _CACHE_NAME
    remembered = _read(cache)
    keys = {name: _key(path) for name, path in files.items()}
    unknown = {keys[name]: path for name, path in files.items() if keys[name] not in remembered}
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        computed = dict(zip(unknown, pool.map(sha256_of, unknown.values()), strict=True))
    lasting = {key: sha256 for key, sha256 in computed.items() if unknown[key].stat().st_size >= _LARGE_BYTES}
    if lasting:
        _write(cache, _read(cache) | lasting)
    known = remembered | computed
    return hashlib.sha256("".join(f"{name}\0{known[keys[name]]}\n" for name in sorted(files)).encode()).hexdigest()


def _key(path: Path) -> str:
    resolved = path.resolve()
    stat = resolved.stat()
    return f"{resolved}\0{stat.st_size}\0{stat.st_mtime_ns}"


def _read(cache: Path) -> dict[str, str]:
    with suppress(FileNotFoundError, json.JSONDecodeError):
        remembered: dict[str, str] = json.loads(cache.read_text())
        return remembered
    return {}


def _write(cache: Path, remembered: Mapping[str, str]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=cache.parent, suffix=".partial", delete=False) as file:
        json.dump(remembered, file)
    os.replace(file.name, cache)  # noqa: PTH105 - a name, not a path
