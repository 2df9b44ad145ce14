"""Whatever a list is and whatever is in it: rows in = successes + failures + duplicates."""

import csv
import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.fetch import fetch_shard
from imagerag.corpus.source import read_images
from imagerag.corpus.url_list import BadRows
from tests.corpus.fetched import planned
from tests.corpus.web import Web, picture
from tests.corpus.whole import attempts_of

Row = dict[str, Any]
STRANGE: list[Any] = [
    *("", " ", "x", 'a "b"', '"', 'a "', "a,b", "a;b", "a\tb", "a\nb", "a\r\nb", "a\rb", "\u00a0", "\u2028", "\ufeff"),
    *("\x00", "\x1b[2J", "\ud800", "[/b]", "=1+1", "null", "龙", "y" * 9_000, "&amp;", "data:image/png;base64,AA=="),
    *(None, 7, True, [], {}, ["x"], ["x", "y", "x"], ["", None]),
]
HEADER = ["url", "caption", "licence"]


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    """URLs with a picture, without one, and such that are refused."""
    with Web() as web:
        good = [web.serve(f"/{seed}", picture(seed)) for seed in range(6)]
        bad = [
            web.serve("/none", b"", status=404),
            web.serve("/page", b"<html>"),
            web.redirect("/round", web.url("/round")),
        ]
        refused = [
            "http://127.0.0.1:1/",
            "http://10.0.0.1/",
            "file:///etc/passwd",
            "ftp://a.example/",
            "http://[::1",
            "u://a",
        ]
        yield [*good, *(f" {url}\n" for url in good), *bad, *refused]


def _rows(rng: random.Random, urls: list[str], *, cells: list[Any]) -> list[Row]:
    """Rows of which some are good, as a list needs."""

    def cell(good: list[str]) -> Any:
        return rng.choice(cells) if rng.random() < 0.2 else rng.choice(good)

    some = [
        {"url": cell(urls), "caption": cell(["a cup", "a mug", "杯"]), "licence": rng.choice(["MIT", "", None])}
        for _ in range(rng.randrange(30))
    ]
    return [*some, {"url": urls[0], "caption": "a cup", "licence": "MIT"}]


def _num_rows(rows: list[Row]) -> int:
    """A list of captions in a row is a row for each, an empty one is a row."""
    return sum(max(1, len(row["caption"])) if isinstance(row["caption"], list) else 1 for row in rows)


def _json(rng: random.Random, urls: list[str]) -> tuple[str, bytes, int]:
    rows = _rows(rng, urls, cells=STRANGE)
    for row in rows:
        if row["caption"] is None:
            del row["caption"]
    return "list.json", json.dumps(rows).encode(), _num_rows([{"caption": None} | row for row in rows])


def _jsonl(rng: random.Random, urls: list[str]) -> tuple[str, bytes, int]:
    rows = _rows(rng, urls, cells=STRANGE)
    broken = ["{", "[1]", '"x"', "nonsense"][: rng.randrange(5)]
    lines = [*map(json.dumps, rows), *broken, "", " "]
    return "list.jsonl", rng.choice(["\n", "\r\n", "\n\n"]).join(lines).encode(), _num_rows(rows) + len(broken)


def _delimited(rng: random.Random, urls: list[str], name: str, delimiter: str) -> tuple[str, bytes, int]:
    texts = [cell for cell in STRANGE if isinstance(cell, str) and cell.isprintable()] + ['a "b"\n"c"']
    rows = _rows(rng, urls[:6] + urls[12:], cells=texts)
    file = io.StringIO()
    writer = csv.DictWriter(file, HEADER, delimiter=delimiter, lineterminator=rng.choice(["\n", "\r\n", "\r"]))
    writer.writeheader()
    if delimiter == "\t":  # in which a quote is a letter
        rows = [{key: cell and cell.replace('"', "").replace("\n", " ") for key, cell in row.items()} for row in rows]
    writer.writerows(rows)
    broken = ["a,b,c,d,e", "x", "caf\udce9"][: rng.randrange(4)]
    content = file.getvalue() + "".join(line.replace(",", delimiter) + "\n" for line in broken)
    return name, content.encode(errors="surrogateescape"), len(rows) + len(broken)


