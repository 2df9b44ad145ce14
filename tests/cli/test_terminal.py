import pytest

from imagerag.artifacts import Download, Embedded, IndexBuild, Publication
from imagerag.cli.search import print_neighbours
from imagerag.cli.terminal import PlainConsole
from imagerag.retrieval.search import Neighbour
from tasks.report import CorpusReport


def test_captions_are_shown_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    texts = [
        "a cup [sold]",
        "[/b] a cup",
        "[red]a cup[/red] :smile:",
        "a \x1b]0;title\x07cup",
        "two\nlines",
        "a \u202epuc",
    ]
    row = {"id": "i", "source": "s", "licence": "", "width": 1, "height": 1, "score": 0.5}
    print_neighbours("[/b] \x1b[2J", [Neighbour(caption=text, url=f"http://a/{text}", **row) for text in texts])
    shown = capsys.readouterr().out
    for text in (
        "[/b] \ufffd[2J",
        "a cup [sold]",
        "[/b] a cup",
        "[red]a cup[/red] :smile:",
        "a \ufffd]0;title\ufffdcup",
    ):
        assert text in shown
    assert not {"\x1b", "\x07", "\u202e"}.intersection(shown)


def test_of_a_long_caption_the_beginning_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    long = Neighbour(
        id="i", source="s", licence="", width=1, height=1, score=0.5, url="http://a", caption="\n".join(["a cup"] * 100)
    )
    print_neighbours("a cup", [long], full=False)
    shown = capsys.readouterr().out
    assert 10 < shown.count("a cup") < 25
    assert "…" in shown
    print_neighbours("a cup", [long], full=True)
    assert capsys.readouterr().out.count("a cup") == 101


def test_a_text_alone_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole().print("[/b] :smile: \x1b[2J")
    assert capsys.readouterr().out == "[/b] :smile: \ufffd[2J\n"


def test_a_report_quotes_bad_rows_as_text() -> None:
    download = Download(
        uri="u",
        num_urls=2,
        num_success=1,
        num_failed=1,
        num_fetched=2,
        num_removed=0,
        num_bytes=0,
        reasons={"invalid_row": 1},
        examples={"invalid_row": ("row 1 has a url: '<img src=x>|\x1b'",)},
        num_unchanged=3,
        kept={"timeout": 1},
    )
    embedded = Embedded(
        uri="u", table="t", version=1, num_rows=1, num_added=1, num_removed=0, num_duplicates=0, encoder_id="e",
        encoder_digest="d",
    )  # fmt: skip
    index = IndexBuild(uri="u", table="t", version=1, num_rows=1, kind="exact", recall_at_10=1.0, num_unindexed_rows=0)
    publication = Publication(uri="u", table="t", version=1, previous_version=None, published=True, num_rows=1)
    report = CorpusReport(
        name="t", rows_before=0, download=download, embedded=embedded, index=index, publication=publication
    )
    said = r"row 1 has a url\: \'\<img src\=x\>\|\ufffd\'".replace(r"\ufffd", "\ufffd")
    assert f"| invalid_row | 1 | {said} |" in report.markdown()
    assert report.failures() == [{"reason": "invalid_row", "rows": 1, "first": said}]
    assert "| asked again | 3 unchanged, 0 changed, 1 kept that did not come (timeout 1) |" in report.markdown()
