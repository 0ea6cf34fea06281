"""A strict reader of the protobuf wire format (https://protobuf.dev/programming-guides/encoding/)."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # wire types; groups (3 and 4) are obsolete


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield field numbers and values of a message: ``int`` for varints (unsigned), ``bytes`` for all others.

    Raises ``ValueError`` for a truncated message, a group, field 0, or a number above 64 bits.
    """
    position, end = 0, len(message)
    while position < end:
        tag = message[position]  # inlined: most numbers have one byte, and a call for each doubles the time
        position += 1
        if tag >= 0x80:
            tag, position = _varint(message, position - 1)
        wire_type = tag & 7
        if tag < 8:
            raise ValueError("field 0")  # invalid; a file of zeros would be full of them
        if wire_type in (FIXED_32, FIXED_64):
            length = 4 if wire_type == FIXED_32 else 8
        elif wire_type in (VARINT, BYTES):
            if position == end:
                raise ValueError("truncated")
            length = message[position]
            position += 1
            if length >= 0x80:
                length, position = _varint(message, position - 1)
            if wire_type == VARINT:
                yield tag >> 3, length
                continue
        else:
            raise ValueError(f"wire type {wire_type}")
        stop = position + length
        if stop > end:
            raise ValueError("truncated")
        yield tag >> 3, message[position:stop]
        position = stop


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return a number and the position after it."""
    value = shift = 0
    for index in range(position, min(position + 10, len(message))):
        byte = message[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, index + 1
        shift += 7
    raise ValueError("a number above 64 bits")
