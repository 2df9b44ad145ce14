"""The embedding job: synchronises a table with a corpus by embedding missing rows and deleting stale ones.

Ray Data streams the shards to workers, each with an encoder. A worker writes its rows to uncommitted fragments and
returns their metadata; the driver commits them every minute (`commit_every_s`). So no images pass through the driver, a
killed job loses about a minute of work, and the next one resumes.
"""

import logging
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa

from imagerag.artifacts import Embedded
from imagerag.compute import start_ray, stop_ray
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.ledger import iter_images
from imagerag.embedding.config import EmbedConfig
from imagerag.embedding.encoder import UndecodableImageError, load_encoder
from imagerag.embedding.encoder_files import resolve
from imagerag.embedding.survey import Survey, survey
from imagerag.errors import UserError
from imagerag.progress import OnProgress, silent
from imagerag.retrieval.publish import MAX_SHRINK, require_rows
from imagerag.retrieval.schema import EncoderIdentity
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.workers import Commits, Dtype, plan_workers, resources_of, watched

_IMAGE_SUFFIXES = {".jpg", ".png", ".webp"}
_BLOCK_ROWS = 64
_BLOCK_BYTES = 16 * 2**20
_IN_FLIGHT_BYTES = 128 * 2**20
"""Limit of queued images per worker, which bounds memory."""


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

    Idempotent: if no rows are missing, neither Ray nor the model is started. URLs with the same image and caption are
    one row, with the first URL. A row whose URL, source or licence changed is deleted and added again.

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
        # Now, as another job may have changed what is wanted while this one waited.
        found = survey(iter_images(corpus), store)
        require_rows(store, found.num_wanted, max_shrink)
        num_removed = store.delete(found.stale)
        machine_s = 0.0
        if found.num_missing:
            start_ray(settings)
            batches = partial(_embedded_batches, found, corpus, store, identity, config)
            try:
                machine_s = _commit_all(batches, found.num_missing, store, config, on_progress)
            except BaseException:
                # A failed Ray Data job keeps its workers, and so the cores that a retry needs.
                stop_ray()
                raise
        return Embedded(
            uri=store.uri,
            table=store.name,
            version=store.version,
            num_rows=store.count(),
            num_added=found.num_missing,
            num_removed=num_removed,
            num_duplicates=found.num_images - found.num_wanted,
            encoder_id=identity.id,
            encoder_digest=identity.digest,
            duration_s=time.perf_counter() - started,
            machine_s=machine_s,
        )


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
    """Ray actor that holds an encoder, embeds rows and writes them as fragments."""

    def __init__(
        self,
        *,
        identity: EncoderIdentity,
        store: Store,
        device: str,
        dtype: Dtype | None,
        num_threads: int,
        corpus: Corpus,
    ) -> None:
        import torch

        started = time.perf_counter()
        torch.set_num_threads(num_threads)  # Ray sets 1
        self._encoder = load_encoder(identity.id, device, dtype)
        if self._encoder.identity.digest != identity.digest:
            raise UserError(
                f"the encoder {identity.id} must be the same on every machine; its digest is {identity.digest} where "
                f"the job was started and {self._encoder.identity.digest} on a worker"
            )
        self._store = store
        self._corpus = corpus
        self._unreported_s = time.perf_counter() - started

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Embed and write `rows`; return one row with the `fragments` as JSON, `num_rows` and `machine_s`."""
        started = time.perf_counter()
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
        embedded = rows.rename_columns({"sha256": "image_sha256"})
        for name, embeds in (("text_embed", text_embeds), ("image_embed", image_embeds)):
            embedded = embedded.append_column(
                name, pa.FixedSizeListArray.from_arrays(embeds.ravel(), self._encoder.identity.dim)
            )
        fragments = self._store.write_fragments(embedded)
        machine_s, self._unreported_s = self._unreported_s + time.perf_counter() - started, 0.0
        return pa.table({"fragments": [fragments], "num_rows": [rows.num_rows], "machine_s": [machine_s]})


def _embedded_batches(
    found: Survey, corpus: Corpus, store: Store, identity: EncoderIdentity, config: EmbedConfig
) -> Iterator[dict[str, Any]]:
    """Yield the results of `Worker` per batch."""
    import ray
    from ray.data import ActorPoolStrategy, ExecutionResources, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs every plan and execution

    device, num_workers, num_threads = plan_workers(ray.nodes(), config)
    dataset = ray.data.from_arrow(list(found.shards()))
    dataset.context.enable_progress_bars = False
    dataset.context.raise_original_map_exception = True
    dataset.context.target_max_block_size = _BLOCK_BYTES
    dataset.context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=_IN_FLIGHT_BYTES * num_workers
    )
    images = dataset.map_batches(
        read_images,
        fn_kwargs={"corpus": corpus},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,  # readers need little CPU, and the workers may reserve all cores
        # One reader outpaces an encoder on CPU cores, and each is a process of 150 MB.
        compute=TaskPoolStrategy(size=num_workers if device == "cpu" else 2 * num_workers),
    )
    batches = images.map_batches(
        Worker,
        fn_constructor_kwargs={
            "identity": identity,
            "store": store,
            "device": device,
            "dtype": config.dtype,
            "num_threads": num_threads,
            "corpus": corpus,
        },
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=num_workers),
        **resources_of(device, num_threads),
    )
    yield from batches.iter_rows()


def _commit_all(
    batches: Callable[[], Iterable[dict[str, Any]]],
    num_rows: int,
    store: Store,
    config: EmbedConfig,
    on_progress: OnProgress,
) -> float:
    """Commit the workers' fragments every `commit_every_s`, and return their machine-seconds."""
    version, num_done, machine_s = store.version, 0, 0.0

    def commit(fragments: list[str]) -> None:
        nonlocal version
        version = store.commit(fragments, version)

    commits = Commits(commit, config.commit_every_s)
    with closing(watched(batches, config.stall_timeout_s)) as results:
        for result in results:
            commits.add(result["fragments"])
            num_done += result["num_rows"]
            machine_s += result["machine_s"]
            on_progress(num_done, num_rows, "embedded")
    commits.finish()
    assert num_done == num_rows, f"{num_done} rows were embedded instead of {num_rows}"
    return machine_s
