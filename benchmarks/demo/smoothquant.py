"""Measure SmoothQuant on the demo model's vision linears with held-out pictures.

    python -m fusion_edge.benchmarks.demo.smoothquant --samples FOLDER

Prints the SQNR of each linear's outputs with 8-bit activations and exact weights, by alpha.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fusion_edge.benchmarks.demo import CHECKPOINT
from fusion_edge.export.calibration.activation_cache import Activations
from fusion_edge.export.calibration.blocks import BlockOperations, blocks, prepare
from fusion_edge.export.calibration.samples import read_samples
from fusion_edge.export.reference.eager_backend import EagerBackend, open_checkpoint
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.observer import fake_quantize
from fusion_edge.quant.smoothquant import ALPHAS, ChannelHistograms, find_producer, smoothing_factors
from fusion_edge.runtime import Fusion
from fusion_edge.runtime.bundle.quantization_report import sqnr
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.samples import Sample


class InputRecorder(BlockOperations):
    """Operations that keep the inputs of every linear."""

    inputs: dict[str, list[Tensor]]

    def linear(self, x: Tensor, name: str, bias: bool = False) -> Tensor:
        self.inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))
        return super().linear(x, name, bias)


def linear_inputs(fusion: Fusion, backend: EagerBackend, samples: Iterable[Sample]) -> dict[str, Tensor]:
    """Return the inputs ``[n,K]`` of all linears that SmoothQuant applies to, of all samples together."""
    ops = InputRecorder(
        fusion.config, backend.parameter, lambda ids: torch.from_numpy(backend.embed(ids.numpy())), "cpu"
    )
    ops.inputs = {}
    layers = [block for block in blocks(fusion.config) if block.name.startswith(("vision.embed", "vision.layers"))]
    for sample in samples:
        length, side = fusion.manifest.query_lengths[0], fusion.manifest.image_side
        prepared = prepare(sample, fusion.tokenizer, fusion.config, length, side, "cpu")
        activations: Activations = {}
        for block in layers:
            activations = block.run(ops, prepared, activations)
    formats = dict.fromkeys(ops.inputs, WeightFormat("w8a8"))
    return {name: torch.cat(parts) for name, parts in ops.inputs.items() if find_producer(name, formats) is not None}


def output_sqnr(weight: Tensor, samples: Tensor, others: Tensor) -> list[float]:
    """Return the SQNR of ``others @ weight.T``, calibrated on ``samples``: unsmoothed, then for each alpha."""
    histograms = ChannelHistograms(weight.shape[1], weight.device)
    histograms.observe(samples)
    found = []
    for alpha in (None, *ALPHAS):
        factors = torch.ones_like(weight[0]) if alpha is None else smoothing_factors(histograms.absmax, weight, alpha)
        quantization, _ = histograms.quantization(factors, (weight * factors).square().sum(0))
        noise, signal = (others - fake_quantize(others / factors, quantization) * factors) @ weight.T, others @ weight.T
        found.append(sqnr(*(float(part.double().square().sum()) for part in (noise, signal))))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="folder of a demo model (default: the committed one)"
    )
    parser.add_argument(
        "--samples", type=Path, required=True, help="folder written by fusion_edge.benchmarks.demo.samples"
    )
    parser.add_argument(
        "--calibrating", type=positive_integer, default=128, help="calibration samples (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out", type=positive_integer, default=100, help="held-out samples (default: %(default)s)"
    )
    return run_command(_main, parser.parse_args(arguments))


@torch.inference_mode()
def _main(options: argparse.Namespace) -> int:
    samples = read_samples(options.samples, options.calibrating, options.held_out)
    rows: list[tuple[str, ...]] = [("linear", "unsmoothed", *map(str, ALPHAS))]
    with open_checkpoint(options.checkpoint) as fusion:
        backend = fusion.backend
        assert isinstance(backend, EagerBackend)
        seen, others = (linear_inputs(fusion, backend, part) for part in (samples.calibrating, samples.held_out))
        for name, inputs in seen.items():
            found = output_sqnr(backend.parameter(f"{name}.weight"), inputs, others[name])
            rows.append((name, *(f"{value:.1f} dB" for value in found)))
    sys.stdout.write(format_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
