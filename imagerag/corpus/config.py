"""Configuration of downloads."""

from importlib.metadata import version
from typing import Literal

from pydantic import Field

from imagerag.config import Config

IN_FLIGHT_BYTES = 256 * 2**20

ImageFormat = Literal["jpeg", "png", "webp", "gif", "avif", "heic", "tiff", "bmp"]


class DownloadConfig(Config):
    """What may be fetched, how it is fetched, and what is stored."""

    image_size: int = Field(
        default=512,
        ge=16,
        le=4096,
        description="Longest side of a stored image in pixels; smaller images are not enlarged.",
    )
    image_format: Literal["jpg", "webp", "png"] = Field(
        default="jpg",
        description="Format of stored images. A file that already has this format, is small enough, upright, in sRGB "
        "and opaque is stored unchanged.",
    )
    formats: tuple[ImageFormat, ...] = Field(
        default=("jpeg", "png", "webp", "gif", "avif", "heic", "tiff", "bmp"),
        min_length=1,
        description="Formats that are decoded (the first frame of animations); heic requires the extra `heic`.",
    )
    timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="Time limit in seconds for one attempt at a URL, including DNS lookup and redirects.",
    )
    retries: int = Field(
        default=1,
        ge=0,
        le=10,
        description="Maximum number of retries of a URL after transient failures. Being asked to wait (429, 503) by a "
        "host that answers other URLs does not count.",
    )
    back_off_s: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="Seconds before the first retry, or before a failing host is asked again; doubled each time up to "
        "60, with half of it random (jitter). A host's own `Retry-After` replaces the first wait and any shorter one.",
    )
    per_host: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Number of URLs fetched from one host at the same time, by all workers together.",
    )
    per_host_rate: float | None = Field(
        default=None,
        gt=0,
        description="Maximum rate of requests to one host, in URLs per second, by all workers together. Unset: "
        "unlimited until the host refuses (429, 503), then about the rate that it was seen to accept.",
    )
    max_host_failures: int = Field(
        default=5,
        ge=1,
        description="Consecutive failures (DNS failure, no connection, timeout, 429, 503) after which a host is "
        "skipped for the rest of the run.",
    )
    max_wait_s: float = Field(
        default=600.0,
        ge=0,
        le=86_400,
        description="Seconds by which a shard may take longer because hosts refuse or ask to wait, in addition to one "
        "second per URL of the shard. URLs that are not fetched by then are left for the next run.",
    )
    thread_count: int = Field(
        default=64, ge=1, le=1024, description="Number of URLs fetched by one worker at the same time."
    )
    shard_size: int = Field(default=1000, ge=1, le=10_000, description="Number of URLs per shard.")
    max_bytes: int = Field(default=20 * 2**20, ge=1, le=2**30, description="Maximum file size in bytes.")
    max_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=80_000_000,
        description="Maximum number of pixels of an image, according to its header.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Hosts that may have a private or loopback address, as `host` or `host:port`. "
        "All other hosts must have public addresses.",
    )
    respect_opt_out: bool = Field(
        default=True,
        description="Skip images whose server sends noai, noimageai, noindex or noimageindex (X-Robots-Tag) "
        "or reserves text and data mining (tdm-reservation: 1).",
    )
    user_agent: str = Field(
        default=f"ImageRAGTurbo/{version('imagerag-turbo')}",
        pattern=r"^[\x20-\x7e]+$",
        description="User-Agent header of requests. Please include a contact address.",
    )

    @property
    def in_flight_bytes(self) -> int:
        """Maximum bytes of files that one worker holds, fetched and not yet stored."""
        return max(self.max_bytes, IN_FLIGHT_BYTES)
