"""The console that all commands print on."""

from typing import Any

from rich.console import Console
from rich.text import Text

from imagerag.plain import printable


class PlainConsole(Console):
    """Shows every text as it is: no markup and no emoji codes in it, and nothing that a terminal would obey."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text to show; a table's cells and titles come here, too."""
        return super().render_str(printable(text), **options)
