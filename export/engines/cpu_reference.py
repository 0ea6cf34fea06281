"""The CPU's outputs of a bundle in a file.

A workstation writes it. A device without memory or ONNX Runtime for the bundle reads it, and compares its engines.
"""

from __future__ import annotations

import io
import platform
from pathlib import Path

import numpy as np

from fusion_edge.export.engines.engine_check import no_cpu_outputs_reason, run_on_cpu
from fusion_edge.export.engines.stage_outputs import RUN_STEPS, Reference, StageOutputs, question_digest
from fusion_edge.runtime.backends.onnxruntime.library import find_onnxruntime
from fusion_edge.runtime.bundle.engines import bundle_digest
from fusion_edge.runtime.bundle.reader import Bundle, verify
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.output_file import check_output_file, write_whole
from fusion_edge.runtime.system.progress import Progress

BUNDLE, QUESTION, MADE_BY = "bundle", "question", "made_by"
"""Names of the texts beside the outputs: digests of bundle and question, and what computed the outputs."""


def write_reference(bundle: Bundle, path: Path, replaces: bool) -> Reference:
    """Run the fixed question on ONNX Runtime's CPU provider, write the outputs to a file, and return them.

    Raises :class:`FusionError` if the file exists and ``replaces`` is false, if engines of the bundle cannot be
    compared with the CPU, or if the CPU cannot run it.
    """
    check_output_file(path)
    if path.exists() and not replaces:
        raise FusionError(f"{path} exists; choose another file or pass --force to replace it.")
    if (reason := no_cpu_outputs_reason(bundle)) is not None:
        raise FusionError(f"A reference cannot be written: {reason}")
    with Progress("Verifying", bundle.manifest.size) as progress:
        verify(bundle, progress.advance)
    with Progress("Running on the CPU", RUN_STEPS, unit=None) as progress:
        outputs = run_on_cpu(bundle, bundle.manifest.max_context, progress.advance)
    made_by = f"ONNX Runtime {find_onnxruntime().__version__} on {platform.machine()}"
    arrays, content = outputs.arrays(), io.BytesIO()
    arrays.update({BUNDLE: bundle_digest(bundle), QUESTION: question_digest(), MADE_BY: made_by})
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())
    return Reference(outputs, made_by)


def read_reference(bundle: Bundle, path: Path) -> Reference:
    """Read what :func:`write_reference` wrote for a bundle, without ONNX Runtime.

    Raises :class:`FusionError` for another file, a damaged one, or the outputs of another bundle or question;
    :class:`OSError` if the file cannot be opened.
    """
    remedy = f"write it again on a workstation: fusion-build {bundle.folder} --write-reference {path} --force"
    with path.open("rb") as file:
        try:
            arrays = dict(np.load(file))  # NumPy runs no code of the file; zip files have checksums
            texts = {name: str(arrays.pop(name)) for name in (BUNDLE, QUESTION, MADE_BY)}
            outputs = StageOutputs.of_arrays(arrays)
        except Exception:  # zipfile and NumPy raise many types for damaged data
            raise FusionError(f"{path} is damaged, or not a file of --write-reference; {remedy}") from None
    if texts[BUNDLE] != bundle_digest(bundle):
        raise FusionError(f"{path} has the outputs of another bundle than {bundle.folder}; {remedy}")
    if texts[QUESTION] != question_digest():
        versions = "write it again with this machine's versions of fusion-edge, NumPy and Pillow"
        raise FusionError(f"{path} has the outputs of another question, which other versions make; {versions}.")
    return Reference(outputs, texts[MADE_BY])
