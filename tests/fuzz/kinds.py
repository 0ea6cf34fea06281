"""Every kind of mutant, by the name that ``--kind`` takes."""

from __future__ import annotations

from fuzz.image_mutants import Images
from fuzz.judge import Kind


def kinds() -> dict[str, Kind]:
    """New ones, not prepared yet."""
    return {"image": Images()}
