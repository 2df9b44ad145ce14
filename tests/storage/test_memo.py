from pathlib import Path

from imagerag.storage.memo import Memo


def test_a_result_holds_for_its_state(tmp_path: Path) -> None:
    uri = (tmp_path / "counts.json").as_uri()
    first, second = Memo(uri, ["table", 1]), Memo(uri, ["table", 2])
    assert first.recall() is None
    first.keep({"rows": 3})
    assert (Memo(uri, ["table", 1]).recall(), second.recall()) == ({"rows": 3}, None)
    second.keep(0)
    assert (first.recall(), second.recall()) == (None, 0)
    (tmp_path / "counts.json").write_text("{")
    assert second.recall() is None
    second.forget()
    second.forget()
    assert list(tmp_path.iterdir()) == []
