"""The client's progress bars, as our progress line."""

from __future__ import annotations

from types import TracebackType

from fusion_edge.runtime.system.progress import Progress


def progress_bar(progress: Progress | None) -> type:
    """Return a class with the part of ``tqdm`` that the client uses. It adds to ``progress``; None shows nothing."""

    class Bar:
        def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
            self.total = total
            self.n = initial

        def update(self, count: int = 1) -> None:
            self.n += count
            if progress is not None:
                progress.advance(count)

        def update_transfer(self, count: int) -> None:
            """Ignore bytes of the network: of compressed data there are fewer than of the file."""

        def __enter__(self) -> Bar:
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            self.close()

        def _ignore(self, *_: object, **__: object) -> None:
            """Do nothing: only the line of ``progress`` is shown."""

        close = refresh = reset = set_description = set_description_str = _ignore
        set_postfix_str = set_transfer_postfix_str = _ignore

    return Bar
