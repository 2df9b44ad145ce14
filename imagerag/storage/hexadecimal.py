"""Digests: binary in tables, where they take half the space, and hexadecimal digits where people see them."""

import re
from binascii import unhexlify
from collections.abc import Iterable

import pyarrow as pa

from imagerag.errors import UserError

ID = pa.binary(20)
"""Type of the ids of rows."""
SHA256 = pa.binary(32)
_BATCH_ROWS = 8_192


def to_hex(column: pa.Array | pa.ChunkedArray) -> list[str]:
    """Return the values of a column as hexadecimal digits."""
    return [value.hex() for value in column.to_pylist()]


def column_from_hex(texts: pa.ChunkedArray, kind: pa.FixedSizeBinaryType) -> pa.ChunkedArray:
    """Return a column of the values that are written in hexadecimal digits; few of them are Python's objects at a time.

    Raises:
        UserError: if a text is no such value.
    """
    batches = pa.table({"text": texts}).to_batches(max_chunksize=_BATCH_ROWS)
    return pa.chunked_array([from_hex(batch["text"].to_pylist(), kind) for batch in batches], kind)


def from_hex(texts: Iterable[str], kind: pa.FixedSizeBinaryType) -> pa.FixedSizeBinaryArray:
    """Return an array of the values that are written in hexadecimal digits.

    Raises:
        UserError: if a text is no such value.
    """
    texts = list(texts)
    try:
        return pa.array([unhexlify(text) for text in texts], kind)
    except ValueError as error:  # also what Arrow raises for another width
        digits = 2 * kind.byte_width
        wrong = next(text for text in texts if not re.fullmatch(f"[0-9A-Fa-f]{{{digits}}}", text))
        raise UserError(
            f"{'an id' if kind == ID else 'a SHA-256'} has {digits} hexadecimal digits, got {wrong!r}"
        ) from error
