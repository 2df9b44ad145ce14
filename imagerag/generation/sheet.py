"""PNG files of pictures, and contact sheets: a grid of pictures with the prompt of each row."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

_GAP = 4
_LABEL_HEIGHT = 18
_LEAST_SIDE = 96
"""Smaller pictures are enlarged, to be recognisable on high-resolution screens."""


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Return an image of all `rows`; each is a label and pictures, all of the same size."""
    first = rows[0][1][0]
    factor = -(-_LEAST_SIDE // first.width)
    width, height = first.width * factor, first.height * factor
    columns = max(len(pictures) for _, pictures in rows)
    row_height = _LABEL_HEIGHT + height + _GAP
    canvas = Image.new("RGB", (_GAP + columns * (width + _GAP), len(rows) * row_height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for number, (label, pictures) in enumerate(rows):
        top = number * row_height
        draw.text((_GAP, top + 1), _shortened(label, font, canvas.width - 2 * _GAP), "black", font)
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST) if factor > 1 else picture
            canvas.paste(enlarged, (_GAP + column * (width + _GAP), top + _LABEL_HEIGHT))
    return canvas


def to_png(image: Image.Image, about: str | None = None, xmp: str | None = None) -> bytes:
    """Return a picture as a PNG file, with `about` as the text chunk `imagerag`, and an XMP packet, if given."""
    buffer, text = io.BytesIO(), PngInfo()
    if about is not None:
        text.add_text("imagerag", about)
    if xmp is not None:
        text.add_itxt("XML:com.adobe.xmp", xmp)
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def _shortened(label: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> str:
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(f"{label}…") > width:
        label = label[:-1]
    return f"{label}…"
