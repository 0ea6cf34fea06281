"""The queue of an asker: order, replacement in place, and who leaves."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.runtime.loop.waiting_queue import WaitingQueue


@dataclass(eq=False)
class Entry:
    name: str
    priority: int = 0
    key: str | None = None


def names(queue: WaitingQueue[Entry]) -> str:
    return "".join(queue.pop().name for _ in range(len(queue)))


def filled(*entries: Entry, capacity: int = 8) -> WaitingQueue[Entry]:
    queue = WaitingQueue[Entry](capacity)
    for entry in entries:
        queue.append(entry)
    return queue


def test_the_highest_priority_then_the_oldest_runs_first() -> None:
    assert names(filled(Entry("a"), Entry("b", 1), Entry("c", -1), Entry("d", 1), Entry("e"))) == "bdaec"


def test_the_oldest_of_the_lowest_priority_leaves() -> None:
    queue = filled(Entry("a", 1), Entry("b"), Entry("c"))
    assert [queue.drop().name for _ in range(3)] == ["b", "c", "a"]


def test_a_replacement_takes_the_place_and_keeps_its_own_priority() -> None:
    old, urgent = Entry("a", key="x"), Entry("d", 2, key="y")
    queue = filled(old, Entry("b"), Entry("c", key="y"))
    assert queue.replace(Entry("A", key="x")) is old
    assert queue.replace(urgent) is not None
    assert names(queue) == "dAb"


def test_only_an_equal_key_is_replaced() -> None:
    queue = filled(Entry("a", key="x"), Entry("b"))
    assert queue.replace(Entry("c")) is None
    assert queue.replace(Entry("d", key="y")) is None
    assert names(queue) == "ab"


def test_a_request_leaves_once() -> None:
    entry = Entry("a")
    queue = filled(entry, Entry("b"))
    assert queue.remove(entry)
    assert not queue.remove(entry)
    assert names(queue) == "b"


def test_room() -> None:
    first, second, third = Entry("a"), Entry("b", 1), Entry("c")
    queue = filled(first, second, capacity=2)
    assert queue.is_full
    queue.append(third)
    assert [queue.is_beyond(entry) for entry in (first, second, third)] == [False, False, True]
    assert queue.pop() is second  # any place that frees counts
    assert not queue.is_beyond(third)
    queue.remove(third)
    assert not queue.is_beyond(third)
    assert not queue.is_full


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from([None, "x", "y"])), max_size=30))
def test_order_equals_a_stable_sort(pushed: list[tuple[int, str | None]]) -> None:
    queue, model = WaitingQueue[Entry](8), list[Entry]()
    for priority, key in pushed:
        entry = Entry("", priority, key)
        places = [place for place, other in enumerate(model) if key is not None and other.key == key]
        replaced = queue.replace(entry)
        if places:
            assert replaced is model[places[0]]
            model[places[0]] = entry
        else:
            assert replaced is None
            queue.append(entry)
            model.append(entry)
    model.sort(key=lambda entry: -entry.priority)
    assert [queue.pop() for _ in range(len(queue))] == model
