"""All kinds of mutants, by the names of ``--kind``."""

from __future__ import annotations

from fuzz.bundle_mutants import Bundles
from fuzz.checkpoint_mutants import Checkpoints
from fuzz.external import Kernels, SystemCalls
from fuzz.history_mutants import Histories
from fuzz.image_mutants import Images
from fuzz.judge import Kind
from fuzz.planted import Planted
from fuzz.tokenizer_mutants import Tokenizers


def kinds() -> dict[str, Kind]:
    """Return new kinds, not prepared yet. Kinds with a share of 0 run only on request."""
    return {
        "checkpoint": Checkpoints(),
        "tokenizer": Tokenizers(),
        "bundle": Bundles(),
        "image": Images(),
        "history": Histories(),
        "kernels": Kernels(),
        "kill": SystemCalls(are_kills=True),
        "write-fault": SystemCalls(are_kills=False),
        "planted": Planted(),
    }
