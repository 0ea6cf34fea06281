"""Small files in which Linux tells of itself (``/proc``, ``/sys``)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def text(path: Path) -> str | None:
    """What a file holds, without white space and zeros at its ends; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \t\n\0")
    except OSError:
        return None


def number(path: Path) -> int | None:
    """A file's whole number; None where there is none."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def fields(path: Path) -> dict[str, str]:
    """Lines such as ``MemTotal:  1024 kB`` by their names, the first of each; empty where the file cannot be read."""
    pairs = [line.split(":", 1) for line in (text(path) or "").splitlines() if ":" in line]
    return {name.strip(): value.strip() for name, value in reversed(pairs)}


def byte_count(written: str) -> int:
    """Of a size such as ``1024 kB``."""
    return 1024 * int(written.removesuffix("kB"))
