import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagerag.corpus.url_list import SCHEMA, BadRows, UrlColumns, read_url_list
from imagerag.errors import UserError

ROWS = [("https://Photos.example/a.jpg", "an apple"), ("http://user@b.example:8000/b", 'a "pear", green\nand round')]


def write(folder: Path, name: str, content: bytes | pa.Table) -> str:
    path = folder / name
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


def as_csv() -> bytes:
    quoted = b'"a ""pear"", green\nand round"'
    return b"url,caption\nhttps://Photos.example/a.jpg,an apple\nhttp://user@b.example:8000/b," + quoted + b"\n"


def as_jsonl() -> bytes:
    return b"\n\n".join(json.dumps({"url": url, "caption": caption, "other": 1}).encode() for url, caption in ROWS)


def as_parquet() -> pa.Table:
    return pa.table(
        {"url": [url for url, _ in ROWS], "caption": [caption for _, caption in ROWS], "other": [[1], None]}
    )


def error_of(uri: str, columns: UrlColumns | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_url_list(uri, columns)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.parquet", as_parquet()),
        ("list.csv", as_csv()),
        ("list.csv.gz", as_csv()),
        ("list.jsonl", as_jsonl()),
        ("list.jsonl.gz", as_jsonl()),
    ],
)
def test_formats(tmp_path: Path, name: str, content: bytes | pa.Table) -> None:
    table = read_url_list(write(tmp_path, name, content)).rows.table()
    optional = {"licence": None, "sha256": None, "folder": None, "member": None}
    assert table.schema == SCHEMA
    assert table.to_pylist() == [
        {"url": ROWS[0][0], "caption": ROWS[0][1], "source": "photos.example"} | optional,
        {"url": ROWS[1][0], "caption": ROWS[1][1], "source": "b.example"} | optional,
    ]


def test_any_file_system() -> None:
    with fsspec.open("memory://lists/list.csv", "wb") as file:
        file.write(as_csv())
    assert read_url_list("memory://lists/list.csv").rows.table().num_rows == 2


def test_usual_names_and_optional_columns(tmp_path: Path) -> None:
    sha256 = "AB" * 32
    content = (
        f"TEXT,License,SHA256,URL,source\nan apple,MIT,{sha256},http://a.example/,mine\na pear,,,http://b.example/,\n"
    )
    apple, pear = read_url_list(write(tmp_path, "list.csv", content.encode())).rows.table().to_pylist()
    assert (apple["licence"], apple["sha256"], apple["source"]) == ("MIT", sha256.lower(), "mine")
    assert (pear["licence"], pear["sha256"], pear["source"]) == (None, None, "b.example")


def test_named_columns_come_before_guesses(tmp_path: Path) -> None:
    uri = write(tmp_path, "list.csv", b"url,caption,big_url\nhttp://small.example,an apple,http://big.example\n")
    assert read_url_list(uri, UrlColumns(url="big_url")).rows.table()["url"].to_pylist() == ["http://big.example"]


def test_texts_that_look_like_something_else_stay_texts(tmp_path: Path) -> None:
    captions = ["2024", "2020-01-01", "null", "true"]
    rows = [{"url": f"http://a.example/{caption}", "caption": caption} for caption in captions]
    as_csv = "url,caption\n" + "".join(f"{row['url']},{row['caption']}\n" for row in rows)
    as_jsonl = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (("list.csv", as_csv), ("list.jsonl", as_jsonl)):
        assert read_url_list(write(tmp_path, name, content.encode())).rows.table()["caption"].to_pylist() == captions


def test_dictionary_encoded_columns(tmp_path: Path) -> None:
    captions = pa.array(["an apple", "an apple"]).dictionary_encode()
    uri = write(
        tmp_path, "list.parquet", pa.table({"url": ["http://a.example/1", "http://a.example/2"], "text": captions})
    )
    assert read_url_list(uri).rows.table()["caption"].to_pylist() == ["an apple", "an apple"]


def test_the_same_pair_is_folded_and_the_same_url_with_another_caption_is_not(tmp_path: Path) -> None:
    uri = write(
        tmp_path, "list.csv", b"url,text,license\nu://a,x,first\nu://a,y,\nu://a,x,second\nu://b,x,\nu://a,x,\n"
    )
    urls = read_url_list(uri)
    assert urls.num_duplicates == 2
    pairs = [(row["url"], row["caption"], row["licence"]) for row in urls.rows.table().to_pylist()]
    assert pairs == [("u://a", "x", "first"), ("u://a", "y", None), ("u://b", "x", None)]


