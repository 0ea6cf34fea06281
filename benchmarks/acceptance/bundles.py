"""Bundles of the acceptance: export, build, and what is missing for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import fusion_edge.benchmarks
from fusion_edge.benchmarks.acceptance.device import expect_cuda
from fusion_edge.benchmarks.acceptance.engine import library_for
from fusion_edge.benchmarks.acceptance.steps import SkippedStep
from fusion_edge.export import cli
from fusion_edge.export.engines.builder import BuildOptions, plugins_unsupported_reason
from fusion_edge.export.engines.engine_folder import write_engines
from fusion_edge.export.engines.jetsons import ContiguousMemoryError, enlarge_cma, jetson_limits
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.bundle.engine_manifest import EnginePlatform, Engines
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.jetson import contiguous_memory, this_jetson

DEMO = Path(fusion_edge.benchmarks.__path__[0]) / "demo"
"""Checkpoint and picture of the demo model. A wheel does not hold them."""
ONLY_IN_A_CLONE = "The checkpoint is not part of a wheel; run the command in a clone of fusion-edge"
FUNCTIONS = "Standard operators are wanted: the recursive alignment runs as functions"
"""Reason against plugins."""


def export(checkpoint: Path, bundle: Path, options: Sequence[str]) -> None:
    """Export a checkpoint for TensorRT. Raises :class:`FusionError`."""
    arguments = [str(checkpoint), "-o", str(bundle), "--int4", "--target", "tensorrt", *options]
    if code := cli.main(arguments):
        raise FusionError(f"fusion-export {' '.join(arguments)} ended with exit code {code}; the log has its error.")


def link(bundle: Path, folder: Path) -> None:
    """Make a bundle of the same files in a new folder, so that engines for it do not replace those of the bundle.

    They are hard links, because no file of a bundle may lead outside of its folder; copies on another file system.
    Raises :class:`FusionError` for what is no bundle.
    """
    entries = open_bundle(bundle).manifest.files
    for name in (MANIFEST, *(entry.path for entry in entries)):
        source, target = os.path.realpath(bundle / name), folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)


@dataclass(frozen=True)
class Gpu:
    """This machine's GPU, and the TensorRT that builds for it."""

    cuda: Cuda
    library: Library

    @property
    def platform(self) -> EnginePlatform:
        """Return what an engine depends on."""
        return EnginePlatform(self.library.name, self.library.version, self.cuda.compute_capability())

    @property
    def device(self) -> str:
        """Return the name of the device that runs the engines."""
        return self.library.name.replace("_", "-")


def expect_gpu() -> Gpu:
    """Return GPU and TensorRT. Raises :class:`SkippedStep` without either, or if they do not fit."""
    cuda = expect_cuda()
    try:
        return Gpu(cuda, library_for(cuda))
    except DeviceError as error:
        raise SkippedStep(str(error)) from None


def build(bundle: Path, gpu: Gpu, options: BuildOptions, *, plugins: bool, part: str) -> Engines:
    """Build the engines of a bundle with the limits of ``fusion-build`` on this device, and replace earlier ones.

    Raises :class:`SkippedStep` if plugins are wanted and unsupported, or if a small Jetson has no block of memory for
    the weights of an engine: then it names the ``part`` of the acceptance to run again. Raises the errors of
    :func:`write_engines`, too.
    """
    opened = open_bundle(bundle)
    limits = jetson_limits(None, this_jetson())
    options = replace(options, workspace=limits.workspace, max_block=limits.max_block, compares=False)
    reason = plugins_unsupported_reason(gpu.library, gpu.platform, options)
    if plugins and reason is not None:
        raise SkippedStep(f"{reason}.")
    context = opened.manifest.max_context
    try:
        return write_engines(opened, gpu.library, gpu.platform, context, options, None if plugins else FUNCTIONS)
    except ContiguousMemoryError as error:
        raise SkippedStep(
            f"{error.facts} {enlarge_cma(contiguous_memory())}After a reboot, run this part before anything else: add "
            f"--only {part} --output fusion-acceptance-{part} to the command."
        ) from None
