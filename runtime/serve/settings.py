"""Settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fusion_edge.runtime.serve.safety import SafetySettings


@dataclass(frozen=True)
class ServeSettings:
    """What :func:`.app.make_app` serves, and how. It can be pickled."""

    bundle: Path
    """Folder that ``fusion-export`` wrote."""
    model_name: str
    """Id of the model in requests and responses."""
    queue: int = 8
    """Limit of requests that wait, while another one runs."""
    cached_images: int = 4
    """Limit of pictures and scenes whose features stay cached."""
    safety: SafetySettings = field(default_factory=SafetySettings)
    """Who may ask, what, and how much."""
    device: str = "auto"
    """As in :func:`fusion_edge.load`, like the four below."""
    threads: int | None = None
    spin: bool = False
    preload: bool = False
    lock_memory: bool = False
