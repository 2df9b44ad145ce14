"""Text from strangers (captions, URLs, what servers say) as text, wherever it is shown."""

import re

# Control characters but tab and line feed, and those that turn the direction of what follows: a terminal obeys them.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MARKDOWN = re.compile(r"([!-/:-@\[-`{-~])")  # ASCII punctuation: any of it may stand behind a backslash


def printable(text: str) -> str:
    """Return `text` without what a terminal would obey instead of show."""
    return _COMMANDS.sub("\N{REPLACEMENT CHARACTER}", text)


def in_markdown(text: str) -> str:
    """Return markdown of one line that shows `text`, whatever is in it."""
    return _MARKDOWN.sub(r"\\\1", " ".join(printable(text).split()))
