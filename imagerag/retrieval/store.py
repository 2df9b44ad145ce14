"""The LanceDB table of image and caption pairs: its encoder, versions and locks."""

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath

import fsspec
import pyarrow as pa
from lance import LanceDataset

from imagerag.artifacts import IndexVersion
from imagerag.errors import UserError, VersionGoneError
from imagerag.retrieval.schema import EncoderIdentity, encoder_of, row_schema
from imagerag.storage.hexadecimal import ID
from imagerag.storage.lance_table import LanceTable
from imagerag.storage.locks import OnWait, check_locks, local_folder, writer_lock

logger = logging.getLogger(__name__)

_UNFINISHED = "imagerag.unfinished"
"""Key of the table's config with the start of a change of its rows in several steps that has not ended."""


@dataclass(frozen=True)
class Store(LanceTable):
    """The table `name` of the LanceDB database `uri`."""

    def dataset(self, version: int | None = None) -> LanceDataset:
        """Open a version of the table, the newest by default.

        Raises:
            UserError: if there is no such table, or it is of an early version.
            VersionGoneError: if the table exists, but not (or no longer) in this version.
        """
        dataset = self.find(version)
        if dataset is not None:
            if dataset.schema.field("id").type != ID:
                raise UserError(
                    f"table {self.name!r} in {self.uri} is of an early version, whose ids were texts: delete "
                    f"{self.table_uri} and run the ingest again, which embeds the images that were downloaded"
                )
            return dataset
        if version is not None and self.exists:
            raise VersionGoneError(
                f"version {version} of table {self.name!r} in {self.uri} is gone, by a takedown or by publications "
                "since. Run the same again: it uses the version that is published now, which "
                f"`imagerag index status --name {self.name}` shows"
            )
        raise UserError(
            f"there is no table {self.name!r} in {self.uri}: `imagerag ingest` makes it from a list of image URLs"
        )

    def index_version(self, version: int) -> IndexVersion:
        """Return the artifact that refers to a version of the table.

        Raises:
            UserError: see `dataset`.
        """
        created_at = self.created_at(version).isoformat()
        return IndexVersion(uri=self.uri, name=self.name, version=version, created_at=created_at)

    def created_at(self, version: int) -> datetime:
        """Return the creation time of a version, which distinguishes it from the same number in a re-created table."""
        timestamp: datetime = self.dataset(version).get_version()["timestamp"]
        return timestamp.astimezone(UTC)

    def copy(self, version: int, uri: str) -> "Store":
        """Copy a version with its indexes into another database, where it has the same number and is the only version.

        Rows have the same order there, and searches the same results.
        """
        copy = Store(uri, self.name)
        if (folder := local_folder(uri)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.dataset(version).deep_clone(copy.table_uri, version)
        return copy

    @property
    def encoder(self) -> EncoderIdentity:
        """The encoder that made the table's embeddings."""
        return encoder_of(self.dataset().schema)

    def create(self, encoder: EncoderIdentity) -> None:
        """Create an empty table for embeddings of `encoder`."""
        self.append(row_schema(encoder).empty_table())

    def open_or_create(self, encoder: EncoderIdentity) -> None:
        """Create the table if it does not exist.

        Raises:
            UserError: if the table has embeddings of another encoder.
        """
        with self.writer_lock():
            if not self.exists:
                self.create(encoder)
        self.check_encoder(encoder)

    def check_encoder(self, encoder: EncoderIdentity) -> None:
        """Make sure that embeddings of `encoder` can be compared with the table's.

        Raises:
            UserError: if another encoder made the table's embeddings.
        """
        own = self.encoder
        if (own.digest, own.dim) != (encoder.digest, encoder.dim):
            raise UserError(
                f"a table holds one encoder's embeddings: {self.name!r} in {self.uri} was made with {own.id} "
                f"(digest {own.digest}, {own.dim} dimensions), not with {encoder.id} (digest {encoder.digest}, "
                f"{encoder.dim} dimensions). Use that encoder or another table name"
            )

    def written_schema(self) -> pa.Schema:
        """Return the columns without cached features, which are nullable: these are computed later."""
        return pa.schema([field for field in self.dataset().schema if field.nullable is False])

    def mark_unfinished(self) -> None:
        """Mark the rows as incomplete until `mark_finished`, also if this job is killed. Caller holds `writer_lock`.

        The mark is part of the newest version and of those that follow it, so that a version from before has none, also
        when it is restored.
        """
        dataset = self.dataset()
        if _UNFINISHED not in dataset.config():
            check_locks()
            dataset.update_config({_UNFINISHED: f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"})

    def mark_finished(self) -> None:
        """Take the mark of `mark_unfinished` off, if there is one. The caller must hold `writer_lock`."""
        dataset = self.dataset()
        if _UNFINISHED in dataset.config():
            check_locks()
            dataset.delete_config_keys([_UNFINISHED])

    def require_finished(self, version: int | None = None) -> None:
        """Make sure that a version, the newest by default, is not one of a change of rows that has not ended.

        Raises:
            UserError: if it is.
        """
        since = self.dataset(version).config().get(_UNFINISHED)
        if since is not None:
            raise UserError(
                f"rows of table {self.name!r} in {self.uri} are missing: the ingest that began to embed them on "
                f"{since} did not end. Run it again (`imagerag ingest` or `imagerag reindex`, with the same list): it "
                "continues"
            )

    def clean_up(self) -> None:
        """Clean up as any table while no version is being tagged. The caller must hold `writer_lock`."""
        with self.tags_lock():
            super().clean_up()

    def writer_lock(self) -> AbstractContextManager[None]:
        """Lock out this table's other writers; see `imagerag.storage.locks`."""
        return writer_lock(self.uri, self.name)

    def update_lock(self, on_wait: OnWait = logger.info) -> AbstractContextManager[None]:
        """Lock out other jobs that update the table in several steps, each of which also takes `writer_lock`."""
        return writer_lock(self.uri, f"{self.name}.update", on_wait)

    def tags_lock(self) -> AbstractContextManager[None]:
        """Lock out cleaning up while a version is being tagged. Held briefly, whereas writers may take hours."""
        return writer_lock(self.uri, f"{self.name}.tags")


def list_stores(uri: str) -> list[Store]:
    """Return the tables of a database, sorted by name; empty if there is no database."""
    filesystem, folder = fsspec.url_to_fs(uri)
    tables = filesystem.glob(f"{folder.rstrip('/')}/*.lance")
    names = sorted(PurePosixPath(table).stem for table in tables)
    # A table with a dot in its name belongs to a corpus, such as its blocklist.
    return [Store(uri, name) for name in names if "." not in name]
