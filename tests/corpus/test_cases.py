"""The table of cases: a file, a server's behaviour or a list's row, and what has to come of it."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagerag.corpus.config import DownloadConfig
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.fetch import fetch_shard
from imagerag.corpus.shards import PLAN_SCHEMA
from imagerag.corpus.source import read_images
from imagerag.corpus.url_list import read_url_list
from imagerag.errors import UserError
from tests.corpus.fetched import IMAGE_SIZE, MAX_BYTES, MAX_PIXELS, Fetched, planned
from tests.corpus.files import FILES
from tests.corpus.given import Given
from tests.corpus.given_folders import FOLDERS
from tests.corpus.given_tables import TABLES
from tests.corpus.given_tars import TARS
from tests.corpus.heic import HEIC
from tests.corpus.lists import LISTED, Listed
from tests.corpus.servers import SERVERS
from tests.corpus.web import Web
from tests.corpus.whole import attempts_of

GIVEN = [*TABLES, *TARS, *FOLDERS]
FETCHED = [*FILES, *HEIC, *SERVERS]
Outcomes = dict[str, tuple[dict[str, Any], bytes | None, bytes | None]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What one shard with all cases has for each: its row, its image as stored, and the file that was served."""
    corpus = Corpus(str(tmp_path_factory.mktemp("shards")))
    with Web() as web:
        served = {case.what: None if case.file is None else case.file() for case in FETCHED}
        rows = []
        for number, case in enumerate(FETCHED):
            file, path = served[case.what], f"/{number}"
            url = web.serve(path, file) if file is not None else case.serve(web, path)  # type: ignore[misc]
            rows.append({"url": url, "caption": case.what, "source": "test"})
        config = DownloadConfig(
            image_size=IMAGE_SIZE, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES, allowed_hosts=("127.0.0.1",),
            timeout_s=2, thread_count=32, per_host=32, retries=1, back_off_s=0.1, max_wait_s=60,
        )  # fmt: skip
        fetch_shard(corpus.shard(0), pa.Table.from_pylist(rows, PLAN_SCHEMA), config)
    with tarfile.open(corpus.shard(0).tar) as tar:
        stored = {
            member.name.removesuffix(".jpg"): tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.name.endswith(".jpg")
        }
    return {
        row["caption"]: (row, stored.get(row["key"]), served[row["caption"]]) for row in attempts_of(corpus).to_pylist()
    }


def test_every_case_has_a_name_and_a_row(outcomes: Outcomes) -> None:
    assert len(outcomes) == len({case.what for case in FETCHED}) == len(FETCHED) > 150


@pytest.mark.parametrize("case", FETCHED, ids=lambda case: case.what)
def test_fetched(outcomes: Outcomes, case: Fetched) -> None:
    row, stored, served = outcomes[case.what]
    assert (row["reason"] or row["status"]) == case.outcome, row["error_message"]
    if case.outcome != "success":
        assert case.detail in row["error_message"]
        assert stored is None
        return
    assert stored is not None
    image = Image.open(io.BytesIO(stored))
    assert image.size == (row["width"], row["height"]) == (case.size or image.size)
    assert image.getexif().get(0x0112, 1) not in range(2, 9), "readers that apply it would turn the picture again"
    if case.is_kept is not None:
        assert (stored == served) is case.is_kept
    if case.seen is not None:
        seen = case.seen().convert("RGB").resize(image.size, Image.Resampling.BOX)
        difference = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(seen, int))
        assert difference.mean() <= case.within, "another picture than people see"


@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.what)
def test_listed(tmp_path: Path, case: Listed) -> None:
    path = tmp_path / case.name
    if isinstance(case.file, pa.Table):
        pq.write_table(case.file, path)
    else:
        path.write_bytes(case.file.encode() if isinstance(case.file, str) else case.file)
    if case.error:
        with pytest.raises(UserError) as caught:
            read_url_list(str(path))
        assert case.error in str(caught.value)
        assert str(path) in str(caught.value)
        return
    found = read_url_list(str(path))
    assert list(zip(*(found.rows.table()[name].to_pylist() for name in ("url", "caption")), strict=True)) == list(
        case.rows
    )
    assert (found.num_invalid, found.num_duplicates) == (len(case.invalid), case.num_duplicates), found.invalid
    assert found.num_rows == len(case.rows) + len(case.invalid) + case.num_duplicates
    for said, expected in zip(found.invalid, case.invalid, strict=True):
        assert said.startswith(expected)


@pytest.mark.parametrize("case", GIVEN, ids=lambda case: case.what)
def test_given(tmp_path: Path, case: Given) -> None:
    (tmp_path / "given").mkdir()
    source = case.make(tmp_path / "given")
    if case.error:
        with pytest.raises(UserError) as caught:
            read_images(source)
        assert case.error in str(caught.value)
        return
    found = read_images(source)
    assert (found.num_invalid, found.num_duplicates) == (len(case.invalid), case.num_duplicates), found.invalid
    for said, expected in zip(found.invalid, case.invalid, strict=True):
        assert said.startswith(expected)
    corpus = Corpus(str(tmp_path / "shards"))
    config = DownloadConfig(
        image_size=IMAGE_SIZE, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES, thread_count=4, retries=0
    )
    fetch_shard(corpus.shard(0), planned(found.rows.table()), config)
    attempts = attempts_of(corpus).to_pylist()
    assert {row["caption"]: row["reason"] or row["status"] for row in attempts} == case.outcomes
    assert len(attempts) == found.rows.table().num_rows
    for row in attempts:
        assert row["url"].endswith(case.urls.get(row["caption"], ""))
        assert case.size in (None, (row["width"], row["height"]))
