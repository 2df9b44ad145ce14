"""Images that people have already, in whichever form, and what has to come of each: one source a case."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import lance
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.corpus.fetched import MAX_BYTES
from tests.corpus.photos import encoded, scene, turned


@dataclass(frozen=True, kw_only=True)
class Given:
    """A source, and what has to come of its rows."""

    what: str
    make: Callable[[Path], str]
    """Writes it into an empty folder, and returns what a user calls it."""
    outcomes: Mapping[str, str] = field(default_factory=dict)
    """Of the good rows, by caption: `success`, or the reason of the failure."""
    urls: Mapping[str, str] = field(default_factory=dict)
    """What the URLs of rows end with, by caption."""
    size: tuple[int, int] | None = None
    """Of all stored pictures."""
    invalid: tuple[str, ...] = ()
    """What is said of each bad row."""
    num_duplicates: int = 0
    error: str = ""
    """What is said if the source itself is refused."""


@cache
def _photo(seed: int = 0) -> bytes:
    return encoded(scene((60, 90), seed))


def _cell(image: bytes | None, path: str | None = None) -> dict[str, bytes | str | None]:
    return {"bytes": image, "path": path}


def _parquet(name: str = "p.parquet", **columns: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / name)
        return str(folder / name)

    return make


def _of_every_kind() -> dict[str, bytes]:
    """What a table may have in its cells, by the outcome: the limits are those of what is fetched."""
    return {
        "unsupported_format": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "corrupt_image": encoded(scene())[:3000],
        "too_many_pixels": encoded(Image.new("RGB", (401, 641))),
        "too_many_bytes": _photo() + bytes(MAX_BYTES),
        "success": _photo(),
    }


def _hub_dataset(folder: Path) -> str:
    for part in range(2):
        _parquet(f"data/train-0000{part}-of-00002.parquet", image=[_cell(_photo(part))], text=[f"part {part}"])(folder)
    (folder / "README.md").write_text("---\ndataset_info: {}\n---")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.parquet").write_bytes(b"")
    (folder / "dataset_infos.json").write_text("{}")
    return str(folder)


def _tables() -> list[Given]:
    kinds = _of_every_kind()
    both = {outcome: outcome for outcome in kinds}
    web = ["http://a.example/1.jpg", "n/a", None]
    return [
        Given(
            what="parquet of Hugging Face's datasets",
            make=_parquet(image=[_cell(_photo(), "a.jpg"), _cell(_photo(1))], text=["a", "b"]),
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
            make=_parquet(image=[_cell(_photo()), _cell(None, "a.jpg"), None, _cell(b"")], caption=["a", *"bcd"]),
            error="3 of 4 rows are bad, more than the 50% that `bad_rows.max_share` allows; the first: row 2 has no",
        ),
        Given(
            what="a cell without an image",
            make=_parquet(image=[_cell(_photo()), _cell(_photo(1)), None], caption=["a", "b", "c"]),
            outcomes={"a": "success", "b": "success"},
            invalid=("row 3 has no bytes in 'image'",),
        ),
        Given(
            what="parquet that img2dataset wrote",
            make=_parquet(
                jpg=pa.array([_photo(), _photo(1), _photo(2)], pa.large_binary()), txt=["a", "b", "c"], url=web
            ),
            outcomes={"a": "success", "b": "success", "c": "success"},
            urls={"a": "http://a.example/1.jpg", "b": "/p.parquet#row=1", "c": "/p.parquet#row=2"},
        ),
        Given(
            what="five captions of an image",
            make=_parquet(image=[_cell(_photo())], caption=[[f"c{number}" for number in range(5)] + ["c0"]]),
            outcomes={f"c{number}": "success" for number in range(5)},
            num_duplicates=1,
        ),
        Given(
            what="the hash of a file that was another",
            make=_parquet(image=[_cell(_photo())], caption=["a"], sha256=["ab" * 32]),
            outcomes={"a": "success"},
        ),
        Given(
            what="a folder named as a file, as Spark has it",
            make=lambda folder: str(
                Path(_parquet("p.parquet/part-0.snappy.parquet", image=[_photo()], caption=["a"])(folder)).parent
            ),
            outcomes={"a": "success"},
        ),
        Given(
            what="several columns of images",
            make=_parquet(before=[_cell(_photo())], after=[_cell(_photo())], caption=["a"]),
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
            make=lambda folder: _lance(folder / "t.lance", image=[_photo(), _photo(1)], caption=["a", "b"]),
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
    uri = _lance(path, image=[_cell(_photo(seed)) for seed in range(3)], caption=["a", "b", "c"])
    lance.dataset(uri).delete("caption = 'b'")
    return uri


def _tar(entries: list[tuple[str | tarfile.TarInfo, bytes]], name: str = "00000.tar") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / name, "w") as tar:
            for entry, content in entries:
                info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
                if info.isreg():
                    info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return str(folder / name)

    return make


def _linked(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _by_img2dataset(folder: Path) -> str:
    """Two shards as img2dataset's own writer makes them, with a row that failed."""
    from img2dataset.writer import WebDatasetSampleWriter

    names = ("url", "caption", "key", "status", "error_message", "sha256")
    schema = pa.schema([(name, pa.string()) for name in names])
    for shard in range(2):
        writer = WebDatasetSampleWriter(shard, str(folder), True, 5, schema, "webp")
        for row in range(2):
            key, image = f"{shard:05d}{row:04d}", encoded(scene((60, 90), row), "WEBP") if row == 0 else None
            meta = dict.fromkeys(names) | {"url": f"http://a.example/{key}", "caption": f"c{key}", "sha256": "ab" * 32}
            writer.write(image, key, f"c{key}", meta)
        writer.close()
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 2}))
    return str(folder)


