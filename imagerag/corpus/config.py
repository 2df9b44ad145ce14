"""How a download behaves."""

from importlib.metadata import version
from typing import Literal

from pydantic import Field

from imagerag.config import Config

ImageFormat = Literal["jpeg", "png", "webp", "gif", "avif", "heic", "tiff", "bmp"]


class DownloadConfig(Config):
    """What may be fetched, how, and what is kept of it."""

    image_size: int = Field(
        default=512, ge=16, le=4096, description="Longest side of a stored image in pixels; smaller images stay as is."
    )
    image_format: Literal["jpg", "webp", "png"] = Field(
        default="jpg",
        description="Format of stored images. A file that has it already, is small enough, upright, in sRGB and opaque "
        "is kept as it is.",
    )
    formats: tuple[ImageFormat, ...] = Field(
        default=("jpeg", "png", "webp", "gif", "avif", "heic", "tiff", "bmp"),
        min_length=1,
        description="Formats that are decoded, of an animation its first picture; heic needs the extra `heic`.",
    )
    timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="Seconds that one attempt at a URL may take: looking up its host, redirects and all.",
    )
    retries: int = Field(
        default=1,
        ge=0,
        le=10,
        description="Further attempts at a URL that fails for what may pass. Being told to come later (429, 503) by a "
        "host that takes others is none.",
    )
    back_off_s: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="Seconds before the first further attempt, or before a host that is in trouble is asked again; "
        "doubled each time, at most to 60, and half of it at random. A host's own `Retry-After` comes before it.",
    )
    per_host: int = Field(
        default=8, ge=1, le=1024, description="URLs fetched from one host at a time, by all workers together."
    )
    per_host_rate: float | None = Field(
        default=None,
        gt=0,
        description="URLs a second that one host is asked for at most, by all workers together. Unset: as many as it "
        "takes; where it refuses (429, 503), what it was seen to take.",
    )
    max_host_failures: int = Field(
        default=5,
        ge=1,
        description="Failures in a row (no address, no connection, no answer in time, 429, 503) after which a host is "
        "set aside for the run.",
    )
    max_wait_s: float = Field(
        default=600.0,
        ge=0,
        le=86_400,
        description="Seconds by which a shard may take longer because hosts ask to be waited for, or refuse, beside "
        "a second for each of its URLs. What is not fetched by then is tried by the next run.",
    )
    thread_count: int = Field(default=64, ge=1, le=1024, description="URLs fetched at a time by one worker.")
    shard_size: int = Field(default=1000, ge=1, le=10_000, description="URLs of one shard.")
    max_bytes: int = Field(default=20 * 2**20, ge=1, le=2**30, description="Largest file, in bytes.")
    max_pixels: int = Field(
        default=50_000_000, ge=1, le=80_000_000, description="Largest image, in pixels, as its header states."
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Hosts that may have a private or loopback address, as `host` or `host:port`. "
        "All other hosts must have public addresses.",
    )
    respect_opt_out: bool = Field(
        default=True,
        description="Leave out images whose server says noai, noimageai, noindex or noimageindex (X-Robots-Tag) "
        "or reserves text and data mining (tdm-reservation: 1).",
    )
    user_agent: str = Field(
        default=f"ImageRAGTurbo/{version('imagerag-turbo')}",
        pattern=r"^[\x20-\x7e]+$",
        description="How requests name themselves; an address where you can be reached is polite.",
    )
