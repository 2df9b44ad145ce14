"""Results that are kept beside what they are about, and hold as long as nothing of it changes."""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import fsspec

from imagerag.storage.files import read_tagged, write_file


@dataclass(frozen=True)
class Memo:
    """A result in a JSON file. The file may be deleted at any time: the result is then computed again."""

    uri: str
    state: Any
    """What the result depends on, as JSON: digests and versions that are cheaper to read than the result is to compute.
    It has to be read before the computation starts."""

    def recall(self) -> Any | None:
        """Return the result, or None if there is none for this state."""
        content, _ = read_tagged(self.uri)
        try:
            kept = json.loads(content or b"{}")
        except ValueError:
            return None
        return kept.get("result") if kept.get("state") == self.state else None

    def keep(self, result: Any) -> None:
        """Keep a result, which can be stored as JSON, instead of the one of an earlier state."""
        write_file(self.uri, json.dumps({"state": self.state, "result": result}).encode())

    def forget(self) -> None:
        """Delete the result, of any state."""
        filesystem, path = fsspec.url_to_fs(self.uri)
        with suppress(FileNotFoundError):
            filesystem.rm_file(path)
