"""What tests download into."""

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from imagerag.artifacts import Download
from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.download import download
from imagerag.corpus.ledger import read_parts
from imagerag.corpus.url_list import SCHEMA, UrlList
from imagerag.settings import Settings
from imagerag.storage.spool import Spool
from tests.corpus.web import Web


class Downloads:
    """A corpus in a folder, and how the tests download into it."""

    def __init__(self, folder: Path, web: Web) -> None:
        self.corpus = Corpus(str(folder / "shards"))
        self.folder = folder / "shards"
        self._settings = Settings(home=folder)
        self._config = {
            "allowed_hosts": (web.host,),
            "shard_size": 4,
            "thread_count": 4,
            "timeout_s": 5,
            "retries": 0,
            "back_off_s": 0.1,
        }

    def download(self, rows: list[dict[str, Any]], **options: Any) -> Download:
        config = DownloadConfig.model_validate(self._config | options.pop("config", {}))
        return download(urls(rows), corpus=self.corpus, config=config, settings=self._settings, **options)

    def outcome(self) -> dict[str, str]:
        """Status or reason of every URL, each of which has one row."""
        rows = [row for _, ledger in read_parts(self.corpus) for row in ledger.to_pylist()]
        assert max(Counter((row["url"], row["caption"]) for row in rows).values()) == 1
        return {row["url"].partition("/t")[2]: row["reason"] or row["status"] for row in rows}

    def images(self) -> dict[str, bytes]:
        """Image files in the tars, by key."""
        found = {}
        for path in sorted(self.folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        found[member.name.removesuffix(".jpg")] = tar.extractfile(member).read()  # type: ignore[union-attr]
        return found


def urls(rows: list[dict[str, Any]]) -> UrlList:
    table = pa.Table.from_pylist([{"source": "test", **row} for row in rows], schema=SCHEMA)
    return UrlList(rows=Spool.of(table), num_duplicates=1)