def _tars() -> list[Given]:
    good = [("0.jpg", _photo()), ("0.txt", b"a cup")]
    hostile = ["../../up.jpg", "/abs.jpg", "a/./b.jpg", "sub/c.jpg", "d\n.jpg", "e\x1b[2J.jpg", "f?row=1&column=x.jpg"]
    kinds = _of_every_kind()
    return [
        Given(
            what="tars that img2dataset wrote",
            make=_by_img2dataset,
            outcomes={"c000000000": "success", "c000010000": "success"},
            urls={"c000010000": "http://a.example/000010000"},
            size=(60, 90),
        ),
        Given(what="a tar", make=_tar(good), outcomes={"a cup": "success"}, urls={"a cup": "/00000.tar#0.jpg"}),
        Given(
            what="a glob of tars",
            make=lambda folder: [_tar(good, f"{part}.tar")(folder) for part in range(2)] and f"{folder}/*.tar",  # type: ignore[func-returns-value]
            outcomes={"a cup": "success"},
            urls={"a cup": ".tar#0.jpg"},
        ),
        Given(
            what="a tar of entries of every kind",
            make=_tar(
                [it for key, image in kinds.items() for it in ((f"{key}.png", image), (f"{key}.txt", key.encode()))]
            ),
            outcomes={outcome: outcome for outcome in kinds},
        ),
        Given(
            what="a photo in a tar that has to be turned",
            make=_tar([("x.jpeg", turned(8)), ("x.txt", b"x")]),
            outcomes={"x": "success"},
            size=(160, 256),
        ),
        Given(
            what="a caption in JSON alone",
            make=_tar([("0.png", encoded(scene((60, 90)), "PNG")), ("0.json", b'{"text": "a", "licence": "MIT"}')]),
            outcomes={"a": "success"},
        ),
        Given(what="a tar without captions", make=_tar(good[:1]), error="has no column that looks like 'caption'"),
        Given(
            what="names that lead elsewhere",
            make=_tar([it for name in hostile for it in ((name, _photo()), (name[:-3] + "txt", repr(name).encode()))]),
            outcomes={repr(name): "success" for name in hostile},
            urls={repr(hostile[0]): "/00000.tar#../../up.jpg", repr(hostile[4]): "#d%0A.jpg"},
        ),
        Given(
            what="a name that is not UTF-8",
            make=_tar([("caf\udce9.jpg", _photo()), ("caf\udce9.txt", b"x")]),
            outcomes={"x": "success"},
            urls={"x": "#caf%E9.jpg"},
        ),
        Given(
            what="links and devices in a tar",
            make=_tar(
                [
                    *good,
                    *(
                        (f"{number}{end}", content)
                        for number in range(4, 8)
                        for end, content in ((".jpg", _photo(number)), (".txt", b"%d" % number))
                    ),
                    (_linked("1.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
                    ("1.txt", b"x"),
                    (_linked("2.jpg", tarfile.LNKTYPE, "0.jpg"), b""),
                    ("2.txt", b"x"),
                    (_linked("3.jpg", tarfile.CHRTYPE), b""),
                    ("3.txt", b"x"),
                ]
            ),
            outcomes={"a cup": "success"} | {f"{number}": "success" for number in range(4, 8)},
            invalid=tuple(f"row {6 + number} is no regular file: '{1 + number}.jpg'" for number in range(3)),
        ),
        Given(
            what="samples that lack something",
            make=_tar(
                [
                    *good,
                    ("1.txt", b"no image"),
                    ("2.jpg", _photo(2)),
                    ("3.jpg", _photo()),
                    ("3.png", _photo()),
                    ("3.txt", b"two"),
                    ("4.jpg", _photo()),
                    ("4.txt", b"\xff"),
                    ("5.jpg", _photo(5)),
                    ("5.json", b"[1]"),
                    ("5.txt", b"x"),
                    *(
                        (f"{number}{end}", content)
                        for number in range(6, 11)
                        for end, content in ((".jpg", _photo(number)), (".txt", b"%d" % number))
                    ),
                ]
            ),
            outcomes={"a cup": "success"} | {f"{number}": "success" for number in range(6, 11)},
            invalid=(
                "row 2 has no image: '1.txt'",
                "row 3 has a caption that is missing",
                "row 4 has more than one image: '3.png'",
                "row 5 has a .txt that can't be read",
                "row 6 has a .json that can't be read",
            ),
        ),
        Given(
            what="entries that webdataset has beside an image",
            make=_tar([("0.jpg", _photo()), ("0.depth.png", b"depth"), ("0.cls", b"7"), ("0.txt", b"x")]),
            outcomes={"x": "success"},
        ),
        Given(what="half a tar", make=lambda folder: _cut(_tar(good)(folder), 1500), error="is not readable"),
        Given(
            what="a tar, packed",
            make=lambda folder: _packed(folder / "x.tar"),
            error="is not readable as the list that its name says: it seems to be gzip",
        ),
    ]


def _cut(path: str, size: int) -> str:
    Path(path).write_bytes(Path(path).read_bytes()[:size])
    return path


def _packed(path: Path) -> str:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    return str(path)


def _image_folder(metadata: Mapping[str, str]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        for number, name in enumerate(("train/a.jpg", "train/sub/b.jpg", "test/a.jpg", "test/c.jpg")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(_photo(number))
        for name, text in metadata.items():
            (folder / name).write_text(text)
        return str(folder)

    return make


def _in_memory(files: Mapping[str, bytes]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        for name, content in files.items():
            with fsspec.open(f"memory:/{folder}/{name}", "wb") as file:
                file.write(content)
        return f"memory:/{folder}"

    return make


def _folders() -> list[Given]:
    train = "file_name,text\na.jpg,a cup\nsub/b.jpg,a mug\n"
    test = '{"file_name": "a.jpg", "text": "a jug"}\n{"file_name": "c.jpg", "text": ["a jar", "a pot"]}\n'
    named = {"a cup": "success", "a mug": "success", "a jug": "success", "a jar": "success", "a pot": "success"}
    return [
        Given(
            what="an imagefolder of two splits",
            make=_image_folder({"train/metadata.csv": train, "test/metadata.jsonl": test}),
            outcomes=named,
            urls={"a cup": "/train/a.jpg", "a jug": "/test/a.jpg"},
        ),
        Given(
            what="an imagefolder whose metadata leads out of it",
            make=_image_folder(
                {"train/metadata.csv": train + "../../x.jpg,x\n../test/none.jpg,x\n", "test/metadata.jsonl": test}
            ),
            outcomes=named,
            invalid=("'../../x.jpg' lies outside", "'../test/none.jpg' is no image in"),
        ),
        Given(
            what="an imagefolder with images that its metadata doesn't name",
            make=_image_folder({"train/metadata.csv": train, "test/metadata.csv": "file_name,text\na.jpg,a jug\n"}),
            outcomes={"a cup": "success", "a mug": "success", "a jug": "success"},
            invalid=("'test/c.jpg' of",),
        ),
        Given(
            what="metadata without names of files",
            make=_image_folder({"train/metadata.csv": "id,text\n1,x\n"}),
            error="has no column that looks like 'file'",
        ),
        Given(
            what="a folder on another file system",
            make=_in_memory({"a b.jpg": _photo(), "a b.txt": b"a cup", "sub/#1.png": turned(6), ".hidden/c.jpg": b""}),
            outcomes={"a cup": "success", "#1": "success"},
            urls={"a cup": "/a%20b.jpg", "#1": "/sub/%231.png"},
        ),
        Given(
            what="a folder of tars on another file system",
            make=_in_memory({"0.tar": b"", "0_stats.json": b"{}"}),
            error="is not readable as the list that its name says: it seems to be an empty file",
        ),
        Given(
            what="a list on another file system",
            make=_in_memory({"part.csv": b"url,caption\nfile:///etc/passwd,x\n"}),
            outcomes={"x": "blocked_scheme"},
        ),
        Given(what="a folder of nothing", make=str, error="has no images, named .jpg"),
        Given(
            what="a folder of something else",
            make=lambda folder: str((folder / "data.arrow").write_bytes(b"x") and folder),
            error="; it has 'data.arrow'",
        ),
        Given(what="an empty prefix", make=lambda folder: f"memory:/{folder}/none", error="a URL list is a file, or"),
    ]


GIVEN = [*_tables(), *_tars(), *_folders()]
