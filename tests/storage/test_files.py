"""Files, whole or not there, and two writers of one."""

import os
from pathlib import Path

import pytest

from imagerag.storage.files import ConflictError, read_json, read_tagged, replace_file, write_file, write_json


def test_what_was_written_is_read(tmp_path: Path) -> None:
    uri = f"{tmp_path}/new/folder/a.json"
    assert read_json(uri) is None
    write_json(uri, {"run_id": "1"})
    write_json(uri, {"run_id": "2"})
    assert read_json(uri) == {"run_id": "2"}
    assert [path.name for path in Path(uri).parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_a_writer_that_dies_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "a.json"
    write_file(str(path), b"old")

    def die(file: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die)
        with pytest.raises((KeyboardInterrupt, OSError)):
            write_file(str(path), b"new and longer")
    assert path.read_bytes() == b"old"
    write_file(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"], "what it left is gone"


def test_a_file_that_another_writer_changed_is_not_replaced(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a"
    assert read_tagged(uri) == (None, None)
    replace_file(uri, b"1", None)
    with pytest.raises(ConflictError, match="another writer"):
        replace_file(uri, b"2", None)
    content, tag = read_tagged(uri)
    assert content == b"1"
    newer = replace_file(uri, b"2", tag)
    with pytest.raises(ConflictError, match="another writer"):
        replace_file(uri, b"3", tag)
    assert read_tagged(uri) == (b"2", newer)
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
