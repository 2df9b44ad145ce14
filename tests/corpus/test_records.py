"""How much of a JSON array is held and read."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from imagerag.corpus.records import read_json
from imagerag.corpus.url_list import read_url_list
from imagerag.errors import UserError

ROW = {"url": "http://a.example/", "caption": "x"}


def test_a_broken_item_is_found_before_the_rest_of_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(f'[{json.dumps(ROW)}, {{"url": "'.encode() + b"x" * 40 * 2**20)
    with path.open("rb") as file, io.TextIOWrapper(file) as text:
        with pytest.raises(UserError, match=r"list\.json, row 2 of the JSON array can't be read: Unterminated string"):
            list(read_json(str(path), text, lambda *_: {name: name for name in ROW}))
        assert file.tell() < 20 * 2**20


def test_rows_are_read_without_copying_those_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROW | {"caption": f"{number}"} for number in range(30_000)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(rows))
    assert path.stat().st_size > 2**20, "it fits in one chunk"
    sizes = set()
    raw_decode = json.JSONDecoder.raw_decode

    def noting(self: json.JSONDecoder, text: str, place: int = 0) -> Any:
        sizes.add(len(text))
        return raw_decode(self, text, place)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", noting)
    assert read_url_list(str(path)).rows.table()["caption"].to_pylist() == [row["caption"] for row in rows]
    assert len(sizes) < 5
