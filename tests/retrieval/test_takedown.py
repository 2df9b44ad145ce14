from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from lance.file import LanceFileReader

from imagerag.errors import UserError
from imagerag.retrieval.ann import read_record
from imagerag.retrieval.blocklist import block, count_blocked
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.pins import pin, pins
from imagerag.retrieval.publish import (
    PublishConfig,
    publish,
    published_rows,
    published_version,
    require_published,
    rollback,
    status,
)
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import remove_rows
from imagerag.storage.hexadecimal import to_hex
from tests.retrieval.rows import DIM, append, embeddings, index_and_publish, make_rows

SECRET = np.random.default_rng(3).bytes(3_000)
"""An image's bytes, which no encoding makes shorter."""
CAPTION = "xylographic"


def files_with(store: Store, content: bytes) -> list[Path]:
    files = [path for path in Path(store.uri).rglob("*") if path.is_file()]
    assert files
    return [path for path in files if content in path.read_bytes()]


@pytest.fixture
def history(store: Store) -> Store:
    """Three publications, the secret row in each, and a killed writer's copy of it."""
    secret = make_rows(0, 1, image=[SECRET], caption=[CAPTION])
    append(store, secret)
    for start in (1, 11, 21):
        append(store, make_rows(start, start + 10))
        index_and_publish(store)
    store.write_fragments(secret)
    return store


def test_takedown_leaves_no_trace(history: Store) -> None:
    assert files_with(history, SECRET)
    assert files_with(history, CAPTION.encode())
    (row,) = history.dataset().to_table(filter=f"caption = '{CAPTION}'").to_pylist()
    embedding = np.array(row["image_embed"], np.float32).tobytes()
    assert files_with(history, embedding)

    removal = remove_rows(history, urls=[row["url"]])

    assert (removal.ids, removal.urls, removal.image_sha256s) == (
        (row["id"].hex(),), (row["url"],), (row["image_sha256"].hex(),),
    )  # fmt: skip
    assert (removal.num_rows, removal.version, removal.published) == (1, published_version(history), True)
    for trace in (SECRET, CAPTION.encode(), embedding):
        assert files_with(history, trace) == []
    assert published_rows(history) == history.count() == 30


@pytest.mark.parametrize("column", ["ids", "urls", "image_sha256s"])
def test_takedown_rewrites_fragments_that_are_too_large_to_be_merged(store: Store, column: str) -> None:
    """And those of which a re-indexing deleted the row: it is in no version any more, and in a file still."""
    (left_before, taken) = (np.random.default_rng(seed).bytes(3_000) for seed in (4, 5))
    sizes = (2_060, 2_060, 700)
    for number, start in enumerate(np.cumsum([0, *sizes[:-1]]).tolist()):
        rows = make_rows(start, start + sizes[number])
        images = rows["image"].to_pylist()
        images[9:11] = (left_before, taken) if number == 1 else images[9:11]
        append(store, make_rows(start, start + sizes[number], image=images))
    index_and_publish(store)
    (gone,) = store.dataset().to_table(filter="url = 'https://example.org/2069.png'").to_pylist()
    store.delete([gone["id"].hex(), *to_hex(make_rows(3, 4)["id"])])
    index_and_publish(store, PublishConfig(keep=1))
    others = [fragment.metadata.files[0].path for fragment in store.dataset().get_fragments()][::2]
    assert len(others) == 2
    assert files_with(store, left_before)
    assert files_with(store, taken)
    remove_rows(store, urls=["https://example.org/2070.png"])
    assert files_with(store, taken) == []
    assert store.count() == sum(sizes) - 3
    wanted = {"ids": gone["id"].hex(), "urls": gone["url"], "image_sha256s": gone["image_sha256"].hex()}
    assert remove_rows(store, **{column: [wanted[column]]}).num_rows == 0
    assert files_with(store, left_before) == []
    kept = {fragment.metadata.files[0].path for fragment in store.dataset().get_fragments()}
    assert kept.issuperset(others), "fragments without such rows are not rewritten"


