"""What people's files are like, and what has to come of each: one row a case."""

import io
import struct

import numpy as np
from PIL import Image

from tests.corpus import photos
from tests.corpus.fetched import MAX_BYTES, Fetched
from tests.corpus.photos import encoded, in_profile, scene, turned, with_end_mark


def _orientations() -> list[Fetched]:
    cases = []
    for orientation in range(1, 9):
        for image_format in ("JPEG", "PNG", "WEBP"):
            cases.append(
                Fetched(
                    what=f"a large {image_format} with orientation {orientation}",
                    file=lambda o=orientation, f=image_format: turned(o, image_format=f),
                    size=(160, 256),
                    seen=scene,
                )
            )
        cases.append(
            Fetched(
                what=f"a small JPEG with orientation {orientation}",
                file=lambda o=orientation: turned(o, (40, 64)),
                size=(40, 64),
                seen=lambda: scene((40, 64)),
                is_kept=orientation == 1,
            )
        )
    for orientation in (0, 9, 65535):
        cases.append(
            Fetched(
                what=f"an orientation that EXIF doesn't have, {orientation}",
                file=lambda o=orientation: turned(o, (40, 64)),
                size=(40, 64),
                seen=lambda: scene((40, 64)),
                is_kept=True,
            )
        )
    broken = {
        "no TIFF header": b"Exif\0\0garbage, not a TIFF header",
        "cut off": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",
        "offsets beyond its end": b"Exif\0\0MM\0*\xff\xff\xff\x08\0\x01",
    }
    for kind, exif in broken.items():
        cases.append(
            Fetched(
                what=f"a broken EXIF block: {kind}",
                file=lambda e=exif: encoded(scene((40, 64)), exif=e),
                size=(40, 64),
                seen=lambda: scene((40, 64)),
            )
        )
    return cases


def _grey() -> Image.Image:
    return Image.linear_gradient("L").resize((60, 90))


def _on_white(alpha: Image.Image, colour: Image.Image) -> Image.Image:
    return Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)


def _translucent() -> Image.Image:
    image = scene((60, 90)).convert("RGBA")
    image.putalpha(_grey())
    return image


def _palette_with_clear_colour() -> bytes:
    image = Image.new("P", (60, 90), 1)
    image.paste(0, (0, 0, 60, 45))
    image.putpalette([10, 20, 30, 200, 30, 40])
    return encoded(image, "PNG", transparency=0)


def _palette_seen() -> Image.Image:
    image = Image.new("RGB", (60, 90), (200, 30, 40))
    image.paste((255, 255, 255), (0, 0, 60, 45))
    return image


INKS = [  # full inks as sRGB colours, black changing fastest, then yellow, magenta, cyan: no printer's own, to show
    tuple(round(channel * (0.15 if k else 1)) for channel in colour)
    for colour in (
        *((255, 255, 255), (240, 200, 40), (180, 40, 120), (170, 50, 30)),
        *((0, 120, 190), (30, 130, 60), (40, 40, 130), (50, 50, 45)),
    )
    for k in (0, 1)
]


def _printed() -> Image.Image:
    """Four fields: white, cyan, magenta and yellow, full."""
    fields = np.zeros((64, 64, 4), np.uint8)
    fields[:32, 32:, 0] = fields[32:, :32, 1] = fields[32:, 32:, 2] = 255
    return Image.frombytes("CMYK", (64, 64), fields.tobytes())


def _print_seen() -> Image.Image:
    fields = np.zeros((64, 64, 3), np.uint8)
    fields[:32, :32], fields[:32, 32:], fields[32:, :32], fields[32:, 32:] = INKS[0], INKS[8], INKS[4], INKS[2]
    return Image.fromarray(fields)


def _two_pictures() -> bytes:
    """A JPEG of several pictures (MPO), as phones write it for depth and HDR: the first is the photo."""
    file = io.BytesIO()
    scene((60, 90)).save(file, "MPO", save_all=True, append_images=[scene((60, 90), seed=1)], quality=95)
    return file.getvalue()


