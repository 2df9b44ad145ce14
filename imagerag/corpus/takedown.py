"""Takedown from a corpus: images are refused from then on, and removed from the shards that contain them."""

import tarfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pyarrow.compute as pc

from imagerag.corpus.corpus import Corpus
from imagerag.corpus.ledger import having, iter_attempts, with_takedowns
from imagerag.corpus.shards import Shard
from imagerag.storage.files import put_file
from imagerag.storage.locks import check_locks


def remove_images(corpus: Corpus, *, urls: Collection[str] = (), sha256s: Collection[str] = ()) -> int:
    """Permanently refuse images by URL or by the SHA-256 of their file, and remove those already stored.

    Returns:
        The number of images removed from the shards.
    """
    with corpus.lock():
        corpus.block(urls=urls, sha256s=[sha256.lower() for sha256 in sha256s])
        corpus.outcomes().forget()
        return remove_taken_down(corpus)


def remove_taken_down(corpus: Corpus) -> int:
    """Remove every sample that was taken down from the tars; the ledger keeps its URL, but not the image.

    The caller must hold the lock of the corpus. The operation can be repeated.

    Returns:
        The number of images removed.
    """
    takedowns = corpus.takedowns()
    if takedowns.num_rows == 0:
        return 0
    for shard in set(corpus.planned()) - set(corpus.finished()):
        _remove_unfinished_tar(shard)
    num_removed = 0
    urls, sha256s = (takedowns[name].drop_null().to_pylist() for name in ("url", "sha256"))
    for attempts in iter_attempts(corpus, having(urls=urls, sha256s=sha256s)):
        judged = with_takedowns(attempts.filter(pc.equal(attempts["status"], "success")), takedowns)
        taken = judged.filter(pc.equal(judged["status"], "failed")).group_by("shard").aggregate([("key", "list")])
        num_removed += sum(_remove_samples(corpus.shard(row["shard"]), {*row["key_list"]}) for row in taken.to_pylist())
    return num_removed


def _remove_unfinished_tar(shard: Shard) -> None:
    fs, path = fsspec.url_to_fs(shard.tar)
    with shard.lock(), suppress(FileNotFoundError):
        if not shard.is_finished():
            fs.rm_file(path)


def _remove_samples(shard: Shard, keys: set[str]) -> int:
    """Rewrite a shard's tar without the samples `keys`, if it contains any; return how many were removed.

    The new tar is written to a temporary file first: it may be larger than memory.
    """
    with TemporaryDirectory(prefix="imagerag-") as folder:
        path = Path(folder, "smaller.tar")
        with fsspec.open(shard.tar, "rb") as file, tarfile.open(fileobj=file) as tar:
            key_of = {member: member.name.partition(".")[0] for member in tar.getmembers()}
            removed = keys.intersection(key_of.values())
            if not removed:
                return 0
            with tarfile.open(path, "w") as smaller:
                for member, key in key_of.items():
                    if key not in removed:
                        smaller.addfile(member, tar.extractfile(member))
        check_locks()
        put_file(shard.tar, path)
    return len(removed)
