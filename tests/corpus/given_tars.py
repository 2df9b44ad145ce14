"""Tars of images that people have already: shards by img2dataset and others, and what may be wrong with them."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from tests.corpus.given import Given, of_every_kind, photo
from tests.corpus.photos import encoded, scene, turned


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
    good = [("0.jpg", photo()), ("0.txt", b"a cup")]
    hostile = ["../../up.jpg", "/abs.jpg", "a/./b.jpg", "sub/c.jpg", "d\n.jpg", "e\x1b[2J.jpg", "f?row=1&column=x.jpg"]
    kinds = of_every_kind()
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
            make=_tar(
                [("0.png", encoded(scene((60, 90)), "PNG")), ("0.json", b'{"text": "a", "licence": "MIT", "image": 0}')]
            ),
            outcomes={"a": "success"},
        ),
        Given(what="a tar without captions", make=_tar(good[:1]), error="has no column that looks like 'caption'"),
        Given(
            what="names that lead elsewhere",
            make=_tar([it for name in hostile for it in ((name, photo()), (name[:-3] + "txt", repr(name).encode()))]),
            outcomes={repr(name): "success" for name in hostile},
            urls={repr(hostile[0]): "/00000.tar#../../up.jpg", repr(hostile[4]): "#d%0A.jpg"},
        ),
        Given(
            what="a name that is not UTF-8",
            make=_tar([("caf\udce9.jpg", photo()), ("caf\udce9.txt", b"x")]),
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
                        for end, content in ((".jpg", photo(number)), (".txt", b"%d" % number))
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
                    ("2.jpg", photo(2)),
                    ("3.jpg", photo()),
                    ("3.png", photo()),
                    ("3.txt", b"two"),
                    ("4.jpg", photo()),
                    ("4.txt", b"\xff"),
                    ("5.jpg", photo(5)),
                    ("5.json", b"[1]"),
                    ("5.txt", b"x"),
                    *(
                        (f"{number}{end}", content)
                        for number in range(6, 11)
                        for end, content in ((".jpg", photo(number)), (".txt", b"%d" % number))
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
            make=_tar([("0.jpg", photo()), ("0.depth.png", b"depth"), ("0.cls", b"7"), ("0.txt", b"x")]),
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


TARS = _tars()
