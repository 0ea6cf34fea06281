"""Progress of a loop over samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from fusion_edge.runtime.system.progress import Progress

T = TypeVar("T")


def shown(label: str, items: Sequence[T]) -> Iterator[T]:
    """Yield items, and show on a terminal how many are done and how long the rest takes."""
    with Progress(label, len(items), unit=None) as progress:
        for item in items:
            yield item
            progress.advance(1)
