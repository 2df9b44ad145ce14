"""Small files, whole or not there."""

import json
from pathlib import Path

import fsspec
import pytest

from imagerag.files import read_json, write_json


def test_what_was_written_is_read(tmp_path: Path) -> None:
    uri = f"{tmp_path}/new/folder/a.json"
    assert read_json(uri) is None
    write_json(uri, {"run_id": "1"})
    write_json(uri, {"run_id": "2"})
    assert read_json(uri) == {"run_id": "2"}
    assert [path.name for path in Path(uri).parent.iterdir()] == ["a.json"]


def test_a_writer_that_dies_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{tmp_path}/a.json"
    write_json(uri, {"run_id": "1"})

    def half(self: object, path: str, value: bytes, *_: object, **__: object) -> None:
        Path(path).write_bytes(value[: len(value) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(fsspec.filesystem("file")), "pipe_file", half)
    with pytest.raises(KeyboardInterrupt):
        write_json(uri, {"run_id": "2"})
    assert read_json(uri) == {"run_id": "1"}
    assert json.loads(Path(uri).read_text())
