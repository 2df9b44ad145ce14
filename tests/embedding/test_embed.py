import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from imagerag.artifacts import Embedded
from imagerag.corpus.corpus import Corpus
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.embed import CorruptShardError, embed, read_images
from imagerag.embedding.encoder import load_encoder
from imagerag.embedding.encoder_files import resolve
from imagerag.errors import UserError
from imagerag.hspace.cache import cache_features
from imagerag.hspace.config import FeaturesConfig
from imagerag.progress import OnProgress, silent
from imagerag.retrieval.config import IndexConfig
from imagerag.retrieval.index import build_index
from imagerag.retrieval.publish import published_version
from imagerag.retrieval.schema import row_id
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from tests.corpus.whole import images_of
from tests.embedding.conftest import write_encoder
from tests.embedding.shards import Sample, sample, want, write_shard
from tests.jobs import use_jobs_here
from tests.retrieval.rows import index_and_publish

# The first sample's image and caption under another URL, and its image under another caption.
TWINS = (sample(30, seed=0, caption="picture 0"), sample(31, seed=0))


class World:
    """A corpus of two shards with ten samples each, and the table that is made of it."""

    def __init__(self, home: Path, encoder: Path | str) -> None:
        self.uri = home / "shards"
        self.store = Store(str(home / "index"), "test")
        self.settings = Settings(home=home)
        self.encoder = str(encoder)
        self.samples = [sample(number) for number in range(20)]
        if not self.uri.exists():
            for shard in range(2):
                write_shard(self.uri, shard, self.samples[10 * shard : 10 * shard + 10])
            want(self.uri, self.samples)

    def embed(self, on_progress: OnProgress = silent, max_shrink: float = 0.5, **config: Any) -> Embedded:
        return embed(
            corpus=Corpus(str(self.uri)),
            store=self.store,
            encoder=self.encoder,
            config=EmbedConfig(device="cpu", **config),
            settings=self.settings,
            on_progress=on_progress,
            max_shrink=max_shrink,
        )

    def rows(self) -> list[dict[str, Any]]:
        return sorted(self.store.dataset().to_table().to_pylist(), key=lambda row: str(row["url"]))

    def urls(self) -> list[str]:
        return [row["url"] for row in self.rows()]


@pytest.fixture
def corpus(tmp_path: Path, encoder_folder: Path) -> World:
    return World(tmp_path, encoder_folder)


