import pytest

from imagerag.plain import in_markdown, printable


@pytest.mark.parametrize("text", ["a cup", "龙 \N{DRAGON}", "two\nlines\tand a tab", "[sold] <b>", "été"])
def test_text_stays_text(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("command", ["\x1b", "\x9b", "\x07", "\x00", "\r", "\x7f", "\u202e", "\u2066", "\u200f"])
def test_what_a_terminal_obeys_is_replaced(command: str) -> None:
    assert printable(f"a{command}[2Jb") == "a\ufffd[2Jb"


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a cup", "a cup"),
        ("a | b\n# c", r"a \| b \# c"),
        ("![x](http://y)", r"\!\[x\]\(http\:\/\/y\)"),
        ("<script>`*_~&amp;", r"\<script\>\`\*\_\~\&amp\;"),
        ("\\[", r"\\\["),
    ],
)
def test_markdown_shows_it(text: str, markdown: str) -> None:
    assert in_markdown(text) == markdown
