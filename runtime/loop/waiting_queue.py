"""The queue of requests that wait for the worker: what runs next, and what leaves when there is no room."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from typing import Generic, Literal, Protocol, TypeVar

WhenFull = Literal["drop_oldest", "refuse", "wait"]
"""What happens if the queue is full: the oldest request leaves, ``submit`` raises :class:`QueueFull`, or it waits."""


class Waiting(Protocol):
    """What the queue knows of a request."""

    @property
    def key(self) -> Hashable:
        """Requests of equal keys replace each other; None replaces nothing."""
        ...

    @property
    def priority(self) -> int:
        """Higher runs earlier."""
        ...


R = TypeVar("R", bound=Waiting)


class WaitingQueue(Generic[R]):
    """Requests by priority, then by arrival. One thread at a time.

    A request that replaces another takes its place, so cameras of different rates take turns.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._places: dict[R, int] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[R]:
        return iter(list(self._places))

    def is_beyond(self, request: R) -> bool:
        """Return whether a request waits beyond the capacity."""
        place = self._places.get(request)
        return place is not None and sum(other < place for other in self._places.values()) >= self.capacity

    @property
    def is_full(self) -> bool:
        """Whether a new request finds no room."""
        return len(self._places) >= self.capacity

    def append(self, request: R) -> None:
        """Add a request, also beyond the capacity."""
        self._places[request] = next(self._numbers)

    def replace(self, request: R) -> R | None:
        """Put a request in the place of the one of its key, and return that; None, and no change, without one."""
        if request.key is None:
            return None
        old = next((waiting for waiting in self._places if waiting.key == request.key), None)
        if old is not None:
            self._places[request] = self._places.pop(old)
        return old

    def drop(self) -> R:
        """Remove and return the oldest request of the lowest priority."""
        last = min(self._places, key=lambda request: (request.priority, self._places[request]))
        del self._places[last]
        return last

    def pop(self) -> R:
        """Remove and return the oldest request of the highest priority."""
        first = min(self._places, key=lambda request: (-request.priority, self._places[request]))
        del self._places[first]
        return first

    def remove(self, request: R) -> bool:
        """Remove a request; return whether it waited."""
        return self._places.pop(request, None) is not None
