"""Digests are binary in tables and hexadecimal digits where people see them."""

import pyarrow as pa
import pytest

from imagerag.errors import UserError
from imagerag.storage.hexadecimal import ID, SHA256, from_hex, to_hex


def test_digits_and_bytes_are_the_same_value() -> None:
    texts = ["00" * 20, "0123456789abcdef" * 2 + "ff00ff00"]
    column = from_hex(texts, ID)
    assert column.type == ID
    assert to_hex(column) == to_hex(pa.chunked_array([column])) == texts
    assert to_hex(from_hex([text.upper() for text in texts], ID)) == texts
    assert from_hex([], SHA256) == pa.array([], SHA256)


@pytest.mark.parametrize("text", ["", "0" * 39, "0" * 64, "g" * 40, "é" * 40, "0x" + "0" * 38, " " * 40])
def test_what_is_no_id_is_named(text: str) -> None:
    with pytest.raises(UserError, match=f"40 hexadecimal digits, got {text!r}"):
        from_hex(["0" * 40, text], ID)
