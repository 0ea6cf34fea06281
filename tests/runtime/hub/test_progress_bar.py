"""The client's progress bars feed our progress line, over HTTP and over Xet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from fusion_edge.runtime.hub.progress_bar import progress_bar
from fusion_edge.runtime.system.progress import Progress


def test_http(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Downloading", 100) as progress:
        bar = progress_bar(progress)
        with bar(unit="B", unit_scale=True, total=60, initial=0, desc="llm.data") as first:
            first.update(50)
            first.update(-50)  # the server ignored the range of a retry
            first.update(60)
        assert (first.n, progress.done) == (60, 60)
        with bar(total=40) as second:
            second.update(40)
        assert progress.done == 100
    with progress_bar(None)(total=5) as silent:
        silent.update(5)
    assert capsys.readouterr().err == ""


def test_xet(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of the file count, not those of the network, which are compressed."""
    with Progress("Downloading", 100) as progress:
        bar: Any = progress_bar(progress)
        reporter = XetDownloadProgressReporter(
            reconstruction_desc="", transfer_desc="", total=100, log_level=30, tqdm_class=bar
        )
        with reporter:
            for done, transferred in ((40, 10), (100, 30)):
                reporter.update_progress(
                    SimpleNamespace(
                        total_bytes=100,
                        total_bytes_completed=done,
                        total_transfer_bytes_completed=transferred,
                        total_bytes_completion_rate=1.0,
                        total_transfer_bytes_completion_rate=None,
                    )
                )
                assert progress.done == done
    assert capsys.readouterr().err == ""
