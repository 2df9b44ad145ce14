"""Escape untrusted text (captions, URLs, server responses) for terminals and markdown."""

import re

# Control characters except tab and line feed, and marks that change the direction of text.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MARKDOWN = re.compile(r"([!-/:-@\[-`{-~])")  # ASCII punctuation, all of which can be escaped by a backslash


def printable(text: str) -> str:
    """Return `text` with control characters replaced, so that a terminal shows it and executes nothing."""
    return _COMMANDS.sub("\N{REPLACEMENT CHARACTER}", text)


def in_markdown(text: str) -> str:
    """Return `text` as one line with all markdown escaped."""
    return _MARKDOWN.sub(r"\\\1", " ".join(printable(text).split()))
