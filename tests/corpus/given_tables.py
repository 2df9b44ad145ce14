"""Tables of images that people have already: parquet, a dataset's folder, Lance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq

from tests.corpus.given import Given, of_every_kind, photo
from tests.corpus.photos import turned


def _cell(image: bytes | None, path: str | None = None) -> dict[str, bytes | str | None]:
    return {"bytes": image, "path": path}


def _parquet(name: str = "p.parquet", **columns: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / name)
        return str(folder / name)

    return make


def _hub_dataset(folder: Path) -> str:
    for part in range(2):
        _parquet(f"data/train-0000{part}-of-00002.parquet", image=[_cell(photo(part))], text=[f"part {part}"])(folder)
    (folder / "README.md").write_text("---\ndataset_info: {}\n---")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.parquet").write_bytes(b"")
    (folder / "dataset_infos.json").write_text("{}")
    return str(folder)


def _tables() -> list[Given]:
    kinds = of_every_kind()
    both = {outcome: outcome for outcome in kinds}
    web = ["http://a.example/1.jpg", "n/a", None]
    return [
        Given(
            what="parquet of Hugging Face's datasets",
            make=_parquet(image=[_cell(photo(), "a.jpg"), _cell(photo(1))], text=["a", "b"]),
            outcomes={"a": "success", "b": "success"},
            urls={"a": "/p.parquet#row=0", "b": "/p.parquet#row=1"},
            size=(60, 90),
        ),
        Given(
            what="a Hugging Face dataset's folder",
            make=_hub_dataset,
            outcomes={"part 0": "success", "part 1": "success"},
            urls={"part 1": "/data/train-00001-of-00002.parquet#row=0"},
        ),
        Given(
            what="a glob of parts with images",
            make=lambda folder: _hub_dataset(folder) + "/data/train-*.parquet",
            outcomes={"part 0": "success", "part 1": "success"},
        ),
        Given(
            what="parquet of cells of every kind",
            make=_parquet(image=list(map(_cell, kinds.values())), caption=list(kinds)),
            outcomes=both,
        ),
        Given(
            what="a photo in parquet that has to be turned",
            make=_parquet(image=[_cell(turned(6))], caption=["x"]),
            outcomes={"x": "success"},
            size=(160, 256),
        ),
        Given(
            what="cells without an image",
            make=_parquet(image=[_cell(photo()), _cell(None, "a.jpg"), None, _cell(b"")], caption=["a", *"bcd"]),
            error="3 of 4 rows are bad, more than the 50% that `bad_rows.max_share` allows; the first: row 2 has no",
        ),
        Given(
            what="a cell without an image",
            make=_parquet(image=[_cell(photo()), _cell(photo(1)), None], caption=["a", "b", "c"]),
            outcomes={"a": "success", "b": "success"},
            invalid=("row 3 has no bytes in 'image'",),
        ),
        Given(
            what="parquet that img2dataset wrote",
            make=_parquet(jpg=pa.array([photo(), photo(1), photo(2)], pa.large_binary()), txt=["a", "b", "c"], url=web),
            outcomes={"a": "success", "b": "success", "c": "success"},
            urls={"a": "http://a.example/1.jpg", "b": "/p.parquet#row=1", "c": "/p.parquet#row=2"},
        ),
        Given(
            what="five captions of an image",
            make=_parquet(image=[_cell(photo())], caption=[[f"c{number}" for number in range(5)] + ["c0"]]),
            outcomes={f"c{number}": "success" for number in range(5)},
            num_duplicates=1,
        ),
        Given(
            what="the hash of a file that was another",
            make=_parquet(image=[_cell(photo())], caption=["a"], sha256=["ab" * 32]),
            outcomes={"a": "success"},
        ),
        Given(
            what="a folder named as a file, as Spark has it",
            make=lambda folder: str(
                Path(_parquet("p.parquet/part-0.snappy.parquet", image=[photo()], caption=["a"])(folder)).parent
            ),
            outcomes={"a": "success"},
        ),
        Given(
            what="several columns of images",
            make=_parquet(before=[_cell(photo())], after=[_cell(photo())], caption=["a"]),
            error="has several columns of images, ['before', 'after']: say which of them is `image`",
        ),
        Given(
            what="bytes that are no images, and URLs",
            make=_parquet(url=["file:///etc/passwd"], caption=["a"], md5=[b"0123456789abcdef"]),
            outcomes={"a": "blocked_scheme"},
        ),
        Given(
            what="columns that would name a file",
            make=_parquet(url=["file:///etc/passwd"], caption=["a"], folder=["/etc"], member=["passwd"]),
            outcomes={"a": "blocked_scheme"},
        ),
        Given(
            what="a Lance table of images",
            make=lambda folder: _lance(folder / "t.lance", image=[photo(), photo(1)], caption=["a", "b"]),
            outcomes={"a": "success", "b": "success"},
            urls={"b": "/t.lance#row=1"},
        ),
        Given(
            what="a Lance table of cells of every kind",
            make=lambda folder: _lance(folder / "t.lance", image=list(kinds.values()), caption=list(kinds)),
            outcomes=both,
        ),
        Given(
            what="a Lance table of URLs",
            make=lambda folder: _lance(
                folder / "t.lance", uri=["http://127.0.0.1/x.jpg"], caption=["a"], vector=[[0.5]]
            ),
            outcomes={"a": "blocked_address"},
        ),
        Given(
            what="a Lance table of structs, with rows taken out",
            make=lambda folder: _lance_without_a_row(folder / "t.lance"),
            outcomes={"a": "success", "c": "success"},
        ),
        Given(
            what="a Lance table that is none",
            make=lambda folder: str(folder / "t.lance"),
            error="t.lance is no Lance table that can be read",
        ),
        Given(
            what="a LanceDB database",
            make=lambda folder: str(Path(_lance(folder / "t.lance", caption=["a"])).parent),
            error="; it has 't.lance/",
        ),
    ]


def _lance(path: Path, **columns: Any) -> str:
    lance.write_dataset(pa.table(columns), str(path))
    return str(path)


def _lance_without_a_row(path: Path) -> str:
    uri = _lance(path, image=[_cell(photo(seed)) for seed in range(3)], caption=["a", "b", "c"])
    lance.dataset(uri).delete("caption = 'b'")
    return uri


TABLES = _tables()
