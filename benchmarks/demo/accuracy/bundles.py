"""Export the bundles that are measured."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from contextlib import redirect_stdout

from fusion_edge.benchmarks.demo.accuracy.tables import BUNDLES
from fusion_edge.benchmarks.demo.accuracy.work import Work
from fusion_edge.export import cli
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.runtime.bundle.manifest import QUANTIZATION
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.errors import FusionError

HELD_OUT = 8
"""Number of samples that do not calibrate: a bundle's report compares it with the checkpoint on them."""


def export(name: str, work: Work) -> None:
    """Export one of :data:`BUNDLES`. One that is complete stays."""
    bundle, folder = BUNDLES[name], work.bundle(name)
    if folder.exists():
        return
    options = [str(work.checkpoint), "-o", str(folder), *bundle.options]
    if bundle.is_calibrated:
        options += ["--calibrate", str(work.samples), "--samples", str(work.calibrating), "--held-out", str(HELD_OUT)]
    if bundle.same_size_as is not None:
        options += _random_rules(bundle.same_size_as, bundle.seed, work)
    with redirect_stdout(io.StringIO()):
        code = cli.main(options)  # prints a report that the bundle holds, too
    if code != 0:
        raise FusionError(f"Export of {folder} failed; see its error above.")


def _random_rules(name: str, seed: int, work: Work) -> list[str]:
    """Return rules that give 8 bits to random linears, of about as many weights as in the bundle ``name``."""
    report = QuantizationReport.read(work.bundle(name) / QUANTIZATION)
    chosen = report.mixed_precision
    assert chosen is not None
    with Checkpoint(work.checkpoint) as checkpoint:
        linears = plan_export(checkpoint, ExportOptions()).linears
    candidates = [sensitivity.name for sensitivity in chosen.sensitivities]
    weights = {name: linears[name].outputs * linears[name].inputs for name in candidates}
    formats = {linear.name: linear.format for linear in report.linears}
    promoted = random_subset(weights, sum(weights[name] for name in chosen.raised), seed)
    return [f"--rule={name}={formats[chosen.raised[0]]}" for name in promoted]


def random_subset(sizes: Mapping[str, int], total: int, seed: int) -> list[str]:
    """Return random names whose sizes add up to ``total`` at most, and to which none of the others can be added."""
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    chosen = []
    for name in order:
        if sizes[name] <= total:
            total -= sizes[name]
            chosen.append(name)
    return chosen