def _txt(rng: random.Random, urls: list[str]) -> tuple[str, bytes, int]:
    texts = [cell for cell in STRANGE if isinstance(cell, str) and cell.strip() and cell.isprintable()]
    lines = [rng.choice(texts if rng.random() < 0.2 else urls).strip() for _ in range(30)]
    return "list.txt", "\n\n".join(lines).encode(), len(lines)


def _texts(rng: random.Random, urls: list[str]) -> list[Row]:
    texts = [cell for cell in STRANGE if cell is None or (isinstance(cell, str) and cell != "\ud800")]
    return _rows(rng, urls, cells=texts)


def _parquet(rng: random.Random, urls: list[str]) -> tuple[str, bytes, int]:
    rows: list[Row] = _texts(rng, urls)
    if rng.random() < 0.5:
        for row in rows:
            row["caption"] = [row["caption"], *rng.choices(["x", "y", "", None], k=rng.randrange(3))]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=rng.randrange(1, 9))
    return "list.parquet", file.getvalue(), _num_rows(rows)


def _images(rng: random.Random) -> list[bytes | None]:
    images = [picture(seed) for seed in range(4)] + [None, b"", b"<svg/>", picture(1)[:40]]
    return [*rng.choices(images, k=rng.randrange(30)), picture(9)]


def _packed(rng: random.Random, urls: list[str]) -> tuple[str, bytes, int]:
    images = _images(rng)
    captions = [*rng.choices(["x", "y", "", None], k=len(images) - 1), "z"]
    table = pa.table({"image": [{"bytes": it, "path": "x"} for it in images], "text": captions})
    table = table.append_column("url", pa.array(rng.choices([*urls, None, "n/a"], k=len(images))))
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=rng.randrange(1, 9))
    return "images.parquet", file.getvalue(), len(images)


def _tar(rng: random.Random, urls: list[str]) -> tuple[str, bytes, int]:
    file = io.BytesIO()
    images = _images(rng)
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, image in enumerate(images):
            told = {"url": rng.choice(urls), "caption": rng.choice(["x", "y", "", None])}
            text = rng.choice([b"x", b"\xff", b"", None]) if number < len(images) - 1 else b"z"
            parts = {"jpg": image, "txt": text, "json": json.dumps(told).encode()}
            for kind, content in parts.items():
                if content is not None:
                    entry = tarfile.TarInfo(f"{number}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return "images.tar", file.getvalue(), len(images)


FORMS: list[Callable[[random.Random, list[str]], tuple[str, bytes, int]]] = [
    _json,
    _jsonl,
    lambda rng, urls: _delimited(rng, urls, "list.csv", rng.choice(",;")),
    lambda rng, urls: _delimited(rng, urls, "list.tsv", "\t"),
    _txt,
    _parquet,
    _packed,
    _tar,
]


@pytest.mark.parametrize("seed", range(6))
def test_no_row_is_lost(tmp_path: Path, urls: list[str], seed: int) -> None:
    rng = random.Random(seed)
    config = DownloadConfig(allowed_hosts=(urls[0].split("/")[2],), retries=0, timeout_s=5, thread_count=8)
    for number, form in enumerate(FORMS):
        name, content, num_rows = form(rng, urls)
        if not name.endswith((".parquet", ".tar")) and rng.random() < 0.3:
            name, content = f"{name}.gz", gzip.compress(content)
        (tmp_path / name).write_bytes(content)
        found = read_images(str(tmp_path / name), bad_rows=BadRows(max_share=1))
        corpus = Corpus(str(tmp_path / f"shards-{number}"))
        fetch_shard(corpus.shard(0), planned(found.rows.table()), config)
        statuses = [row["status"] for row in attempts_of(corpus).to_pylist()]
        successes, failures = statuses.count("success"), statuses.count("failed") + found.num_invalid
        assert successes > 0, f"{name}: {found.invalid}"
        assert num_rows == successes + failures + found.num_duplicates == found.num_rows, f"{name}: {found.invalid}"


def test_no_row_of_a_lance_table_is_lost(tmp_path: Path, urls: list[str]) -> None:
    rows = _texts(random.Random(0), urls)
    lance.write_dataset(pa.Table.from_pylist(rows), str(tmp_path / "t.lance"), max_rows_per_file=4)
    found = read_images(str(tmp_path / "t.lance"), bad_rows=BadRows(max_share=1))
    assert len(rows) == found.num_rows == found.rows.table().num_rows + found.num_duplicates + found.num_invalid
