"""Search in the published version of a table: by caption, by image, by words, or by meaning and words."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lance import LanceDataset
from lance.query import MatchQuery

from imagerag.errors import UserError
from imagerag.retrieval.ann import nearest, read_record
from imagerag.retrieval.feature_column import count_lacking, require_cached, to_features
from imagerag.retrieval.publish import require_published
from imagerag.retrieval.recall import to_numpy
from imagerag.retrieval.schema import Embeds, EncoderIdentity, FeatureIdentity, Features, encoder_of
from imagerag.retrieval.store import Store
from imagerag.storage.lance_table import batches_of, rows_with
from imagerag.storage.spool import MEMORY_ROWS

By = Literal["caption", "image", "words", "hybrid"]
"""What a query is compared with: embeddings of captions or of images, words of captions, or captions in both ways."""

MAX_K = 1_000
_COLUMNS = ("id", "caption", "url", "source", "licence", "width", "height")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """A condition on rows: columns must have the given values, None for any."""

    source: str | None = None
    licence: str | None = None
    url: str | None = None

    def to_sql(self) -> str | None:
        """Return the condition as SQL for LanceDB, which has no bound parameters; None if there is no condition."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {column: value for column, value in values.items() if value is not None}
        for column, value in given.items():
            if not isinstance(value, str):
                raise UserError(f"the filter on {column} must be a text, got {value!r}")
        quoted = {column: value.replace("'", "''") for column, value in given.items()}
        return " AND ".join(f"{column} = '{value}'" for column, value in quoted.items()) or None


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A row that a search found."""

    id: str
    """In hexadecimal digits, as people see it."""
    caption: str
    url: str
    source: str
    licence: str
    width: int
    height: int
    score: float
    """Cosine similarity for `caption` and `image`; BM25 (at least 0, not bounded) for `words`; for `hybrid` the sum of
    1 / (60 + rank) over the ranks by meaning and by words. Higher is nearer; scores of two kinds can't be compared."""
    similarity: float | None = None
    """Cosine similarity of the embeddings of the caption and the query; None for `image` and `words`."""
    image: bytes | None = None
    """The encoded image, if requested."""
    features: Features | None = field(default=None, compare=False, repr=False)
    """Cached features (C, H, W), if requested and present."""


