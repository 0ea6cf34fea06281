"""The kernels that the interpreter runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.alignment_kernels import compile_to


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the kernels of tests/support/alignment_kernels.py."""
    folder = tmp_path_factory.mktemp("kernels")
    compile_to(folder)
    return folder
