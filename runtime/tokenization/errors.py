"""What the ``tokenizers`` library raises while it works, as errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers

from fusion_edge.runtime.errors import FusionError


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Around calls of the library: its errors become :class:`FusionError`. They are of the type ``Exception`` itself,
    or panics, which derive from ``BaseException`` and whose class cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise FusionError(
            f"The bundle's tokenizer fails on this text (tokenizers {tokenizers.__version__}: {error}); "
            "export the bundle again, or upgrade tokenizers."
        ) from None
