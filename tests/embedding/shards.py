"""Writes shards as a download leaves them."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from imagerag.corpus import ledger, url_list
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.shards import ROW_DIGITS


@dataclass(frozen=True)
class Sample:
    url: str
    caption: str
    image: bytes
    source: str | None = "test"


def sample(number: int, *, seed: int | None = None, caption: str | None = None) -> Sample:
    """One of any number of different pictures."""
    pixels = np.random.default_rng(number if seed is None else seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((48, 40)).save(buffer, "JPEG")
    return Sample(f"https://example.org/{number}.jpg", caption or f"picture {number}", buffer.getvalue())


def write_shard(uri: Path, shard: int, samples: Sequence[Sample], in_tar: Sequence[Sample] | None = None) -> None:
    """Write a finished shard. What lies in the tar may be made to differ from what the table lists."""
    uri.mkdir(parents=True, exist_ok=True)
    name = Corpus(str(uri)).shard(shard).name
    keys = [f"{name}{row:0{ROW_DIGITS}d}" for row in range(len(samples))]
    with tarfile.open(uri / f"{name}.tar", "w") as tar:
        for key, entry in zip(keys, in_tar or samples, strict=False):
            for suffix, content in (("jpg", entry.image), ("txt", entry.caption.encode()), ("json", b"{}")):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    columns = {
        "url": [entry.url for entry in samples],
        "caption": [entry.caption for entry in samples],
        "source": [entry.source for entry in samples],
        "status": ["success"] * len(samples),
        "sha256": [sha256(entry.image).hexdigest() for entry in samples],
        "width": [48] * len(samples),
        "height": [40] * len(samples),
        "key": keys,
    }
    schema = pa.schema([field for field in ledger.SCHEMA if field.name not in ("reason", "shard")])
    empty = dict.fromkeys(set(schema.names) - columns.keys(), [None] * len(samples))
    pq.write_table(pa.table(columns | empty, schema=schema), uri / f"{name}.parquet")
    (uri / f"{name}_stats.json").write_text(json.dumps({"count": len(samples)}))


def want(uri: Path, samples: Sequence[Sample]) -> None:
    """Replace what the corpus wants."""
    uri.mkdir(parents=True, exist_ok=True)
    rows = [{"url": entry.url, "caption": entry.caption, "source": entry.source} for entry in samples]
    Corpus(str(uri)).want([pa.Table.from_pylist(rows, schema=url_list.SCHEMA)])
