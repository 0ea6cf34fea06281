"""Messages quoted in the troubleshooting table of the Jetson guide are messages of the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORTEST = 12
"""Characters of a text that identifies a message."""


@cache
def texts() -> frozenset[str]:
    """Return the constant parts of all strings in the code."""
    found: set[str] = set()
    for folder in ("export", "runtime", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return frozenset(found)


def quoted() -> list[str]:
    """Return the messages in the first column of the table, without those of other programs."""
    guide = (ROOT / "docs/jetson.md").read_text(encoding="utf-8")
    table = guide.split("## Troubleshooting")[1]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("message", quoted())
def test_the_code_has_the_message(message: str) -> None:
    parts = [part.strip() for part in message.split("...") if len(part.strip()) >= SHORTEST]
    assert parts
    for part in parts:
        assert any(text in part or part in text for text in texts() if len(text) >= SHORTEST), part
