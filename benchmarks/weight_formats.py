"""Compare formats of weights in one linear layer on a CPU: NF4, and INT4 with groups of 32 and 128.

    python -m fusion_edge.benchmarks.weight_formats --json FILE

Figures are the median CPU time of one thread over rounds in which all formats take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np

from fusion_edge.benchmarks import cpu_kernels as kernels
from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.system.output_file import write_whole

NF4_GROUP = 64
INT4 = (WeightFormat("int4", 128), WeightFormat("int4", 32))


def nf4_linear(outputs: int, inputs: int, rows: int, layers: int) -> kernels.Run:
    """Return a run of ``layers`` linear layers with NF4 weights, in ONNX Runtime's kernel."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, inputs)).astype(np.float32)
    attributes: dict[str, Any] = {"N": outputs, "K": inputs, "block_size": NF4_GROUP, "quant_type": 1}
    runs = []
    for _ in range(layers):
        weights: dict[str, Any] = {
            "values": np.frombuffer(random.bytes(outputs * inputs // 2), np.uint8),
            "absmax": np.full(outputs * inputs // NF4_GROUP, 0.01, np.float32),
        }
        model = kernels.session("MatMulBnb4", {"x": kernels.FLOAT}, {"y": kernels.FLOAT}, attributes, None, weights)
        runs.append(kernels.bound(model, kernels.values({"x": x}), (rows, outputs)))
    return lambda: [run() for run in runs]


def measure(outputs: int, inputs: int, rows: int, layers: int) -> dict[str, float]:
    """Return the seconds of one layer by format and kernel; without our kernels, only ONNX Runtime's."""
    library = cpu_kernels.library() if cpu_kernels.is_supported() else None
    runs = {f"nf4:{NF4_GROUP}, ONNX Runtime": nf4_linear(outputs, inputs, rows, layers)}
    libraries = {"ONNX Runtime": None} | ({"fusion-edge": library} if library else {})
    for name, used in libraries.items():
        for weight_format in INT4:
            runs[f"{weight_format}, {name}"] = kernels.linear(weight_format, outputs, inputs, rows, layers, used)
    return {name: time / layers for name, time in zip(runs, kernels.seconds(list(runs.values())), strict=True)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.benchmarks.weight_formats", description=__doc__.splitlines()[0] if __doc__ else None
    )
    add = parser.add_argument
    add("--outputs", type=positive_integer, default=8192, help="output channels (default: %(default)s)")
    add("--inputs", type=positive_integer, default=3072, help="input channels (default: %(default)s)")
    add("--rows", type=positive_integer, default=kernels.PROMPT, help="rows of the GEMM (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    gemv = measure(options.outputs, options.inputs, 1, kernels.DECODE_LAYERS)
    gemm = measure(options.outputs, options.inputs, options.rows, 1)
    operations = 2 * options.rows * options.inputs * options.outputs
    sys.stdout.write(f"{'one layer, one core':28} {'GEMV':>10} {f'{options.rows} rows':>12}\n")
    for name in gemv:
        rate = f"{operations / gemm[name] / 1e9:8.1f} GOP/s"
        sys.stdout.write(f"{name:28} {gemv[name] * 1e3:7.2f} ms {gemm[name] * 1e3:9.1f} ms {rate}\n")
    if options.json:
        sizes = {"outputs": options.outputs, "inputs": options.inputs, "rows": options.rows}
        result = {"processor": machine_info(None).processor, **sizes, "gemv_seconds": gemv, "gemm_seconds": gemm}
        write_whole(options.json, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