def test_no_rollback_past_a_takedown(history: Store) -> None:
    before = [entry.version for entry in status(history).history]
    remove_rows(history, ids=to_hex(make_rows(5, 6)["id"]))
    assert [entry.version for entry in status(history).history] == [history.version]
    for version in (None, *before):
        with pytest.raises(UserError, match="publication that is kept"):
            rollback(history, to=version)
    assert len(history.dataset().versions()) == 1


def test_takedown_by_image_removes_every_row_of_it(store: Store) -> None:
    append(store, make_rows(0, 20))
    append(store, make_rows(20, 22, image=[SECRET, SECRET]))
    index_and_publish(store)
    removal = remove_rows(store, image_sha256s=to_hex(make_rows(20, 21, image=[SECRET])["image_sha256"]))
    assert removal.num_rows == 2
    assert set(removal.urls) == {"https://example.org/20.png", "https://example.org/21.png"}
    assert store.count() == 20


def test_takedown_finds_rows_that_only_an_older_publication_holds(history: Store) -> None:
    history.delete(make_rows(3, 4)["id"].combine_chunks())
    removal = remove_rows(history, urls=["https://example.org/3.png"])
    assert removal.num_rows == 1
    assert history.count() == 30


@pytest.mark.parametrize("shares_its_file", [True, False])
def test_takedown_of_an_indexed_table(store: Store, monkeypatch: pytest.MonkeyPatch, *, shares_its_file: bool) -> None:
    """No file of an index has a trace of the row, whether other rows of its data file stay or not."""
    monkeypatch.setattr("imagerag.retrieval.index._NUM_QUERIES", 20)  # recall is not what is tested
    own = {"url": ["https://gone.example/0815"], "source": ["its source"], "licence": ["its licence"]}
    parts = [make_rows(0, 2_060), make_rows(2_060, 2_061, caption=[CAPTION], **own), make_rows(2_061, 4_121)]
    for rows in [pa.concat_tables(parts)] if shares_its_file else parts:  # the large ones are not merged with others
        append(store, rows)
    index = build_index(store, IndexConfig(exact_below=1_000))
    assert index.kind == "IVF_SQ"
    assert publish(store, index, PublishConfig(min_recall=0.0)).published
    taken = store.dataset().to_table(filter=f"caption = '{CAPTION}'", with_row_id=True)
    (row,) = taken.to_pylist()
    traces = [row["id"], row["image_sha256"], row["url"].encode(), b"its source", b"its licence"]
    assert [trace for trace in traces if not index_files_with(store, trace)] == []
    before = read_record(store.dataset())

    remove_rows(store, ids=[row["id"].hex()])

    assert [trace for trace in traces if index_files_with(store, trace)] == []
    assert {row["_rowid"]} & rows_of_vector_indexes(store) == set()
    assert len(rows_of_vector_indexes(store)) == store.count() == 4_120
    after = read_record(store.dataset())
    assert before is not None
    assert after is not None
    assert (after.num_trained_rows, after.recalls) == (before.num_trained_rows, before.recalls), "nothing was retrained"
    found = Retriever(store.uri, store.name).search(embeddings(2_060, 2_061, DIM), 5)[0]
    assert len(found) == 5
    assert CAPTION not in {neighbour.caption for neighbour in found}


def index_files_with(store: Store, content: bytes) -> list[Path]:
    return [path for path in files_with(store, content) if "_indices" in path.parts]


def rows_of_vector_indexes(store: Store) -> set[int]:
    """Return the addresses of all rows in vector indexes; the same address is another row after a compaction."""
    files = list(Path(store.uri).rglob("auxiliary.idx"))
    assert len(files) == 2
    rows = [LanceFileReader(str(path)).read_all().to_table()["_rowid"].to_pylist() for path in files]
    assert rows[0]
    assert set(rows[0]) == set(rows[1])
    return set(rows[0])


def test_a_takedown_can_be_repeated(history: Store) -> None:
    """As after a kill at any of its steps: the first one blocks the values."""
    url = "https://example.org/1.png"
    assert remove_rows(history, urls=[url]).num_rows == 1
    assert remove_rows(history, urls=[url]).num_rows == 0
    assert published_rows(history) == 30


