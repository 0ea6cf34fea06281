"""Translation of errors of the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers

from fusion_edge.runtime.errors import FusionError


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Translate errors of the library to :class:`FusionError`.

    They have the type ``Exception`` itself, or are panics, which derive from ``BaseException`` and cannot be imported.
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
