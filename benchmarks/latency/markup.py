"""HTML and SVG as text that is escaped by construction."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = frozenset({"meta", "link"})


class Markup(str):
    """Text that is markup already."""


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """``<tag attributes>children</tag>``: children that are no :class:`Markup` are escaped, and so are attributes.

    In an attribute's name an underscore stands for a hyphen, but one at the end only keeps it from being a keyword.
    """
    names = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    opening = "".join([tag, *(f' {name}="{html.escape(str(value))}"' for name, value in names)])
    return Markup(f"<{opening}>" if tag in _VOID else f"<{opening}>{join(children)}</{tag}>")


def join(parts: Iterable[str]) -> Markup:
    """One after the other."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part, quote=False) for part in parts))