def test_missing_file(tmp_path: Path) -> None:
    assert error_of(f"{tmp_path}/no.csv") == f"there is no URL list at {tmp_path}/no.csv"


def test_unknown_format_and_unknown_file_system() -> None:
    assert "a URL list is a file, or a folder or a glob of files, named .parquet, .csv" in error_of("list.xlsx")
    assert "nosuch://list.csv is not readable" in error_of("nosuch://list.csv")


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_a_truncated_gzip_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(as_csv() if "csv" in name else as_jsonl())[:-12])
    assert "is not readable" in error_of(str(path))


def test_no_caption_column(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, "list.csv", b"url,words\nu://a,x\n"))
    assert (
        "list.csv has no column that looks like 'caption': say which of its columns ['url', 'words'] it is" in message
    )


def test_named_column_is_not_there_or_twice(tmp_path: Path) -> None:
    uri = write(tmp_path, "list.csv", b"url,text,text\nu://a,x,y\n")
    assert "has 0 columns 'alt' instead of 1; it has ['url', 'text', 'text']" in error_of(
        uri, UrlColumns(caption="alt")
    )
    assert "has 2 columns 'text' instead of 1" in error_of(uri)


@pytest.mark.parametrize("parts", ["*.parquet", "part-?.parquet", ""])
def test_parts_are_one_list(tmp_path: Path, parts: str) -> None:
    for number, late in enumerate(({}, {"license": ["MIT"]})):
        table = pa.table({"url": [f"http://a.example/{number}"], "caption": ["x"]} | late)
        pq.write_table(table, tmp_path / f"part-{number}.parquet")
    (tmp_path / "README.md").write_text("not a part")
    rows = read_url_list(f"{tmp_path}/{parts}").rows.table().to_pylist()
    assert [(row["url"][-1], row["licence"]) for row in rows] == [("0", None), ("1", "MIT")]


def test_a_column_that_appears_late_is_read(tmp_path: Path) -> None:
    lines = [{"url": f"http://a.example/{number}", "caption": "x"} for number in range(10_100)]
    lines[-1] |= {"licence": "MIT"}
    uri = write(tmp_path, "list.jsonl", "\n".join(map(json.dumps, lines)).encode())
    assert read_url_list(uri).rows.table()["licence"].drop_null().to_pylist() == ["MIT"]


def test_the_first_bad_row_can_stop_a_run(tmp_path: Path) -> None:
    uri = write(tmp_path, "list.csv", b"url,text\nu://a,x\nu://b,\nu://c,y\n")
    with pytest.raises(UserError, match=r"list\.csv, row 2 has a caption that is empty; `on_bad_row` is stop"):
        read_url_list(uri, bad_rows=BadRows(on_bad_row="stop"))


def test_a_wrong_column_is_found_out_before_the_whole_list_is_read(tmp_path: Path) -> None:
    text = "url,text\n" + 120_000 * "apple,x\n"
    uri = write(tmp_path, "list.csv", text.encode())
    with pytest.raises(
        UserError, match=r"list\.csv: 100,000 of 100,000 rows are bad, more than the 50% .* row 1 has a url"
    ):
        read_url_list(uri)
    with pytest.raises(UserError, match="has no rows that could be used"):
        read_url_list(uri, bad_rows=BadRows(max_share=1))


def test_the_share_of_bad_rows_is_that_of_the_whole_list(tmp_path: Path) -> None:
    """Even if it is sorted, and its bad rows come first."""
    rows = [f"http://a.example/{number},{'x' * (number >= 12_000)}" for number in range(30_000)]
    uri = write(tmp_path, "list.csv", "\n".join(["url,text", *rows]).encode())
    assert read_url_list(uri, bad_rows=BadRows(max_share=0.4)).num_invalid == 12_000
    with pytest.raises(UserError, match="12,000 of 30,000 rows are bad, more than the 39%"):
        read_url_list(uri, bad_rows=BadRows(max_share=0.39))


def test_the_share_of_bad_rows_is_that_of_a_whole_table_of_images(tmp_path: Path) -> None:
    images = pa.table({"image": [b"an image"] * 500, "caption": ["", *map(str, range(499))]})
    uri = write(tmp_path, "list.parquet", images)
    assert read_url_list(uri, bad_rows=BadRows(max_share=0.01)).num_invalid == 1