class Retriever:
    """The published version of a table, or another version that was published, opened for searching.

    It stays on that version, whatever is published meanwhile, until `refresh` is called. If that version is deleted, by
    a takedown or because nothing keeps it (see `pins`), all methods that read rows raise `VersionGoneError`.

    Attributes:
        uri: URI of the database.
        name: name of the table.
        encoder: the encoder that queries must be embedded with.
        version: the table version that is searched.
        num_rows: number of rows in that version.
        dataset: the Lance dataset at that version.

    Raises:
        UserError: if there is no such table or version, if no version of it is published, if the version has no index
            yet, or if another encoder made its embeddings.
    """

    def __init__(self, uri: str, name: str, encoder: EncoderIdentity | None = None, version: int | None = None) -> None:
        self._store = Store(uri, name)
        self.uri, self.name = uri, name
        self._open(require_published(self._store) if version is None else version)
        if encoder is not None:
            self.check_encoder(encoder)

    @property
    def identity(self) -> list[str | int]:
        """What identifies this version: name, number and creation time, but not the table's location."""
        return [self.name, self.version, self._store.created_at(self.version).isoformat()]

    def refresh(self) -> None:
        """Move to the version that is now published."""
        self._open(require_published(self._store))

    def _open(self, version: int) -> None:
        self.version: int = version
        self.dataset: LanceDataset = self._store.dataset(version)
        self.encoder: EncoderIdentity = encoder_of(self.dataset.schema)
        self._schema = self.dataset.schema
        record = read_record(self.dataset)
        if record is None:
            raise UserError(f"version {version} of {self.name!r} was made before its first index: name a published one")
        self.num_rows: int = record.num_rows
        self._record = record

    def check_encoder(self, encoder: EncoderIdentity) -> None:
        """Make sure that queries embedded with `encoder` can be compared with the rows.

        Raises:
            UserError: if another encoder made the rows' embeddings; the message names both digests.
        """
        self._store.check_encoder(encoder)

    def check_version(self) -> None:
        """Make sure that the version that is searched has not been deleted, for example by a takedown.

        Raises:
            VersionGoneError: if it has been deleted.
        """
        self._store.dataset(self.version)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Replace errors of a block that reads `dataset` by `VersionGoneError` if the version was deleted.

        Raises:
            VersionGoneError: if the block fails and its version is gone.
        """
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError):  # what Lance and Arrow raise for a missing file
            self.check_version()
            raise

    def search(
        self,
        embeds: Embeds | None,
        k: int,
        *,
        by: By = "caption",
        texts: Sequence[str] | None = None,
        filters: Filters = Filters(),
        images: bool = False,
        features: FeatureIdentity | None = None,
    ) -> list[list[Neighbour]]:
        """Return the `k` nearest rows of each query, nearest first, or all matching rows if there are fewer.

        Args:
            embeds: L2-normalised query embeddings (Q, D) of the table's encoder; not used by `words`.
            k: 1 to `MAX_K`.
            by: what the queries are compared with.
            texts: the Q queries as texts; used by `words` and `hybrid` only. Their words are searched for in any order
                and number, without operators.
            filters: condition that rows must meet.
            images: whether to return the rows' images.
            features: the cached features to return, if any.

        Raises:
            UserError: if an argument breaks these rules, or the index has no such features.
        """
        if not 1 <= k <= MAX_K:
            raise UserError(f"k must be 1 to {MAX_K}, got {k}")
        if by not in get_args(By):
            raise UserError(f"a search is by one of {get_args(By)}, got {by!r}")
        if features is not None:
            require_cached(self._schema, features)
        wanted = _Wanted(k, filters.to_sql(), images, features)
        if by in ("caption", "image"):
            return self._search_vectors(self._check(embeds), "text_embed" if by == "caption" else "image_embed", wanted)
        if texts is None:
            raise UserError(f"a search by {by} needs the queries as texts")
        if by == "words":
            return [self._search_words(text, wanted) for text in texts]
        pairs = zip(self._check(embeds), texts, strict=True)
        return [self._search_hybrid(embed, text, wanted) for embed, text in pairs]

    def fetch(
        self,
        ids: Sequence[str],
        embed: Embeds | None = None,
        *,
        images: bool = False,
        features: FeatureIdentity | None = None,
    ) -> list[Neighbour]:
        """Return the rows with these ids, in this order.

        Args:
            ids: ids of rows in the version that is searched, in hexadecimal digits.
            embed: embedding (D,) of a query; rows get the cosine similarity of their caption as score, otherwise 0.
            images: whether to return the rows' images.
            features: the cached features to return, if any.

        Raises:
            UserError: if there is no such row, or the index has no such features.
        """
        if features is not None:
            require_cached(self._schema, features)
        wanted = _Wanted(len(ids), None, images, features)
        with self.reading():
            found = rows_with(self.dataset, "id", ids, [*wanted.columns, "text_embed"])
        similarities = None if embed is None else to_numpy(found["text_embed"]) @ self._check(embed[None])[0]
        scores = np.zeros(found.num_rows) if similarities is None else similarities
        by_id = {each.id: each for each in _neighbours(found, wanted, scores, similarities)}
        unknown = [each for each in ids if each not in by_id]
        if unknown:
            raise UserError(f"the index {self._store.name!r} has no row with the id {unknown[0]!r}")
        return [by_id[each] for each in ids]

    def read(self, columns: Sequence[str], features: FeatureIdentity | None = None) -> pa.Table:
        """Return these columns of all rows. If a column of cached features is among them, pass its `features`, too.

        Raises:
            UserError: if the index has no such features.
        """
        if features is not None:
            require_cached(self._schema, features)
        with self.reading():
            return self.dataset.to_table(columns=list(columns))

    def batches(self, columns: Sequence[str], num_rows: int = MEMORY_ROWS) -> Iterator[pa.Table]:
        """Yield these columns of all rows, in the order of `read`, in batches of about `num_rows`."""
        with self.reading():
            yield from batches_of(self.dataset, columns, num_rows)

    def count_without(self, features: FeatureIdentity) -> int:
        """Return the number of rows without these cached features.

        Raises:
            UserError: if the index has no column for these features.
        """
        require_cached(self._schema, features)
        with self.reading():
            return count_lacking(self.dataset, features)

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]], columns: Sequence[str]) -> pa.Table:
        """Return these columns of some rows, in this order; `rows` are positions in the result of `read`."""
        with self.reading():
            return self.dataset.take(rows, columns=list(columns))

    def sample(self, num_rows: int) -> tuple[list[bytes], Embeds]:
        """Return the images and caption embeddings (N, D) of random rows, or of all rows if there are fewer."""
        count = self.dataset.count_rows()
        offsets = np.sort(np.random.default_rng(0).choice(count, min(num_rows, count), replace=False))
        rows = self.take(offsets, ["image", "text_embed"])
        return rows["image"].to_pylist(), to_numpy(rows["text_embed"])

    def _search_vectors(self, embeds: Embeds, column: str, wanted: "_Wanted") -> list[list[Neighbour]]:
        found = self._nearest(column, embeds, wanted, wanted.columns)
        neighbours: list[list[Neighbour]] = [[] for _ in embeds]
        queries = found["query_index"].to_pylist()
        scores = 1 - found["_distance"].to_numpy()
        similarities = scores if column == "text_embed" else None
        for query_index, neighbour in zip(queries, _neighbours(found, wanted, scores, similarities), strict=True):
            neighbours[query_index].append(neighbour)
        return neighbours

    def _search_words(self, text: str, wanted: "_Wanted") -> list[Neighbour]:
        found = self._match(text, wanted.where, wanted.k, wanted.columns)
        return _neighbours(found, wanted, found["_score"].to_numpy())

    def _search_hybrid(self, embed: Embeds, text: str, wanted: "_Wanted") -> list[Neighbour]:
        from lancedb.rerankers import RRFReranker  # imported only here, because it takes seconds

        # LanceDB's own hybrid query warns on every call that it does not select the scores, which it can't.
        columns = [*wanted.columns, "text_embed"]
        near = self._nearest("text_embed", embed[None], wanted, columns, with_row_id=True)
        found = RRFReranker().rerank_hybrid(
            text, near.drop_columns(["query_index"]), self._match(text, wanted.where, wanted.k, columns)
        )[: wanted.k]
        return _neighbours(found, wanted, found["_relevance_score"].to_numpy(), to_numpy(found["text_embed"]) @ embed)

    def _nearest(
        self, column: str, embeds: Embeds, wanted: "_Wanted", columns: Sequence[str], *, with_row_id: bool = False
    ) -> pa.Table:
        with self.reading():
            return nearest(
                self.dataset, column, embeds, wanted.k, columns, self._probes(column, wanted), wanted.where,
                is_indexed=self._record.num_unindexed_rows == 0, with_row_id=with_row_id,
            )  # fmt: skip

    def _probes(self, column: str, wanted: "_Wanted") -> int | None:
        if wanted.where is None or column not in self._record.nprobes:  # which a count of rows would not change
            return self._record.probes(column, wanted.k)
        share = self.dataset.count_rows(wanted.where) / max(self.num_rows, 1)  # counted by the columns' indexes
        return self._record.probes(column, wanted.k, share)

    def _match(self, text: str, where: str | None, k: int, columns: Sequence[str]) -> pa.Table:
        # If the query were a string instead of a MatchQuery, Lance could interpret operators in it.
        with self.reading():
            return self.dataset.to_table(
                columns=[*columns, "_score"],
                full_text_query=MatchQuery(text, "caption"),
                filter=where,
                prefilter=where is not None,
                limit=k,
                with_row_id=True,
            )

    def _check(self, embeds: Embeds | None) -> Embeds:
        dim = self.encoder.dim
        if embeds is None:
            raise UserError("a search by meaning needs the queries' embeddings")
        if embeds.ndim != 2 or embeds.shape[1] != dim:
            raise UserError(f"queries must have the shape (Q, {dim}) of the table's embeddings, got {embeds.shape}")
        if not np.isfinite(embeds).all() or (np.linalg.norm(embeds, axis=1) == 0).any():
            raise UserError("a query holds a NaN or an infinity, or is zero, and so has no neighbours")
        return embeds.astype(np.float32, copy=False)


@dataclass(frozen=True)
class _Wanted:
    k: int
    where: str | None
    images: bool
    features: FeatureIdentity | None

    @property
    def columns(self) -> list[str]:
        features = [] if self.features is None else [self.features.column]
        return [*_COLUMNS, *(["image"] if self.images else []), *features]


Scores = np.ndarray[Any, Any]


def _neighbours(found: pa.Table, wanted: _Wanted, scores: Scores, near: Scores | None = None) -> list[Neighbour]:
    num_rows, identity = found.num_rows, wanted.features
    # Features stay arrays: converting so many values to Python numbers would be slow.
    features = [None] * num_rows if identity is None else list(to_features(found[identity.column], identity))
    rows = found.select([*_COLUMNS, *(["image"] if wanted.images else [])]).to_pylist()
    similarities = [None] * num_rows if near is None else near.tolist()
    return [
        Neighbour(**row | {"id": row["id"].hex()}, score=score, similarity=similarity, features=own)
        for row, score, similarity, own in zip(rows, scores.tolist(), similarities, features, strict=True)
    ]