def test_a_takedown_that_was_killed_midway_is_finished(history: Store) -> None:
    ids = to_hex(history.dataset().to_table(columns=["id"], filter=f"caption = '{CAPTION}'")["id"])
    block(history, "id", ids)
    history.delete(ids)
    assert remove_rows(history, ids=ids).num_rows == 1
    assert files_with(history, SECRET) == []


def test_what_was_taken_down_is_not_published_again(history: Store) -> None:
    remove_rows(history, urls=["https://example.org/4.png"])
    # The same image and caption from another place is the same row, by its id.
    elsewhere = make_rows(4, 5, url=["https://example.org/copy.png"])
    assert count_blocked(history, history.dataset()) == 0
    append(history, elsewhere)
    assert count_blocked(history, history.dataset()) == 1
    refused = index_and_publish(history)
    assert [check.name for check in refused.checks if not check.passed] == ["takedown"]
    assert published_rows(history) == 30


def test_a_takedown_publishes_no_unchecked_rows(history: Store) -> None:
    append(history, make_rows(40, 41, text_embed=[np.full(DIM, np.nan)]))
    assert not index_and_publish(history).published
    removal = remove_rows(history, urls=["https://example.org/1.png"])
    assert removal.num_rows == 1
    assert published_rows(history) == 30
    assert history.dataset().count_rows("url = 'https://example.org/40.png'") == 0


def test_a_takedown_publishes_nothing_of_a_job_that_was_killed_halfway(history: Store) -> None:
    history.mark_unfinished()
    append(history, make_rows(40, 45))
    history.delete(history.dataset().to_table(columns=["id"], filter="url = 'https://example.org/2.png'")["id"])
    remove_rows(history, urls=["https://example.org/1.png"])
    urls = history.dataset(require_published(history)).to_table(columns=["url"])["url"].to_pylist()
    assert sorted(urls) == sorted(f"https://example.org/{number}.png" for number in range(31) if number != 1)
    append(history, make_rows(40, 45))
    assert index_and_publish(history).published, "the version that it returned to was whole"


def test_a_takedown_does_not_bring_back_what_a_person_rolled_back(history: Store) -> None:
    rollback(history)
    assert published_rows(history) == 21
    remove_rows(history, urls=["https://example.org/1.png"])
    assert published_rows(history) == 20


def test_a_table_that_was_never_published_stays_so(store: Store) -> None:
    append(store, make_rows(0, 5))
    store.mark_unfinished()
    removal = remove_rows(store, urls=["https://example.org/1.png"])
    assert (removal.num_rows, removal.published) == (1, False)
    assert (store.count(), published_version(store)) == (4, None)
    with pytest.raises(UserError, match="did not end"):
        index_and_publish(store)
    with pytest.raises(UserError, match="did not end"):
        publish(store, build_index(store, IndexConfig(), rewrite=True), PublishConfig())
    store.mark_finished()
    assert index_and_publish(store).num_rows == 4


def test_a_takedown_drops_all_pins_and_names_those_that_held_the_row(history: Store) -> None:
    first, *_, last = sorted(entry.version for entry in status(history).history)
    pin(history, first, "model-1")
    pin(history, last, "model-2")
    for start in (31, 41, 51, 61, 71):
        append(history, make_rows(start, start + 10))
        index_and_publish(history)
    assert first not in [entry.version for entry in status(history).history], "only the pin keeps it"
    removal = remove_rows(history, urls=["https://example.org/25.png"])
    assert (removal.pinned_by, removal.unpinned) == (("model-2",), ("model-1", "model-2"))
    assert pins(history) == {}
    assert len(history.dataset().versions()) == 1


def test_takedown_finds_rows_that_only_a_pinned_version_holds(history: Store) -> None:
    pin(history, history.version, "model-1")
    history.delete(make_rows(0, 30)["id"].combine_chunks())
    index_and_publish(history, PublishConfig(keep=1, max_shrink=1.0))
    assert Retriever(history.uri, history.name, version=pins(history)["model-1"]).num_rows == 31
    removal = remove_rows(history, urls=["https://example.org/7.png"])
    assert (removal.num_rows, removal.pinned_by) == (1, ("model-1",))
    assert files_with(history, b"picture number 7") == []