Finished = tuple[World, Embedded, list[tuple[int, int]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Finished:
    """A corpus with twins that was embedded, which is only read; what came of it, and the progress that was told."""
    corpus, seen = World(tmp_path_factory.mktemp("finished"), encoder_folder), []
    write_shard(corpus.uri, 2, TWINS)
    want(corpus.uri, [*corpus.samples, *TWINS])
    with pytest.MonkeyPatch.context() as patch:
        use_jobs_here(patch)
        return corpus, corpus.embed(lambda done, total, note="": seen.append((done, total)), batch_size=8), seen


@pytest.fixture
def again(finished: Finished, tmp_path: Path) -> World:
    """A copy of it, of a test's own."""
    own, _, _ = finished
    shutil.copytree(own.settings.home, tmp_path / "home")
    return World(tmp_path / "home", own.encoder)


def counts(embedded: Embedded) -> tuple[int, int, int, int]:
    return embedded.num_rows, embedded.num_added, embedded.num_removed, embedded.num_duplicates


def test_shards_become_rows(finished: Finished) -> None:
    corpus, embedded, seen = finished
    assert counts(embedded) == (21, 21, 0, 1)
    assert embedded.version == corpus.store.version
    assert embedded.machine_s > 0
    assert seen[-1] == (21, 21)
    encoder = load_encoder(corpus.encoder, "cpu")
    assert embedded.encoder_digest == corpus.store.encoder.digest == encoder.identity.digest
    rows = {row["url"]: row for row in corpus.rows()}
    wanted = [*corpus.samples, TWINS[1]]
    assert rows.keys() == {entry.url for entry in wanted}, "the same pair is one row"
    for entry in wanted:
        row = rows[entry.url]
        assert (row["caption"], row["image"], row["source"]) == (entry.caption, entry.image, "test")
        assert (row["licence"], row["width"], row["height"]) == ("", 48, 40)
        assert row["id"] == row_id(row["image_sha256"].hex(), entry.caption)
        np.testing.assert_allclose(row["image_embed"], encoder.encode_images([entry.image])[0], atol=1e-5)
        np.testing.assert_allclose(row["text_embed"], encoder.encode_texts([entry.caption])[0], atol=1e-5)


def test_only_what_changed_is_done(again: World, jobs_here: None) -> None:
    corpus, version = again, again.store.version
    added = [sample(number) for number in range(20, 25)]
    write_shard(corpus.uri, 3, added)
    moved = replace(corpus.samples[3], source="another")
    want(corpus.uri, [*corpus.samples[1:3], moved, *corpus.samples[5:], *TWINS, *added])
    untouched = {row["url"]: row for row in corpus.rows()}
    second = corpus.embed()
    # One is wanted no more, one is replaced because its source changed, and one because it has another URL now.
    assert counts(second) == (25, 7, 3, 0)
    assert second.version > version
    rows = {row["url"]: row for row in corpus.rows()}
    gone = {corpus.samples[0].url, corpus.samples[4].url}
    assert rows.keys() == {entry.url for entry in [*corpus.samples, *TWINS, *added]} - gone
    assert rows[moved.url]["source"] == "another"
    assert rows[corpus.samples[1].url] == untouched[corpus.samples[1].url]


@pytest.mark.engines
def test_a_killed_worker_costs_nothing(corpus: World, ray_session: None) -> None:
    killed: list[int] = []

    def kill(done: int, total: int, note: str = "") -> None:
        workers = [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(p.info["cmdline"] or [])]
        own = [p for p in workers if os.getpid() in {parent.pid for parent in p.parents()}]
        if not killed and own:
            killed.append(own[0].pid)
            os.kill(own[0].pid, signal.SIGKILL)

    assert counts(corpus.embed(kill, batch_size=2, commit_every_s=0)) == (20, 20, 0, 0)
    assert killed
    assert corpus.urls() == sorted(entry.url for entry in corpus.samples)


class StopError(Exception):
    pass


def stop(done: int, total: int, note: str = "") -> None:
    raise StopError


def assert_unfinished(corpus: World) -> None:
    """Nothing of it is published, and no features are computed of what may be gone again."""
    config = FeaturesConfig(base="tiny")
    for use in (
        lambda: build_index(corpus.store, IndexConfig()),
        lambda: cache_features(corpus.store, config, corpus.settings),
    ):
        with pytest.raises(UserError, match=r"rows of table 'test' .* are missing: the ingest .* did not end"):
            use()


def test_a_stopped_job_goes_on(corpus: World, jobs_here: None) -> None:
    with pytest.raises(StopError):
        corpus.embed(stop, batch_size=4, commit_every_s=0)
    assert corpus.store.count() == 4
    assert_unfinished(corpus)
    assert counts(corpus.embed()) == (20, 16, 0, 0)
    assert corpus.urls() == sorted(entry.url for entry in corpus.samples)
    assert index_and_publish(corpus.store).num_rows == 20


def test_rows_that_a_stopped_job_deleted_first_are_not_published_as_gone(again: World, jobs_here: None) -> None:
    corpus = again
    before = index_and_publish(corpus.store)
    want(corpus.uri, [*(replace(entry, source="another") for entry in corpus.samples), *TWINS])
    with pytest.raises(StopError):
        corpus.embed(stop, batch_size=4, commit_every_s=0)
    assert corpus.store.count() < 21
    assert_unfinished(corpus)
    assert published_version(corpus.store) == before.version
    assert counts(corpus.embed())[0] == 21
    version = corpus.store.version
    assert [counts(corpus.embed())[:3] for _ in range(2)] == [(21, 0, 0)] * 2
    assert corpus.store.version == version, "nothing was left to do"
    assert index_and_publish(corpus.store).num_rows == 21


def test_a_job_that_was_stopped_after_its_last_rows_is_ended_by_the_next(again: World) -> None:
    corpus = again
    corpus.store.mark_unfinished()
    assert_unfinished(corpus)
    assert counts(corpus.embed()) == (21, 0, 0, 1)
    assert index_and_publish(corpus.store).num_rows == 21


def test_a_broken_shard_fails_loudly(corpus: World, jobs_here: None) -> None:
    broken = Sample("https://example.org/broken.jpg", "broken", corpus.samples[0].image[:300])
    write_shard(corpus.uri, 2, [sample(30), broken])
    want(corpus.uri, [*corpus.samples, sample(30), broken])
    with pytest.raises(CorruptShardError, match=f"image 000020001 of {corpus.uri}/00002.tar can't be decoded"):
        corpus.embed()


def test_an_image_that_a_shard_lacks_is_named(corpus: World) -> None:
    write_shard(corpus.uri, 2, [sample(30), sample(31)], in_tar=[sample(30)])
    want(corpus.uri, [sample(30), sample(31)])
    shards = Corpus(str(corpus.uri))
    with pytest.raises(CorruptShardError, match=r"00002.tar lacks 1 images that its table lists, first 000020001"):
        list(read_images(images_of(shards), shards))


def test_no_work_starts_nothing(again: World, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, version = again, again.store.version

    def fail(*_: object) -> None:
        raise AssertionError("no engine is needed")

    monkeypatch.setattr("imagerag.workers.start_ray", fail)
    monkeypatch.setattr("open_clip.create_model", fail)
    second = corpus.embed()
    assert counts(second) == (21, 0, 0, 1)
    assert second.version == version
    with monkeypatch.context() as patch:
        patch.setattr("imagerag.embedding.embed.survey", fail)
        assert counts(corpus.embed()) == counts(second), "nothing changed since they were compared"
        corpus.store.dataset().update_config({"another": "version"})
        with pytest.raises(AssertionError, match="no engine"):
            corpus.embed()
    assert counts(corpus.embed()) == counts(second)
    version = corpus.store.version
    want(corpus.uri, corpus.samples[:5])
    with pytest.raises(UserError, match=r"from 21 rows to 5; at most 50% may go.*--max-shrink 0.77"):
        corpus.embed()
    assert corpus.store.version == version, "a list that was cut short deletes nothing"
    assert counts(corpus.embed(max_shrink=0.77)) == (5, 0, 16, 0)


def test_an_empty_corpus_makes_an_empty_table(tmp_path: Path, encoder_folder: Path) -> None:
    corpus = World(tmp_path, encoder_folder)
    want(corpus.uri, [])
    assert counts(corpus.embed()) == (0, 0, 0, 0)


def test_encoders_are_not_mixed(corpus: World, tmp_path: Path) -> None:
    want(corpus.uri, [])
    corpus.embed()
    other = write_encoder(tmp_path / "other", seed=1)
    digests = [resolve(encoder).identity.digest for encoder in (corpus.encoder, str(other))]
    corpus.encoder = str(other)
    with pytest.raises(UserError, match=f"{digests[0]}.*{digests[1]}"):
        corpus.embed()
