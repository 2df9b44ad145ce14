"""Detection of a file's type by its first bytes, to report files that are not of the expected type."""

import re

HEAD_BYTES = 512
"""Number of leading bytes that are inspected."""

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"\0\0\x01\0", "icon (ICO)"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\x1a\x45\xdf\xa3", "video (Matroska)"),
    (b"PK\x03\x04", "ZIP (which xlsx and docx are, too)"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"Rar!", "RAR"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "Arrow"),
    (b"SQLite format 3\0", "SQLite"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office (which xls is)"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
    (b"version https://git-lfs", "Git LFS pointer"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", **dict.fromkeys(_HEIC_BRANDS, "HEIC")}
_TEXTS = (
    (rb"<svg[\s>]", "SVG"),
    (rb"<!doctype\s+html|<html|<head|<body|<script", "HTML"),
    (rb"<\?xml|<!doctype", "XML"),
    (rb"[\[{]", "JSON"),
)


def seems(head: bytes) -> str:
    """Return a short name of the type of a file that begins with `head`."""
    if not head:
        return "an empty file"
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head.startswith(b"RIFF"):
        return "WebP" if head[8:12] == b"WEBP" else "RIFF (audio or video)"
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "BMP"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "video (MP4)")
    if head[257:262] == b"ustar":
        return "tar"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for pattern, name in _TEXTS:
        if re.match(pattern, start):
            return "SVG" if name == "XML" and re.search(rb"<svg|<!doctype\s+svg", start) else name
    return "text" if _is_text(head) else "an unknown kind of data"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # otherwise, the end of `head` splits a character
            return False
        text = head[: error.start].decode()
    return not re.search(r"[\x00-\x08\x0e-\x1f]", text)
