"""Cached features: a column of the table with a base model's features of each row.

A column belongs to one base model, one resolution and one way of fitting images into the model's square, which a digest
in its name and metadata identifies. A row without a value has not been computed yet; a boolean column stores the same
information, because counting by the features would read them all. Since features are columns, takedown, rollback and
publishing need no special rules. A version of the table has one column per base model. Only the metadata of
this column states how images are fitted, so users of the index fit their own images in the same way.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from math import prod
from typing import Any

import pyarrow as pa
from lance import LanceDataset, LanceOperation
from lance.fragment import FragmentMetadata

from imagerag.errors import UserError
from imagerag.retrieval.ann import read_record
from imagerag.retrieval.schema import FEATURE_KEY, FEATURE_PREFIX, FeatureIdentity, Features
from imagerag.retrieval.store import Store

Compute = Callable[[list[bytes], list[str]], Features]
"""Computes the features (N, C, H, W) of encoded images and their captions."""


def is_feature(field: pa.Field) -> bool:
    """Return whether a column contains cached features."""
    return bool(field.name.startswith(FEATURE_PREFIX))


def cached_features(schema: pa.Schema) -> list[FeatureIdentity]:
    """Return the identities of the cached features that a table has columns for."""
    found = [json.loads(field.metadata[FEATURE_KEY]) for field in schema if is_feature(field)]
    # Columns of early versions do not state how images were fitted: all were cropped.
    return [FeatureIdentity(**{"fit": "crop"} | each | {"shape": tuple(each["shape"])}) for each in found]


def require_cached(schema: pa.Schema, identity: FeatureIdentity) -> None:
    """Make sure that a table has a column for `identity`.

    Raises:
        UserError: if it has none; the message names the identities that it has columns for.
    """
    cached = cached_features(schema)
    if identity.digest in (each.digest for each in cached):
        return
    there = ", ".join(map(_named, cached)) or "no base model"
    raise UserError(
        f"the index has cached features for {there}, and none for {_named(identity)}: `imagerag features` makes them"
    )


def _named(identity: FeatureIdentity) -> str:
    return f"{identity.base} (fit {identity.fit}, digest {identity.digest})"


def lacking(schema: pa.Schema, identity: FeatureIdentity) -> str:
    """Return the SQL condition for rows without features, in a table that has the column.

    In older tables without the boolean column, it tests the features themselves, which reads them.
    """
    return f"{identity.presence} IS NOT TRUE" if identity.presence in schema.names else f"{identity.column} IS NULL"


def count_lacking(dataset: LanceDataset, identity: FeatureIdentity) -> int:
    """Return the number of rows of a table without these features.

    An indexed version states it. In other versions, the rows are counted.
    """
    if identity.column not in dataset.schema.names:
        return int(dataset.count_rows())
    record = read_record(dataset)
    if record is not None and record.version == dataset.version and identity.digest in record.lacking:
        return record.lacking[identity.digest]
    return int(dataset.count_rows(lacking(dataset.schema, identity)))


def prepare(store: Store, identity: FeatureIdentity, superseded: Collection[FeatureIdentity] = ()) -> int:
    """Make sure that the table has the columns, and return the newest version. The caller must hold `writer_lock`.

    Args:
        superseded: features that are dropped from the newest version; earlier versions keep them.
    """
    dataset = store.dataset()
    if superseded:  # dropped first, so that no version has both, even if this is killed
        own = {name for each in superseded for name in (each.column, each.presence)}
        dataset.drop_columns([name for name in dataset.schema.names if name in own])
    if identity.column not in dataset.schema.names:
        dataset.add_columns(pa.schema([identity.to_field(), pa.field(identity.presence, pa.bool_())]))
    elif identity.presence not in dataset.schema.names:
        dataset.add_columns({identity.presence: f"{identity.column} IS NOT NULL"})
    return store.version


def missing(dataset: LanceDataset, identity: FeatureIdentity) -> dict[int, int]:
    """Return the number of rows without features in each fragment that has such rows."""
    if not count_lacking(dataset, identity):  # which is faster than counting by fragment
        return {}
    condition = lacking(dataset.schema, identity)
    counts = {fragment.fragment_id: fragment.count_rows(condition) for fragment in dataset.get_fragments()}
    return {fragment: count for fragment, count in counts.items() if count}


def fill(
    store: Store, identity: FeatureIdentity, version: int, fragment: int, compute: Compute, batch_size: int
) -> str:
    """Compute the missing features of a fragment, and write them to a file that belongs to no version yet.

    May run in any process. Keeps the features of the fragment's missing rows in memory, a few thousand rows at most.

    Returns:
        What `commit` needs to add the file to the table, as JSON.
    """
    dataset = store.dataset(version)
    part, parts = dataset.get_fragment(fragment), []
    fields = [pa.field("_rowid", pa.uint64()), identity.to_field(), pa.field(identity.presence, pa.bool_())]
    condition = lacking(dataset.schema, identity)
    rows = part.to_batches(columns=["image", "caption"], filter=condition, with_row_id=True, batch_size=batch_size)
    for batch in rows:
        features = compute(batch["image"].to_pylist(), batch["caption"].to_pylist())
        assert features.shape == (len(batch), *identity.shape), (features.shape, identity)
        values = pa.FixedSizeListArray.from_arrays(features.ravel(), prod(identity.shape))
        parts.append(pa.table([batch["_rowid"], values, pa.repeat(True, len(batch))], schema=pa.schema(fields)))
    metadata, modified = part.update_columns(pa.concat_tables(parts))
    return json.dumps({"fragment": metadata.to_json(), "modified": modified})


def commit(store: Store, filled: Sequence[str], version: int) -> int:
    """Commit what `fill` wrote for some fragments in one transaction, and return the new version.

    Raises:
        CommitConflictError: if another writer changed one of the fragments since `version`.
    """
    adopted: list[dict[str, Any]] = [json.loads(each) for each in filled]
    about = [each["fragment"] for each in adopted]
    fragments = [FragmentMetadata.from_json(each if isinstance(each, str) else json.dumps(each)) for each in about]
    modified = sorted({field for each in adopted for field in each["modified"]})
    operation = LanceOperation.Update(updated_fragments=fragments, fields_modified=modified)
    return int(store.transact(operation, version).version)


def to_features(column: pa.ChunkedArray, identity: FeatureIdentity) -> Iterator[Features | None]:
    """Yield the features (C, H, W) of each value of the column; None where they are missing."""
    for chunk in column.chunks:
        # Flattening skips nulls.
        present = iter(chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, *identity.shape))
        yield from (next(present) if valid else None for valid in chunk.is_valid().to_pylist())
