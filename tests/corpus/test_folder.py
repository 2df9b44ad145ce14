import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.download import download
from imagerag.corpus.source import read_images
from imagerag.corpus.url_list import UrlColumns, read_url_list
from imagerag.errors import UserError
from imagerag.settings import Settings
from imagerag.storage.digests import sha256_of
from tests.corpus.web import picture
from tests.corpus.whole import attempts_of, images_of

MAX_BYTES = 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, and what is not for a corpus."""
    folder = tmp_path / "my images"
    (folder / "cups" / "old").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    formats = {"red_mug-2.jpg": "JPEG", "cups/blue cup.PNG": "PNG", "cups/old/50% #1?.webp": "WEBP"}
    for seed, (name, image_format) in enumerate(formats.items()):
        (folder / name).write_bytes(picture(seed, image_format=image_format))
    for name in (".hidden.png", ".thumbnails/red_mug-2.jpg", "notes.md"):
        (folder / name).write_bytes(b"no image")
    return folder


def captions_in(folder: Path, text: str) -> str:
    path = folder.parent / "captions.csv"
    path.write_text(text)
    return str(path)


def error_of(source: Path | str, captions: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_images(str(source), captions)
    return str(caught.value)


def test_a_file_beside_the_image_is_its_caption_and_else_its_name(folder: Path) -> None:
    (folder / "cups" / "blue cup.txt").write_text("\ufeffa blue cup,\non a table\n", encoding="utf-8")
    images = read_images(str(folder))
    rows = {row["url"]: row for row in images.rows.table().to_pylist()}
    assert {url: row["caption"] for url, row in rows.items()} == {
        f"file://{folder.parent}/my%20images/red_mug-2.jpg": "red mug 2",
        f"file://{folder.parent}/my%20images/cups/blue%20cup.PNG": "a blue cup,\non a table",
        f"file://{folder.parent}/my%20images/cups/old/50%25%20%231%3F.webp": "50% #1?",
    }
    first = rows[(folder / "red_mug-2.jpg").as_uri()]
    assert (first["source"], first["licence"], first["folder"]) == ("my images", None, str(folder))
    assert first["sha256"] == sha256_of(folder / "red_mug-2.jpg")
    assert images.num_named_by_file == 2


def test_it_says_how_many_images_it_has_read(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    read_images(str(folder), on_progress=lambda done, total, note="": told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_table_of_captions_with_its_other_columns(folder: Path) -> None:
    captions = captions_in(
        folder,
        "Image_Path,text,license,source\nred_mug-2.jpg,a mug,MIT,\n./red_mug-2.jpg,a cup,,shop\nred_mug-2.jpg,a mug,,\n"
        f"{folder}/cups/blue cup.PNG,blue,,\ncups/old/50% #1?.webp,half,,\n",
    )
    images = read_images(str(folder), captions)
    rows = [(row["caption"], row["licence"], row["source"]) for row in images.rows.table().to_pylist()]
    assert rows == [
        ("a mug", "MIT", "my images"),
        ("a cup", None, "shop"),
        ("blue", None, "my images"),
        ("half", None, "my images"),
    ]
    assert (images.num_duplicates, images.num_named_by_file) == (1, 0)
    named = captions_in(folder, "file,what,text\nx,red_mug-2.jpg,a\nx,cups/blue cup.PNG,b\nx,cups/old/50% #1?.webp,c\n")
    assert read_images(str(folder), named, UrlColumns(url="what")).rows.table().num_rows == 3


ROWS = "red_mug-2.jpg,a mug\ncups/blue cup.PNG,b\ncups/old/50% #1?.webp,c\n"


@pytest.mark.parametrize("name", ["../secret.png", "cups/../../secret.png", "/etc/passwd", ".."])
def test_captions_cant_name_what_lies_outside(folder: Path, name: str) -> None:
    (folder.parent / "secret.png").write_bytes(picture(7))
    images = read_images(str(folder), captions_in(folder, f"file,caption\n{name},a secret\n{ROWS}"))
    assert sorted(images.rows.table()["caption"].to_pylist()) == ["a mug", "b", "c"]
    assert images.invalid == (f"'{name}' lies outside {folder}",)


def test_images_and_captions_that_dont_match_are_counted(folder: Path) -> None:
    def refused(text: str, num_good: int) -> tuple[str, ...]:
        images = read_images(str(folder), captions_in(folder, text))
        assert (images.rows.table().num_rows, images.num_invalid) == (num_good, images.num_rows - num_good)
        return images.invalid

    two = ROWS.rpartition("cups/old")[0]
    assert refused(f"file,caption\n{two}", 2) == (f"'cups/old/50% #1?.webp' of {folder} has no row",)
    said = f"is no image in {folder}; file names count from the folder"
    assert refused(f"file,caption\n{ROWS}.hidden.png,d\n0.png,x\n", 3) == (f"'.hidden.png' {said}", f"'0.png' {said}")
    assert refused(f"file,caption\n{ROWS}red_mug-2.jpg,\n", 3) == ("row 4 has a caption that is empty",)
    rows = "".join(f"{line},{'ab' * 32 if 'mug' in line else ''}\n" for line in ROWS.splitlines())
    assert refused(f"file,caption,sha256\n{rows}", 2) == (
        "'red_mug-2.jpg' has another SHA-256 than the captions state",
    )
    many = "".join(f"{number}.png,x\n" for number in range(7))
    assert "7 of 10 rows are bad" in error_of(folder, captions_in(folder, f"file,caption\n{ROWS}{many}"))
    message = error_of(folder, captions_in(folder, "name,caption\nred_mug-2.jpg,a\n"))
    assert "has no column that looks like 'file': say which of its columns ['name', 'caption'] it is" in message


def test_a_folder_of_parts_is_a_list(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a.example/"], "caption": ["x"]}), tmp_path / "part-0.parquet")
    assert read_images(str(tmp_path)).rows.table()["caption"].to_pylist() == ["x"]


def test_what_is_no_folder_of_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"there is no folder {tmp_path}/none on this machine; a list is a file" in error_of(tmp_path / "none")
    assert f"{tmp_path}/empty has no images, named .jpg" in error_of(tmp_path / "empty")
    assert error_of(folder, "no.csv") == "there is no captions file at no.csv"
    assert "a captions file is a file, or a folder or a glob of files, named .parquet" in error_of(
        folder, "captions.md"
    )
    assert "captions (c.csv) go with a folder of images; urls.csv is a list" in error_of("urls.csv", "c.csv")


@pytest.mark.parametrize("kind", ["file", "folder", "nothing", "pipe", "name"])
def test_what_leads_out_of_the_folder_or_is_no_file_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret.png").write_bytes(picture(7))
    odd = folder / ("odd.png" if kind != "folder" else "odd")
    match kind:
        case "file":
            odd.symlink_to(tmp_path / "secret.png")
        case "folder":
            odd.symlink_to(tmp_path)
        case "nothing":
            odd.symlink_to(folder / "none.png")
        case "pipe":
            os.mkfifo(odd)
        case "name":
            Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff.png")).write_bytes(picture(7))
    message = error_of(folder)
    assert "has what can't be read, 'odd" in message
    assert "links have to stay in the folder" in message


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_metadata_that_leads_out_of_the_folder_or_is_no_file_is_refused(folder: Path, kind: str, name: str) -> None:
    if kind == "link":
        (folder / "cups" / name).symlink_to(captions_in(folder, "file,caption\nblue cup.PNG,a secret\n"))
    else:
        os.mkfifo(folder / "cups" / name)
    assert f"has what can't be read, 'cups/{name}': links have to stay in the folder" in error_of(folder)


def test_links_within_the_folder_are_fine(folder: Path) -> None:
    (folder / "mug again.jpg").symlink_to("red_mug-2.jpg")
    (folder / "same cups").symlink_to("cups")
    images = read_images(str(folder))
    assert sorted(images.rows.table()["caption"].to_pylist()) == ["50% #1?", "blue cup", "mug again", "red mug 2"]
    (folder / "captions.csv").write_text(f"file,caption\n{ROWS}mug again.jpg,d\n")
    (folder / "metadata.csv").symlink_to("captions.csv")
    assert sorted(read_images(str(folder)).rows.table()["caption"].to_pylist()) == ["a mug", "b", "c", "d"]


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"x" * 70_000])
def test_a_caption_beside_an_image_has_to_be_text(folder: Path, content: bytes) -> None:
    (folder / "red_mug-2.txt").write_bytes(content)
    assert f"{folder}/red_mug-2.txt " in error_of(folder)


def test_a_caption_beside_an_image_cant_lead_out(folder: Path) -> None:
    (folder / "red_mug-2.txt").symlink_to("/etc/passwd")
    assert f"red_mug-2.txt has to be a regular file in {folder}" in error_of(folder)


@pytest.mark.engines
@pytest.mark.usefixtures("ray_session")
def test_a_folder_becomes_a_corpus_and_stays_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    corpus, settings = Corpus(str(tmp_path / "shards")), Settings(home=tmp_path)
    config = DownloadConfig(max_bytes=MAX_BYTES, max_pixels=200 * 200, thread_count=2, image_format="png")
    bad = {
        "drawing.gif": (b"<svg/>", "unsupported_format"),
        "page.png": (b"<html>", "unsupported_format"),
        "cut.png": (picture(4, image_format="PNG")[:20], "corrupt_image"),
        "bomb.png": (picture(5, (300, 300), "PNG"), "too_many_pixels"),
        "huge.png": (picture(6, image_format="PNG") + bytes(MAX_BYTES), "too_many_bytes"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)

    def settle(captions: str | None = None, **options: str) -> tuple[int, dict[str, int], list[str]]:
        images = read_images(str(folder), captions)
        done = download(images, corpus=corpus, config=config, settings=settings, **options)  # type: ignore[arg-type]
        return done.num_fetched, dict(done.reasons), sorted(images_of(corpus)["caption"].to_pylist())

    reasons = {"corrupt_image": 1, "too_many_bytes": 1, "too_many_pixels": 1, "unsupported_format": 2}
    everything = ["50% #1?", "blue cup", "red mug 2"]
    assert settle() == (8, reasons, everything)
    found = {row["url"].rpartition("/")[2]: row["reason"] for row in attempts_of(corpus).to_pylist()}
    assert {name: reason for name, reason in found.items() if reason} == {name: it for name, (_, it) in bad.items()}
    assert settle() == (0, reasons, everything)

    # Changed, mended, new, grown too large and gone; nothing else is read again.
    (folder / "red_mug-2.jpg").write_bytes(picture(100))
    (folder / "cut.png").write_bytes(picture(4, image_format="PNG"))
    (folder / "new.png").write_bytes(picture(8, image_format="PNG"))
    (folder / "cups" / "blue cup.PNG").write_bytes(bad["huge.png"][0])
    for name in ("cups/old/50% #1?.webp", "drawing.gif", "page.png", "bomb.png", "huge.png"):
        (folder / name).unlink()
    assert settle(mode="replace") == (4, {"too_many_bytes": 1}, ["cut", "new", "red mug 2"])
    shas = dict(zip(*(images_of(corpus)[name].to_pylist() for name in ("caption", "sha256")), strict=True))
    assert shas["red mug 2"] == sha256_of(folder / "red_mug-2.jpg")

    # A list may not name the corpus's own files, nor any other, whatever columns it has.
    urls = tmp_path / "urls.csv"
    secret = (folder / "new.png").as_uri()
    urls.write_text(f"url,caption,folder\n{secret},mine now,{folder}\nfile:///etc/passwd,a secret,/etc\n")
    hostile = download(read_url_list(str(urls)), corpus=corpus, config=config, settings=settings)
    assert (hostile.num_success, hostile.reasons) == (3, {"blocked_scheme": 2, "too_many_bytes": 1})
