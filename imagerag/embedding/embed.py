"""The embedding job: synchronises a table with a corpus by embedding missing rows and deleting stale ones.

Ray Data streams the shards to workers, each with an encoder. A worker writes its rows to uncommitted fragments and
returns their metadata; the driver commits them every minute (`commit_every_s`). So no images pass through the driver, a
killed job loses about a minute of work, and the next one resumes.
"""

import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath

import fsspec
import pyarrow as pa

from imagerag.artifacts import Embedded
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.ledger import iter_images
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.encoder import UndecodableImageError, load_encoder
from imagerag.embedding.encoder_files import resolve
from imagerag.embedding.survey import Survey, survey
from imagerag.errors import UserError
from imagerag.progress import OnProgress, silent
from imagerag.retrieval.config import MAX_SHRINK
from imagerag.retrieval.publish import require_rows
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.memo import Memo
from imagerag.workers import Dtype, Job, run_job

_IMAGE_SUFFIXES = {".jpg", ".png", ".webp"}
_BLOCK_ROWS = 64


class CorruptShardError(RuntimeError):
    """An image is missing from its shard or can't be decoded."""


def embed(
    *,
    corpus: Corpus,
    store: Store,
    encoder: str,
    config: EmbedConfig,
    settings: Settings,
    on_progress: OnProgress = silent,
    max_shrink: float = MAX_SHRINK,
) -> Embedded:
    """Synchronise the table of `store` with a corpus, so that it holds exactly the corpus's rows.

    Idempotent: if no rows are missing, neither Ray nor the model is started, and while neither the corpus nor the table
    changes, they are not compared again. URLs with the same image and caption are one row, with the first URL. A row
    whose URL, source or licence changed is deleted and added again. While rows are missing, the table is marked as
    unfinished: what a killed job leaves can't be published.

    Args:
        corpus: the corpus.
        store: the table; created if it does not exist.
        encoder: `tiny`, an open_clip name and pretrained tag, a hub id and full commit, or a folder.
        config: batch size, commit interval and workers.
        settings: Ray's address and other settings.
        on_progress: progress callback, called with added rows.
        max_shrink: largest share of rows that may be deleted. Deleted rows lose their cached features, and a truncated
            list must not cause that.

    Raises:
        UserError: if the encoder does not exist, the table holds another encoder's rows, it would shrink too much, or
            there are fewer GPUs or cores than `config` requests.
        CorruptShardError: if an image of the corpus can't be read from its shard.
        StalledError: if the workers hang. Calling again resumes.
    """
    started = time.perf_counter()
    identity = resolve(encoder).identity
    with store.writer_lock():
        store.open_or_create(identity)
        version = store.version
        # Now, as another job may have changed what is wanted while this one waited.
        state = [corpus.uri, corpus.state(), version, store.created_at(version).isoformat()]
        memo = Memo(f"{store.uri}/{store.name}.compared.json", state)
        num_missing, num_removed, machine_s = 0, 0, 0.0
        if (num_duplicates := memo.recall()) is None:
            found = survey(iter_images(corpus), store)
            require_rows(store, found.num_wanted, max_shrink)
            num_missing, num_duplicates = found.num_missing, found.num_images - found.num_wanted
            if num_missing:  # deletions alone are one transaction
                store.mark_unfinished()
            num_removed = store.delete(found.stale)
            if num_missing:
                machine_s = _embed_missing(found, corpus, store, identity, config, settings, on_progress)
            store.mark_finished()
            if store.version == version:
                memo.keep(num_duplicates)
        return Embedded(
            uri=store.uri,
            table=store.name,
            version=store.version,
            num_rows=store.count(),
            num_added=num_missing,
            num_removed=num_removed,
            num_duplicates=num_duplicates,
            encoder_id=identity.id,
            encoder_digest=identity.digest,
            duration_s=time.perf_counter() - started,
            machine_s=machine_s,
        )


def _embed_missing(
    found: Survey,
    corpus: Corpus,
    store: Store,
    identity: EncoderIdentity,
    config: EmbedConfig,
    settings: Settings,
    on_progress: OnProgress,
) -> float:
    """Embed and commit the missing rows, and return the workers' machine-seconds."""
    version = store.version

    def commit(fragments: list[str]) -> None:
        nonlocal version
        version = store.commit(fragments, version)

    job = Job(
        parts=found.shards(),
        worker=Worker,
        arguments={"identity": identity, "store": store, "corpus": corpus},
        read=partial(read_images, corpus=corpus),
        batch_size=config.batch_size,
        num_rows=found.num_missing,
        commit=commit,
        commit_every_s=config.commit_every_s,
        on_done=lambda done: on_progress(done, found.num_missing, "embedded"),
    )
    return run_job(job, config, settings)


def read_images(rows: pa.Table, corpus: Corpus) -> Iterator[pa.Table]:
    """Yield blocks of `rows`, all of one shard, in the shard's order and with the column `image` (encoded bytes).

    Raises:
        CorruptShardError: if an image is missing from the shard.
    """
    (shard,) = rows["shard"].unique().to_pylist()
    path = corpus.shard(shard).tar
    index_of = {key: index for index, key in enumerate(rows["key"].to_pylist())}
    images: dict[int, bytes] = {}

    def block() -> pa.Table:
        taken = rows.take(pa.array(images, pa.int64()))
        return taken.append_column("image", pa.array(images.values(), pa.large_binary()))

    with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.suffix in _IMAGE_SUFFIXES and (index := index_of.pop(name.stem, None)) is not None:
                content = tar.extractfile(member)
                assert content is not None, f"{name} of {path} is no file"
                images[index] = content.read()
                if len(images) == _BLOCK_ROWS:
                    yield block()
                    images.clear()
    if index_of:
        raise CorruptShardError(f"{path} lacks {len(index_of)} images that its table lists, first {min(index_of)}")
    yield block()


class Worker:
    """Holds an encoder, embeds rows and writes them as fragments."""

    def __init__(
        self, *, identity: EncoderIdentity, store: Store, corpus: Corpus, device: str, dtype: Dtype | None
    ) -> None:
        self._encoder = load_encoder(identity.id, device, dtype)
        if self._encoder.identity.digest != identity.digest:
            raise UserError(
                f"the encoder {identity.id} must be the same on every machine; its digest is {identity.digest} where "
                f"the job was started and {self._encoder.identity.digest} on a worker"
            )
        self._store = store
        self._corpus = corpus

    def __call__(self, rows: pa.Table) -> tuple[list[str], int]:
        """Embed and write `rows`; return the fragments and the number of rows."""
        captions = rows["caption"].combine_chunks().dictionary_encode()
        text_embeds = self._encoder.encode_texts(captions.dictionary.to_pylist())[captions.indices.to_numpy()]
        try:
            image_embeds = self._encoder.encode_images(rows["image"].to_pylist())
        except UndecodableImageError as error:
            row = rows.slice(error.index, 1).to_pylist()[0]
            raise CorruptShardError(
                f"the image {row['key']} of {self._corpus.shard(row['shard']).tar} can't be decoded "
                f"({error.reason}), though it was when it was downloaded"
            ) from error
        for name, embeds in (("text_embed", text_embeds), ("image_embed", image_embeds)):
            rows = rows.append_column(
                name, pa.FixedSizeListArray.from_arrays(embeds.ravel(), self._encoder.identity.dim)
            )
        return self._store.write_fragments(rows), rows.num_rows
