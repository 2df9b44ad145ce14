import os
import tarfile
import tracemalloc
from hashlib import sha256
from pathlib import Path

import pytest

from imagerag.corpus.corpus import Corpus
from imagerag.corpus.shards import PLAN_SCHEMA
from imagerag.corpus.takedown import remove_images
from imagerag.settings import Settings
from imagerag.takedown import find
from tests.corpus.whole import attempts_of, images_of
from tests.embedding.shards import Sample, sample, want, write_shard

# The third has the image of the first, under another URL and caption.
SAMPLES = (sample(0), sample(1), sample(2, seed=0), sample(3))
TAKEN = sha256(SAMPLES[0].image).hexdigest()


@pytest.fixture(params=[128, 1], ids=["at once", "one by one"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Two finished shards, and one that was begun with another copy; how many are read at once."""
    monkeypatch.setattr("imagerag.corpus.ledger._SHARDS_AT_ONCE", request.param)
    settings = Settings(home=tmp_path)
    corpus, folder = Corpus(settings.shards_of("images")), Path(settings.shards_of("images"))
    for shard, samples in enumerate((SAMPLES[:2], SAMPLES[2:], SAMPLES[:1])):
        write_shard(folder, shard, samples)
        corpus.shard(shard).write_plan(PLAN_SCHEMA.empty_table())
    (folder / "00002_stats.json").unlink()
    want(folder, SAMPLES)
    return corpus


def captions_in(corpus: Corpus, shard: int) -> list[str]:
    with tarfile.open(corpus.shard(shard).tar) as tar:
        texts = [tar.extractfile(member) for member in tar if member.name.endswith(".txt")]
        return [text.read().decode() for text in texts if text is not None]


def test_an_image_leaves_every_shard(corpus: Corpus) -> None:
    assert remove_images(corpus, sha256s=[TAKEN.upper()]) == 2
    assert [captions_in(corpus, shard) for shard in range(2)] == [["picture 1"], ["picture 3"]]
    assert not Path(corpus.shard(2).tar).exists()
    assert images_of(corpus)["caption"].to_pylist() == ["picture 1", "picture 3"]
    assert len(attempts_of(corpus)) == 4
    assert remove_images(corpus, sha256s=[TAKEN]) == 0
    assert remove_images(corpus, urls=[SAMPLES[3].url]) == 1
    assert captions_in(corpus, 1) == []


def test_an_image_is_found_in_every_shard(corpus: Corpus, tmp_path: Path) -> None:
    target = find(Settings(home=tmp_path), "images", urls=[SAMPLES[2].url])
    assert target.image_sha256s == (TAKEN,)
    assert target.urls == (SAMPLES[0].url, SAMPLES[2].url)
    assert len(target.ids) == 2


def test_a_shard_is_rewritten_in_less_memory_than_it_has(tmp_path: Path) -> None:
    samples = [Sample(f"https://example.org/{number}", f"{number}", os.urandom(2**21)) for number in range(12)]
    write_shard(tmp_path, 0, samples)
    want(tmp_path, samples)
    corpus = Corpus(str(tmp_path))
    remove_images(corpus, urls=["https://example.org/none"])  # what it imports, which takes memory only once
    tracemalloc.start()
    try:
        assert remove_images(corpus, urls=[samples[5].url]) == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20
    with tarfile.open(corpus.shard(0).tar) as tar:
        images = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    assert images == [sample.image for sample in samples if sample is not samples[5]]
