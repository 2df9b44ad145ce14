"""A corpus, its published table with features, and a training set, of any number of rows that nobody downloaded."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from diffusers import UNet2DConditionModel
from lance import LanceDataset

from imagerag.artifacts import TrainingSet
from imagerag.base.files import resolve
from imagerag.corpus import ledger
from imagerag.corpus.corpus import Corpus
from imagerag.corpus.plan import want
from imagerag.corpus.shards import ROW_DIGITS, SHARD_DIGITS
from imagerag.corpus.url_list import UrlList, read_url_list
from imagerag.embedding import encoder_files
from imagerag.embedding.survey import with_ids
from imagerag.hspace.cache import identities_of
from imagerag.retrieval import feature_column, index
from imagerag.retrieval.ann import IndexRecord
from imagerag.retrieval.index import IndexConfig, build_index
from imagerag.retrieval.publish import PublishConfig, publish
from imagerag.retrieval.recall import K
from imagerag.retrieval.schema import EncoderIdentity, FeatureIdentity, row_schema
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.hexadecimal import ID
from imagerag.storage.keyed_table import KeyedTable, array_field
from imagerag.storage.lance_table import batches_of
from imagerag.training.config import SynthesizeConfig
from imagerag.training.examples import STORED_REFERENCES, Examples
from imagerag.training.synthesize import describe
from tests.embedding.conftest import write_encoder
from tests.generation.folders import small_unet
from tests.generation.with_index import make_pipeline

NAME = "bench"
SHARD_ROWS = 10_000
PUBLISH = PublishConfig(min_recall=0.5)  # random vectors have no near neighbours
_CHUNK_ROWS = 100_000
_LIST = pa.schema([(name, pa.string()) for name in ("url", "caption", "source", "licence")])


@dataclass(frozen=True)
class World:
    """A home with that many images."""

    folder: Path
    num_rows: int
    has_vectors: bool = True
    """Whether the table has vector indexes and features; without, it takes a quarter of the space."""

    @property
    def settings(self) -> Settings:
        """Its settings."""
        return Settings(home=self.folder / f"home-{self.num_rows}{'' if self.has_vectors else '-bare'}")

    @property
    def store(self) -> Store:
        """The table."""
        return Store(self.settings.index_uri, NAME)

    @property
    def corpus(self) -> Corpus:
        """The shards, of which only the first has images."""
        return Corpus(self.settings.shards_of(NAME))

    @property
    def url_list(self) -> UrlList:
        """The list that the corpus is of."""
        return read_url_list(str(self.settings.home / "list.parquet"))

    @property
    def encoder(self) -> str:
        """An encoder whose embeddings are small."""
        return str(self.folder / f"encoder-{self._dim}")

    @property
    def base(self) -> str:
        """A base model whose features are small."""
        return str(self.folder / "base")

    @property
    def features(self) -> FeatureIdentity:
        """The features of all rows."""
        return identities_of(resolve(self.base))["auto"]

    @property
    def examples(self) -> Examples:
        """The examples of a training."""
        config = SynthesizeConfig(base=self.base, teacher=self.base)
        return Examples(Retriever(self.settings.index_uri, NAME), config, self.settings.training_of(NAME))

    @property
    def training_set(self) -> TrainingSet:
        """A training set with latents of a few numbers."""
        uris = {"real_uri": self._table("real").table_uri, "references_uri": self._table("references").table_uri}
        return replace(describe(self.examples), **uris)

    @property
    def _dim(self) -> int:
        return 16 if self.has_vectors else 2

    @property
    def _encoder_identity(self) -> EncoderIdentity:
        return encoder_files.resolve(self.encoder).identity

    def _table(self, name: str) -> KeyedTable:
        columns = {
            "real": [pa.field("prompt", pa.string()), array_field("latents", (4, 2, 2)), array_field("text", (1, 8))],
            "references": [
                pa.field("prompt", pa.string()),
                pa.field("number", pa.int64()),
                pa.field("is_held_out", pa.bool_()),
                pa.field("references", pa.list_(ID)),
                array_field("embed", (self._dim,), pa.float32()),
            ],
        }
        return KeyedTable.of(self.settings.training_of(NAME), name, {}, columns[name])

    def make(self) -> None:
        """Make everything, unless an interrupted run did: ten million rows take half an hour."""
        made = self.settings.home / "made"
        if made.exists():
            return
        if not Path(self.encoder).exists():
            write_encoder(Path(self.encoder), seed=0, dim=self._dim)
        if not Path(self.base).exists():
            unet = UNet2DConditionModel(**small_unet() | {"cross_attention_dim": 384, "sample_size": 4})
            make_pipeline(unet=unet).save_pretrained(self.base)
        self._write_corpus()
        self._write_table()
        self._write_training_set()
        made.touch()

    @staticmethod
    def images(start: int, stop: int) -> Iterator[pa.Table]:
        """Yield images number `start` to `stop`, as `ledger.iter_images` does."""
        for first in range(start, stop, _CHUNK_ROWS):
            numbers = np.arange(first, min(first + _CHUNK_ROWS, stop))
            shards, places = np.divmod(numbers, SHARD_ROWS)
            yield pa.table(
                {
                    "url": _joined("https://images.example/", numbers, ".jpg"),
                    "caption": _joined("picture number ", numbers),
                    "source": _joined("host", numbers % 100, ".example"),
                    "licence": pa.repeat("CC0-1.0", len(numbers)),
                    "sha256": _digits(numbers, 64),
                    "width": pa.array(np.full(len(numbers), 64, np.int32)),
                    "height": pa.array(np.full(len(numbers), 64, np.int32)),
                    "shard": pa.array(shards),
                    "key": _joined(_digits(shards, SHARD_DIGITS), _digits(places, ROW_DIGITS)),
                    "row": pa.array(numbers),
                }
            )

    def rows(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Yield rows of the table with random embeddings."""
        for images in self.images(start, stop):
            vectors = np.random.default_rng(start).standard_normal((len(images), self._dim), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            embeds = pa.FixedSizeListArray.from_arrays(vectors.ravel(), self._dim)
            rows = with_ids(images)
            rows = rows.append_column("image", pa.repeat(pa.scalar(b"an image", pa.large_binary()), len(images)))
            rows = rows.append_column("text_embed", embeds).append_column("image_embed", embeds)
            yield rows.select(row_schema(self._encoder_identity).names)

    def fill(self) -> None:
        """Give all rows features of zeros."""
        if not self.has_vectors:
            return
        store, features = self.store, self.features
        version = feature_column.prepare(store, features)
        missing = feature_column.missing(store.dataset(version), features)
        zeros = np.zeros((max(missing.values(), default=0), *features.shape), np.float16)
        filled = [
            feature_column.fill(store, features, version, fragment, lambda images, _: zeros[: len(images)], len(zeros))
            for fragment in missing
        ]
        if filled:
            feature_column.commit(store, filled, version)

    def publish(self) -> None:
        """Index and publish the newest version."""
        assert publish(self.store, build_index(self.store, IndexConfig()), PUBLISH).published

    def _write_corpus(self) -> None:
        corpus = self.corpus
        folder = Path(corpus.uri)
        folder.mkdir(parents=True)
        stored = pa.schema([field for field in ledger.SCHEMA if field.name not in ("reason", "shard")])
        for images in self.images(0, self.num_rows):
            images = images.append_column("status", pa.repeat("success", len(images)))
            for name in set(stored.names) - set(images.column_names):
                images = images.append_column(name, pa.nulls(len(images), pa.string()))
            for start in range(0, len(images), SHARD_ROWS):
                shard = corpus.shard(images["shard"][start].as_py())
                outcomes = images.slice(start, SHARD_ROWS).select(stored.names).cast(stored)
                pq.write_table(outcomes, folder / f"{shard.name}.parquet")
                (folder / f"{shard.name}_stats.json").write_text(json.dumps({"count": len(outcomes)}))
        with tarfile.open(corpus.shard(0).tar, "w") as tar:
            for key in next(self.images(0, min(SHARD_ROWS, self.num_rows)))["key"].to_pylist():
                info = tarfile.TarInfo(f"{key}.jpg")
                info.size = 8
                tar.addfile(info, io.BytesIO(b"an image"))
        with pq.ParquetWriter(self.settings.home / "list.parquet", _LIST) as writer:
            for images in self.images(0, self.num_rows):
                writer.write_table(images.select(_LIST.names))
        with corpus.lock():
            want(corpus, self.url_list.rows, "replace")

    def _write_table(self) -> None:
        store = self.store
        store.create(self._encoder_identity)
        rows = self.rows(0, self.num_rows)
        store.commit([fragment for some in rows for fragment in store.write_fragments(some)], store.version)
        self.fill()
        if self.has_vectors:
            self.publish()
        else:
            with patch.object(index, "_index_vectors", _without), patch.object(index, "_measured", _unmeasured):
                self.publish()

    def _write_training_set(self) -> None:
        ids = self.store.ids().combine_chunks()
        for name in ("real", "references"):
            table = self._table(name)
            version, fragments = table.version, list[str]()
            for rows in batches_of(self.store.dataset(), ["id", "caption"], _CHUNK_ROWS):
                fragments += table.write_fragments(_computed(table, rows, ids))
            table.commit(fragments, version)


def _without(_: Store, __: str, num_rows: int, *___: object) -> int:
    """Stand for `index._index_vectors`, but make no index."""
    return num_rows


def _unmeasured(_: LanceDataset, record: IndexRecord, *__: object) -> IndexRecord:
    """Stand for `index._measured`: there is no recall to measure."""
    return replace(record, recalls={f"recall@{K}": 1.0})


def _joined(*parts: str | npt.NDArray[np.int64] | pa.StringArray) -> pa.StringArray:
    """Join texts and numbers, row by row."""
    texts = [pa.array(part).cast(pa.string()) if isinstance(part, np.ndarray) else part for part in parts]
    return pc.binary_join_element_wise(*texts, "")


def _digits(numbers: npt.NDArray[np.int64], count: int) -> pa.StringArray:
    return pc.utf8_lpad(pa.array(numbers).cast(pa.string()), count, "0")


def _computed(table: KeyedTable, rows: pa.Table, all_ids: pa.FixedSizeBinaryArray) -> pa.Table:
    """Rows of a training set, whose references are any rows: neighbours among embeddings are so in a table."""
    ids, count = rows["id"].combine_chunks(), len(rows)
    numbers = np.random.default_rng(rows["id"][0].as_py()[0]).integers(0, len(all_ids), count * STORED_REFERENCES)
    offsets = pa.array(np.arange(0, len(numbers) + 1, STORED_REFERENCES, dtype=np.int32))
    columns = {
        "id": ids,
        "prompt": rows["caption"],
        "number": pa.array(np.full(count, -1)),
        "is_held_out": pa.array(np.arange(count) % 50 == 0),
        "references": pa.ListArray.from_arrays(offsets, all_ids.take(pa.array(numbers))),
    }
    for field in table.schema:
        if field.name not in columns:
            size = count * field.type.list_size
            zeros = pa.array(np.zeros(size, field.type.value_type.to_pandas_dtype()))
            columns[field.name] = pa.FixedSizeListArray.from_arrays(zeros, field.type.list_size)
    return pa.table([columns[name] for name in table.schema.names], schema=table.schema)
