import io
import os
import tarfile
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path

import fsspec
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagerag.corpus.guard import FetchError, Reason, reason_of
from imagerag.corpus.source import read_images
from imagerag.corpus.stores import FolderOpener, member_of
from imagerag.errors import UserError
from tests.corpus.web import picture
from tests.object_store import BUCKET, object_store

MAX_BYTES = 100


def failure_in(folder: object, member: str) -> Reason:
    with pytest.raises(FetchError) as caught:
        FolderOpener(str(folder), MAX_BYTES).open(member).read()
    return reason_of(str(caught.value))


def test_only_files_of_the_folder_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    (folder / "sub").mkdir(parents=True)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    inside = folder / "sub" / "50% #1?.png"
    inside.write_bytes(b"bytes")
    (folder / "link.png").symlink_to(inside)
    store = FolderOpener(str(folder), 5)
    assert store.open(member_of("sub/50% #1?.png")).read() == b"bytes"
    assert store.open("link.png").read() == b"bytes"

    (folder / "out.png").symlink_to(secret)
    (tmp_path / "a folder too").mkdir()
    (tmp_path / "a folder too" / "x.png").write_bytes(b"secret")
    os.mkfifo(folder / "pipe.png")
    outside = ("out.png", "../secret.png", "%2e%2e/secret.png", "../a%20folder%20too/x.png", str(secret))
    assert {member: failure_in(folder, member) for member in outside} == dict.fromkeys(outside, Reason.OUTSIDE_FOLDER)
    no_files = ("none.png", "sub", "pipe.png", "a%00.png", "")
    assert {it: failure_in(folder, it) for it in no_files} == dict.fromkeys(no_files, Reason.UNREADABLE_FILE)
    inside.write_bytes(bytes(MAX_BYTES + 1))
    assert failure_in(folder, member_of("sub/50% #1?.png")) is Reason.TOO_MANY_BYTES


def test_a_file_and_a_part_of_one_on_any_file_system() -> None:
    with fsspec.open("memory://stores/sub/a b.png", "wb") as file:
        file.write(b"0123456789")
    store = FolderOpener("memory://stores", 10)
    assert store.open(member_of("sub/a b.png")).read() == b"0123456789"
    assert store.open(member_of("sub/a b.png", offset=3, size=4)).read() == b"3456"
    assert FolderOpener("memory://stores", 10).open(member_of("sub/a b.png")).length == 10
    for member in (member_of("sub/none.png"), member_of("sub/none.png", offset=0, size=1), "sub/a%20b.png?offset=x"):
        assert failure_in("memory://stores", member) is Reason.UNREADABLE_FILE
    with fsspec.open("memory://stores/large.png", "wb") as file:
        file.write(bytes(MAX_BYTES + 1))
    for member in ("large.png", member_of("large.png", offset=0, size=MAX_BYTES + 1)):
        assert failure_in("memory://stores", member) is Reason.TOO_MANY_BYTES


@pytest.mark.parametrize("kind", ["bytes", "struct"])
@pytest.mark.parametrize("rows_in_a_group", [7, 1000])
def test_rows_of_parquet_in_any_order(tmp_path: Path, kind: str, rows_in_a_group: int) -> None:
    cells = [None if row == 700 else f"image {row}".encode() for row in range(1000)]
    values = cells if kind == "bytes" else [{"path": None, "bytes": cell} for cell in cells]
    pq.write_table(pa.table({"x": values, "n": range(1000)}), tmp_path / "p.parquet", row_group_size=rows_in_a_group)
    store = FolderOpener(str(tmp_path), MAX_BYTES)

    def read(row: int) -> bytes:
        return store.open(member_of("p.parquet", row=row, column="x")).read()

    rows = [*range(690), 3, 999, 0, 500, 998]
    assert [read(row) for row in rows] == [cells[row] for row in rows]
    with ThreadPool(16) as pool:
        assert pool.map(read, range(690), chunksize=1) == cells[:690]
    for member in (member_of("p.parquet", row=700, column="x"), member_of("p.parquet", row=1000, column="x")):
        assert failure_in(tmp_path, member) is Reason.UNREADABLE_FILE
    assert failure_in(tmp_path, member_of("p.parquet", row=1, column="y")) is Reason.UNREADABLE_FILE


def test_a_parquet_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"x": [b"0", b"1", b"2", b"3"]}), tmp_path / "p.parquet")
    opened, lock = [], threading.Lock()
    original = pq.ParquetFile

    def counting(*args: object, **options: object) -> pq.ParquetFile:
        with lock:
            opened.append(args)
        return original(*args, **options)

    monkeypatch.setattr(pq, "ParquetFile", counting)
    store = FolderOpener(str(tmp_path), MAX_BYTES)
    with ThreadPool(4) as pool:
        pool.map(lambda row: store.open(member_of("p.parquet", row=row, column="x")).read(), range(4), chunksize=1)
    assert len(opened) == 1


def test_rows_of_the_version_of_a_lance_table_that_was_listed(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.lance")
    listed = lance.write_dataset(pa.table({"x": [b"0", b"1"]}), uri)
    lance.write_dataset(pa.table({"x": [b"new"]}), uri, mode="overwrite")
    store = FolderOpener(uri, MAX_BYTES)
    assert store.open(member_of("", row=1, column="x", version=listed.version)).read() == b"1"
    for row, version in ((2, 1), (0, 9)):
        assert failure_in(uri, member_of("", row=row, column="x", version=version)) is Reason.UNREADABLE_FILE


def test_an_object_store(tmp_path: Path) -> None:
    with object_store():
        folder = f"{BUCKET}/given"
        fs = fsspec.filesystem("s3")
        fs.pipe_file(f"{folder}/pictures/a b#.jpg", picture(1))
        fs.pipe_file(f"{folder}/pictures/a b#.txt", b"a cup")
        for name in ("00000.tar", "00001.tar"):
            fs.pipe_file(f"{folder}/tars/{name}", _tar_of({"0.jpg": picture(2), "0.txt": b"a mug"}))
        pq.write_table(pa.table({"image": [picture(3)], "text": ["a jug"]}), tmp_path / "p.parquet")
        fs.put(str(tmp_path / "p.parquet"), f"{folder}/data/p.parquet")
        found = {}
        for part in ("pictures/", "tars", "tars/*1.tar", "data"):
            rows = read_images(f"s3://{folder}/{part}").rows.table().to_pylist()
            found[part] = [
                (row["caption"], FolderOpener(row["folder"], 2**20).open(row["member"]).read()) for row in rows
            ]
        assert found == {
            "pictures/": [("a cup", picture(1))],
            "tars": [("a mug", picture(2))] * 2,
            "tars/*1.tar": [("a mug", picture(2))],
            "data": [("a jug", picture(3))],
        }
        with pytest.raises(UserError, match=f"s3://{folder}/none"):
            read_images(f"s3://{folder}/none")


def _tar_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
