"""What pictures a server takes, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageLimits:
    """Limits of an :class:`.ImageSource`. The default takes pictures that are part of the request, and no others."""

    hosts: tuple[str, ...] = ()
    """Exact names of hosts, in lower case, that pictures are fetched from by HTTPS."""
    folder: Path | None = None
    """Absolute path of the folder that pictures are read from."""
    max_bytes: int = 12 << 20
    """Bytes of an encoded picture."""
    max_pixels: int = 4096 * 3072
    """Pixels of a picture, checked before it is decompressed. Five times as many bytes bound the memory to decode it,
    so a format that takes more has a lower limit: WebP, which takes 15 bytes a pixel, a third."""
    fetch_seconds: float = 10.0
    """Seconds to fetch a picture, redirects included."""
    fetches: int = 2
    """Pictures fetched at once, each in memory until it is decoded."""
    decodes: int = 1
    """Pictures decoded at once."""
