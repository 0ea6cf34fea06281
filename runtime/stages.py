"""The stages of a question, by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

WAITING = "waiting"
"""A question waits for its turn. No stage of the pipeline."""
PREPROCESS = "preprocess"
ENCODE_GLOBAL = "encode global crops"
ENCODE_LOCAL = "encode local crop"
ALIGNMENT = "alignment"
PREFILL = "prefill"
DECODE_STEP = "decode step"
SAMPLING = "sampling"

TIMINGS = {
    PREPROCESS: "preprocess",
    ENCODE_GLOBAL: "vision",
    ENCODE_LOCAL: "vision",
    ALIGNMENT: "alignment",
    PREFILL: "prefill",
    DECODE_STEP: "decode",
}
"""Key in :attr:`Answer.timings_ms` by stage. Sampling counts with the stage before it."""

StageHook = Callable[[str], AbstractContextManager[None]]
"""Maps the name of a stage to a context manager that wraps the stage."""

_NO_HOOK = nullcontext()


def no_hook(_stage: str) -> AbstractContextManager[None]:
    """Observe nothing."""
    return _NO_HOOK
