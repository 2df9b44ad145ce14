"""Takedown from a corpus: images are refused from then on, and removed from the shards that contain them."""

import io
import tarfile
from collections.abc import Collection

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from imagerag.corpus import ledger, shards
from imagerag.storage.files import write_file


def take_down(uri: str, *, urls: Collection[str] = (), sha256s: Collection[str] = ()) -> int:
    """Permanently refuse images by URL or by the SHA-256 of their file, and remove those already stored.

    Returns:
        The number of images removed from the shards.
    """
    with shards.locked(uri):
        entries = pa.table(
            {
                "url": pa.array([*urls, *(None for _ in sha256s)], pa.string()),
                "sha256": pa.array([*(None for _ in urls), *(sha256.lower() for sha256 in sha256s)], pa.string()),
            }
        )
        shards.update_takedowns(
            uri, lambda known: pa.concat_tables([known, entries]).group_by(["url", "sha256"]).aggregate([])
        )
        return remove_taken_down(uri)


def fetched_images(uri: str) -> pa.Table:
    """Return url, caption and sha256 of every image that was ever fetched, including images removed since."""
    attempts = ledger.read_attempts(uri)
    return attempts.filter(pc.is_valid(attempts["sha256"])).select(["url", "caption", "sha256"])


def remove_taken_down(uri: str) -> int:
    """Remove every sample that was taken down from the tars; the ledger keeps its URL, but not the image.

    The caller must hold the lock of the corpus. The operation can be repeated.

    Returns:
        The number of images removed.
    """
    takedowns = shards.read_takedowns(uri)
    if takedowns.num_rows == 0:
        return 0
    _remove_unfinished_tars(uri)
    attempts = ledger.read_attempts(uri)
    fetched = attempts.filter(pc.equal(attempts["status"], "success"))
    judged = ledger.with_takedowns(fetched, takedowns)
    taken = judged.filter(pc.equal(judged["status"], "failed")).group_by("shard").aggregate([("key", "list")])
    return sum(_remove_samples(uri, row["shard"], set(row["key_list"])) for row in taken.to_pylist())


def _remove_unfinished_tars(uri: str) -> None:
    fs, root = shards.open_folder(uri)
    for shard in set(shards.planned_shards(uri)) - set(shards.finished_shards(uri)):
        with shards.locked(uri, shard):
            path = shards.shard_path(root, shard)
            if not shards.is_finished(uri, shard) and fs.exists(path):
                fs.rm_file(path)


def _remove_samples(uri: str, shard: int, keys: set[str]) -> int:
    """Rewrite a shard's tar without the samples `keys`, if it contains any; return how many were removed."""
    path = shards.shard_path(uri, shard)
    kept = io.BytesIO()
    with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file) as tar:
        key_of = {member: member.name.partition(".")[0] for member in tar.getmembers()}
        removed = keys.intersection(key_of.values())
        if not removed:
            return 0
        with tarfile.open(fileobj=kept, mode="w") as smaller:
            for member, key in key_of.items():
                if key not in removed:
                    smaller.addfile(member, tar.extractfile(member))
    write_file(path, kept.getvalue())
    return len(removed)
