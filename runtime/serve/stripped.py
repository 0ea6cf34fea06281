"""Pieces of an answer without the whitespace around it, as in :attr:`Answer.text`."""

from __future__ import annotations

from collections.abc import AsyncIterator


async def stripped(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield pieces whose concatenation has no whitespace at its ends. None of them is empty."""
    held = ""  # whitespace that is part of the answer only if text follows
    has_text = False
    async for piece in pieces:
        text = held + piece if has_text else piece.lstrip()
        kept = text.rstrip()
        held = text[len(kept) :]
        if kept:
            has_text = True
            yield kept