def _gain_map() -> bytes:
    """A photo with an HDR gain map behind it."""
    head = encoded(scene((60, 90)))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description hdrgm:Version="1.0"/></x:xmpmeta>'
    return head[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + head[2:] + encoded(_grey())


def _deep(channels: int) -> np.ndarray:
    return np.asarray(scene((60, 90)))[..., :channels].astype(np.uint16) * 257


def _colours() -> list[Fetched]:
    small = (60, 90)
    plain = lambda: scene(small)  # noqa: E731
    shown = {"size": small, "seen": plain}
    return [
        Fetched(
            what="an sRGB profile",
            file=lambda: encoded(plain(), icc_profile=photos.SRGB.tobytes()),
            **shown,
            is_kept=True,
        ),
        Fetched(what="no profile", file=lambda: encoded(plain()), **shown, is_kept=True),
        Fetched(
            what="Display P3",
            file=lambda: encoded(in_profile(plain(), photos.P3), icc_profile=photos.P3, subsampling=0),
            **shown,
            is_kept=False,
        ),
        Fetched(
            what="Display P3, large",
            file=lambda: encoded(in_profile(scene(), photos.P3), icc_profile=photos.P3),
            size=(160, 256),
            seen=scene,
        ),
        Fetched(
            what="Display P3 in a PNG",
            file=lambda: encoded(in_profile(plain(), photos.P3), "PNG", icc_profile=photos.P3),
            **shown,
        ),
        Fetched(
            what="Display P3 in a WebP",
            file=lambda: encoded(in_profile(plain(), photos.P3), "WEBP", icc_profile=photos.P3),
            **shown,
        ),
        Fetched(
            what="Adobe RGB",
            file=lambda: encoded(in_profile(plain(), photos.ADOBE_RGB), icc_profile=photos.ADOBE_RGB),
            **shown,
        ),
        Fetched(
            what="a profile that is no profile",
            file=lambda: encoded(plain(), icc_profile=b"no profile at all"),
            **shown,
        ),
        Fetched(
            what="a profile of another kind than the pixels",
            file=lambda: encoded(plain(), icc_profile=photos.GREY_LINEAR),
            **shown,
        ),
        Fetched(
            what="transparency and Display P3",
            file=lambda: _with_alpha_in_p3(),
            size=small,
            seen=lambda: _on_white(_grey(), plain()),
        ),
        Fetched(what="grey", file=lambda: encoded(_grey()), size=small, seen=_grey, is_kept=True),
        Fetched(
            what="grey with a linear profile",
            file=lambda: encoded(_grey(), icc_profile=photos.GREY_LINEAR),
            size=small,
            seen=lambda: _grey().point(lambda level: _srgb_of_linear(level)),
            is_kept=False,
        ),
        Fetched(what="CMYK", file=lambda: encoded(_printed()), size=(64, 64), seen=lambda: _printed().convert("RGB")),
        Fetched(
            what="CMYK with a profile",
            file=lambda: encoded(_printed(), icc_profile=photos.inks(INKS)),
            size=(64, 64),
            seen=_print_seen,
        ),
        Fetched(
            what="CMYK with a profile, TIFF",
            file=lambda: encoded(_printed(), "TIFF", icc_profile=photos.inks(INKS)),
            size=(64, 64),
            seen=_print_seen,
        ),
        Fetched(what="16 bits a channel", file=lambda: photos.png(_deep(3), 2), **shown),
        Fetched(
            what="16 bits, grey", file=lambda: photos.png(_deep(1), 0), size=small, seen=lambda: plain().getchannel("R")
        ),
        Fetched(
            what="16 bits with transparency",
            file=lambda: photos.png(np.dstack([_deep(3), np.asarray(_grey()).astype(np.uint16) * 257]), 6),
            size=small,
            seen=lambda: _on_white(_grey(), plain()),
        ),
        Fetched(
            what="transparency",
            file=lambda: encoded(_translucent(), "PNG"),
            size=small,
            seen=lambda: _on_white(_grey(), plain()),
        ),
        Fetched(
            what="transparency in a WebP",
            file=lambda: encoded(_translucent(), "WEBP", exact=True),
            size=small,
            seen=lambda: _on_white(_grey(), plain()),
        ),
        Fetched(
            what="grey with transparency",
            file=lambda: encoded(_translucent().convert("LA"), "PNG"),
            size=small,
            seen=lambda: _on_white(_grey(), plain().convert("L").convert("RGB")),
        ),
        Fetched(what="a palette", file=lambda: encoded(plain().quantize(64), "PNG"), **shown, within=12),
        Fetched(what="a palette with a clear colour", file=_palette_with_clear_colour, size=small, seen=_palette_seen),
        Fetched(
            what="a colour that counts as clear",
            file=lambda: encoded(Image.new("RGB", small, (10, 20, 30)), "PNG", transparency=(10, 20, 30)),
            size=small,
            seen=lambda: Image.new("RGB", small, "white"),
        ),
        Fetched(
            what="black and white",
            file=lambda: encoded(_grey().convert("1"), "PNG"),
            size=small,
            within=140,
            seen=_grey,
        ),
        Fetched(what="a progressive JPEG", file=lambda: encoded(plain(), progressive=True), **shown, is_kept=True),
        Fetched(
            what="an arithmetic JPEG",
            file=lambda: photos.ARITHMETIC,
            size=(48, 32),
            seen=lambda: scene((48, 32)),
            within=12,
        ),
        Fetched(what="a JPEG without subsampling", file=lambda: encoded(plain(), subsampling=0), **shown, is_kept=True),
        Fetched(what="several pictures in one JPEG", file=_two_pictures, **shown, is_kept=False),
        Fetched(what="an HDR gain map", file=_gain_map, **shown),
    ]


def _with_alpha_in_p3() -> bytes:
    image = in_profile(scene((60, 90)), photos.P3)
    image.putalpha(_grey())
    return encoded(image, "PNG", icc_profile=photos.P3)


def _srgb_of_linear(level: float) -> float:
    value = level / 255
    return 255 * (12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055)


def _animation(image_format: str) -> bytes:
    return encoded(scene((60, 90)), image_format, save_all=True, append_images=[scene((60, 90), seed=1)], duration=100)


def _formats() -> list[Fetched]:
    small = (60, 90)
    shown = {"size": small, "seen": lambda: scene(small)}

    def refused(what: str, file: bytes, seems: str) -> Fetched:
        return Fetched(what=what, file=lambda: file, outcome="unsupported_format", detail=f"{seems}; taken are jpeg")

    return [
        Fetched(what="GIF", file=lambda: encoded(scene(small), "GIF"), **shown, within=12),
        Fetched(what="an animated GIF", file=lambda: _animation("GIF"), **shown, within=12),
        Fetched(what="an animated WebP", file=lambda: _animation("WEBP"), **shown),
        Fetched(what="an animated PNG", file=lambda: _animation("PNG"), **shown),
        Fetched(what="AVIF", file=lambda: encoded(scene(small), "AVIF", quality=95), **shown),
        Fetched(
            what="AVIF with an orientation",
            file=lambda: turned(6, image_format="AVIF"),
            size=(160, 256),
            seen=scene,
            within=6,
        ),
        Fetched(what="TIFF", file=lambda: encoded(scene(small), "TIFF"), **shown),
        Fetched(what="TIFF with LZW", file=lambda: encoded(scene(small), "TIFF", compression="tiff_lzw"), **shown),
        Fetched(
            what="TIFF with an orientation",
            file=lambda: turned(6, (200, 320), "TIFF"),
            size=(160, 256),
            seen=lambda: scene((200, 320)),
        ),
        Fetched(what="BMP", file=lambda: encoded(scene(small), "BMP"), **shown),
        Fetched(
            what="a TIFF of floats",
            file=lambda: encoded(scene(small).convert("F"), "TIFF"),
            outcome="unsupported_format",
            detail="TIFF with 32 bits a channel",
        ),
        refused("a page", b"<!doctype html><title>Not found</title>", "HTML"),
        refused("a page with a byte order mark", b"\xef\xbb\xbf\n<html>", "HTML"),
        refused("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        refused(
            "SVG that reads a file", b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///e">]>', "SVG"
        ),
        refused("XML", b'<?xml version="1.0"?><rss/>', "XML"),
        refused("JSON", b'{"error": "no such image"}', "JSON"),
        refused("text", b"Too many requests", "text"),
        refused("nothing", b"", "an empty file"),
        refused("PDF", b"%PDF-1.7\n", "PDF"),
        refused("Photoshop", b"8BPS\0\x01", "Photoshop (PSD)"),
        refused("a video", b"\0\0\0\x18ftypmp42" + bytes(20), "video (MP4)"),
        refused("JPEG XL", b"\xff\x0a" + bytes(20), "JPEG XL"),
        refused("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        refused("an icon", b"\0\0\x01\0\x01\0" + bytes(20), "icon (ICO)"),
        refused("a ZIP", b"PK\x03\x04" + bytes(20), "ZIP (which xlsx and docx are, too)"),
        refused("PPM", b"P6\n1 1\n255\n\0\0\0", "an unknown kind of data"),
        refused("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        refused("noise", bytes(range(128, 256)), "an unknown kind of data"),
    ]


def _damage() -> list[Fetched]:
    photo = encoded(scene())
    restarts = encoded(scene(), restart_marker_rows=1)
    grey_below = Image.new("RGB", (200, 320), (128, 128, 128))
    grey_below.paste(scene((200, 160)), (0, 0))
    corrupt = {
        "half a JPEG": photo[: len(photo) // 2],
        "a JPEG without its end": photo[:-200],
        "half a JPEG with an end mark": with_end_mark(photo, 0.5),
        "most of a JPEG with an end mark": with_end_mark(photo, 0.97),
        "half a JPEG with restart marks and an end mark": with_end_mark(restarts, 0.5),
        "half a progressive JPEG": encoded(scene(), progressive=True)[:3000],
        "a JPEG's first bytes": photo[:15],
        "half a PNG": encoded(scene(), "PNG")[:5000],
        "a PNG's header": encoded(scene(), "PNG")[:20],
        "half a WebP": encoded(scene(), "WEBP")[:5000],
        "half a GIF": encoded(scene(), "GIF")[:5000],
        "half a TIFF": encoded(scene((60, 90)), "TIFF")[:5000],
        "half an AVIF": encoded(scene(), "AVIF")[:1000],
        "a PNG with a wrong checksum": encoded(scene(), "PNG").replace(b"IHDR\0\0\x01", b"IHDR\0\0\x02"),
    }
    return [
        *(Fetched(what=what, file=lambda file=file: file, outcome="corrupt_image") for what, file in corrupt.items()),
        Fetched(
            what="a whole JPEG that is grey below",
            file=lambda: encoded(grey_below),
            size=(160, 256),
            seen=lambda: grey_below,
        ),
        Fetched(
            what="a whole JPEG, all grey",
            file=lambda: encoded(Image.new("RGB", (64, 64), (128, 128, 128))),
            size=(64, 64),
            seen=lambda: Image.new("RGB", (64, 64), (128, 128, 128)),
        ),
        Fetched(what="a JPEG with more behind it", file=lambda: photo + b"trailing bytes", size=(160, 256), seen=scene),
        Fetched(what="one pixel", file=lambda: encoded(Image.new("RGB", (1, 1), "red"), "PNG"), size=(1, 1)),
        Fetched(
            what="a very long picture", file=lambda: encoded(Image.new("RGB", (2000, 2), "red"), "PNG"), size=(256, 1)
        ),
        Fetched(
            what="too many pixels",
            file=lambda: encoded(Image.new("RGB", (401, 641))),
            outcome="too_many_pixels",
            detail="401x641",
        ),
        Fetched(
            what="too many bytes",
            file=lambda: bytes(MAX_BYTES + 1),
            outcome="too_many_bytes",
            detail=f"more than {MAX_BYTES}",
        ),
    ]


FILES = [*_orientations(), *_colours(), *_formats(), *_damage()]
