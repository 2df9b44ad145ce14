"""The rich console that all commands print to."""

from typing import Any

from rich.console import Console
from rich.text import Text

from imagerag.plain import printable


class PlainConsole(Console):
    """Console that prints text literally: without markup, emoji codes or control characters."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string with control characters replaced; also called for cells and titles of tables."""
        return super().render_str(printable(text), **options)
