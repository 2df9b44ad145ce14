"""Digests of files, and how long that of a large one is remembered."""

import hashlib
import os
from pathlib import Path

import pytest

from imagerag.storage import digests
from imagerag.storage.digests import digest_of


@pytest.fixture(autouse=True)
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed; those of 4 bytes are large."""
    names: list[str] = []
    sha256_of = digests.sha256_of

    def counted(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_LARGE_BYTES", 4)
    monkeypatch.setattr(digests, "sha256_of", counted)
    return names


def file(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    one, other = file(tmp_path / "one", b"1"), file(tmp_path / "other", b"2222")
    digest = digest_of({"b": other, "a": one})
    lines = (f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in (("a", b"1"), ("b", b"2222")))
    assert digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    elsewhere = {"a": file(tmp_path / "copy" / "x", b"1"), "b": file(tmp_path / "copy" / "y", b"2222")}
    assert digest_of(elsewhere) == digest
    assert digest_of({"a": other, "b": one}) != digest


def test_a_large_file_is_hashed_again_only_after_a_change(tmp_path: Path, hashed: list[str]) -> None:
    small, large, more = (
        file(tmp_path / name, b"1" * size) for name, size in (("small", 3), ("large", 4), ("more", 9))
    )
    first = digest_of({"s": small, "l": large})
    digest_of({"m": more})
    hashed.clear()
    assert digest_of({"s": small, "l": large, "m": more}) != first
    assert digest_of({"s": small, "l": large}) == first
    assert hashed == ["small", "small"]

    large.write_bytes(b"2222")
    os.utime(large, ns=(0, 0))
    digest = digest_of({"s": small, "l": large})
    assert digest != first
    (tmp_path / "home" / "digests.json").write_text("{ cut")
    assert digest_of({"s": small, "l": large}) == digest
