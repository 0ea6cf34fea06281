"""The cache of images and scenes: what further questions about the same pixels need."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.base import Floats, ImageAlignment, KvPrefix
from fusion_edge.runtime.errors import SceneEvicted, UsageError


@dataclass(eq=False)
class EncodedImage:
    """An image with its features, which do not depend on a question."""

    crops: npt.NDArray[np.uint8]
    """``[5,S,S,3]``."""
    local_pixels: Floats
    """``[1,3,S,S]``: the local crop, normalized."""
    global_features: npt.ArrayLike
    """``[4,P,D]``: a tensor of the backend."""
    alignments: dict[int, ImageAlignment] = field(default_factory=dict)
    """Alignments by query length."""


@dataclass(eq=False)
class CacheEntry:
    """An image in the cache, or a scene of it. Any thread may :meth:`close` a scene."""

    image: EncodedImage | None
    """None once evicted."""
    prefix: KvPrefix | None = None
    """The start of every prompt, if the scene has a guide."""
    is_scene: bool = False
    """Whether it is an open scene."""
    is_closed: bool = False
    """Whether it is a scene that has been closed, and no question has asked about its picture since."""

    def scene(self) -> tuple[EncodedImage, KvPrefix | None]:
        """Return image and prefix. Raise :class:`UsageError` once closed, :class:`SceneEvicted` once evicted."""
        image, prefix = self.image, self.prefix  # before the checks: another thread may close the scene
        if not self.is_scene:
            raise UsageError("This scene has been closed; look at the picture again.")
        if image is None:
            raise SceneEvicted(
                "This scene is no longer cached: later pictures took its place, or the cache was cleared; look at the "
                "picture again, or load the bundle with more cached_images."
            )
        return image, prefix

    def close(self) -> None:
        """Close the scene: its image stays cached."""
        self.is_scene, self.is_closed, self.prefix = False, True, None

    def evict(self) -> None:
        """Drop everything."""
        self.image = self.prefix = None


class ImageCache:
    """The latest images and scenes, at most ``size`` of them. One call at a time.

    The pixels identify an image, so a reused camera buffer is never mistaken for the frame it held before. A closed
    scene is evicted first, then the least recently used entry, and before a new one needs as much memory.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: list[CacheEntry] = []
        """Least recently used first."""
        self.hits = self.misses = 0
        """Searches that found their image, and others."""

    def find(self, crops: npt.NDArray[np.uint8]) -> EncodedImage | None:
        """Return the image of these ``crops``, also if a scene holds it. Its entry becomes the latest used."""
        for entry in reversed(self._entries):
            if entry.image is not None and np.array_equal(entry.image.crops, crops):
                self.use(entry)
                entry.is_closed = False
                self.hits += 1
                return entry.image
        self.misses += 1
        return None

    def use(self, entry: CacheEntry) -> None:
        """Make an entry the latest used."""
        self._entries.remove(entry)
        self._entries.append(entry)

    def make_room(self) -> None:
        """Evict entries until another one has room."""
        while len(self._entries) >= self.size:
            entry = next((one for one in self._entries if one.is_closed), self._entries[0])
            self._entries.remove(entry)
            entry.evict()

    def add(self, image: EncodedImage) -> CacheEntry:
        """Add an image, which has room."""
        entry = CacheEntry(image)
        self._entries.append(entry)
        return entry

    def entry_for_scene(self, image: EncodedImage) -> CacheEntry:
        """Return a new entry of a cached ``image``, which replaces those without a scene."""
        for entry in [one for one in self._entries if one.image is image and not one.is_scene]:
            self._entries.remove(entry)
            entry.evict()
        self.make_room()
        return self.add(image)

    def clear(self) -> None:
        """Evict everything."""
        while self._entries:
            self._entries.pop(0).evict()
