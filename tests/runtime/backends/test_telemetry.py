"""A robot's runtime calls nobody: ONNX Runtime's telemetry is off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = "import fusion_edge, numpy as np; print(fusion_edge.load({!r}).answer(np.zeros((9, 9, 3), np.uint8), 'Hi').text)"
RECORDS = "import onnxruntime as ort; ort.InferenceSession({!r}, providers=['CPUExecutionProvider'])"


def files_after(home: Path, program: str) -> list[str]:
    """Return the files in a home directory after a program, which does not know that it is tested or runs in CI."""
    names = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    subprocess.run([sys.executable, "-c", program], env=variables | {"HOME": str(home)}, check=True)
    return [path.name for path in home.rglob("*") if path.is_file()]


def test_a_question_records_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    assert files_after(tmp_path, ASK.format(str(tiny_bundle))) == []


def test_a_session_of_the_program_itself_records_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    """One that imports ``onnxruntime`` between ``fusion_edge`` and its first use."""
    graph = str(tiny_bundle / "alignment_decoder.onnx")
    assert files_after(tmp_path, "import fusion_edge; " + RECORDS.format(graph)) == []


def test_the_check_sees_a_record(tiny_bundle: Path, tmp_path: Path) -> None:
    files = files_after(tmp_path, RECORDS.format(str(tiny_bundle / "alignment_decoder.onnx")))
    if not files:
        pytest.skip("this build of ONNX Runtime records nothing")
    assert "onnxruntime.db" in files
