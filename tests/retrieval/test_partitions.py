import pytest

from imagerag.retrieval import index, partitions
from imagerag.retrieval.ann import nearest
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.store import Store
from tests.devices import DEVICES
from tests.retrieval.rows import DIM, append, embeddings, make_rows

NUM_ROWS, NUM_PARTITIONS, K = 4_000, 40, 10


def share_found(store: Store, nprobes: int) -> float:
    """Share of the nearest neighbours of new queries that a search of so many partitions finds."""
    queries = embeddings(NUM_ROWS, NUM_ROWS + 100, DIM)
    found, exact = (
        {
            (row["query_index"], row["id"])
            for row in nearest(store.dataset(), "text_embed", queries, K, ["id"], probes).to_pylist()
        }
        for probes in (nprobes, None)
    )
    return len(found & exact) / len(exact)


@pytest.mark.parametrize("device", DEVICES)
def test_partitions_that_torch_trains_find_as_many_neighbours(store: Store, device: str) -> None:
    append(store, make_rows(0, NUM_ROWS))
    partitions.build_partitions(store.dataset(), "text_embed", NUM_PARTITIONS)
    by_lance = [share_found(store, nprobes) for nprobes in (1, 3)]
    centroids = partitions.train_on(device, store.dataset(), "text_embed", NUM_PARTITIONS)
    assert centroids.shape == (NUM_PARTITIONS, DIM)
    partitions.build_partitions(store.dataset(), "text_embed", NUM_PARTITIONS, centroids)
    by_torch = [share_found(store, nprobes) for nprobes in (1, 3)]
    assert by_lance[0] < by_lance[1] < 1, "otherwise, any partitions would do"
    assert by_torch == pytest.approx(by_lance, abs=0.08)


def test_a_build_says_how_long_training_takes_at_most(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_NUM_QUERIES", 20)
    append(store, make_rows(0, 1_600))
    notes = list[str]()
    build_index(store, IndexConfig(exact_below=1_000), lambda done, total, note="": notes.append(note))
    assert [note for note in notes if note.startswith("training 40 partitions of text_embed, at most ")]
    notes.clear()
    append(store, make_rows(1_600, 1_610))
    build_index(store, IndexConfig(exact_below=1_000), lambda done, total, note="": notes.append(note))
    assert not any("training" in note for note in notes), "new rows join the partitions"
