"""Folders of images that people have already, with their metadata, here and on another file system."""

from collections.abc import Callable, Mapping
from pathlib import Path

import fsspec

from tests.corpus.given import Given, photo
from tests.corpus.photos import turned


def _image_folder(metadata: Mapping[str, str]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        for number, name in enumerate(("train/a.jpg", "train/sub/b.jpg", "test/a.jpg", "test/c.jpg")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(photo(number))
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
    head = "file_name,text\n"
    train = f"{head}a.jpg,a cup\nsub/b.jpg,a mug\n"
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
            make=_image_folder({"train/metadata.csv": train, "test/metadata.csv": f"{head}a.jpg,a jug\n"}),
            outcomes={"a cup": "success", "a mug": "success", "a jug": "success"},
            invalid=("'test/c.jpg' of",),
        ),
        Given(
            what="an imagefolder with a split whose only row is bad",
            make=_image_folder(
                {"train/metadata.csv": f"{train}sub/b.jpg,a pot\n", "test/metadata.csv": f"{head}a.jpg,\n"}
            ),
            outcomes={"a cup": "success", "a mug": "success", "a pot": "success"},
            invalid=("row 1 has a caption that is empty", "'test/a.jpg' of", "'test/c.jpg' of"),
        ),
        Given(
            what="metadata without names of files",
            make=_image_folder({"train/metadata.csv": "id,text\n1,x\n"}),
            error="has no column that looks like 'file'",
        ),
        Given(
            what="a folder on another file system",
            make=_in_memory({"a b.jpg": photo(), "a b.txt": b"a cup", "sub/#1.png": turned(6), ".hidden/c.jpg": b""}),
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


FOLDERS = _folders()
