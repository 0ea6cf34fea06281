"""Compare our GPTQ with GPTQModel's, linear by linear, by the relative squared error of the outputs.

    pip install gptqmodel==7.7.0 '.[benchmarks]'     # in a separate environment
    python -m fusion_edge.benchmarks.accuracy.against_gptqmodel --work FOLDER_OF_SMOLLM2 --json FILE

Both get the same float weights and the same Hessian H of the float model's inputs, with the row weights of calibration
(export/calibration/observer.py). The error is ``tr(E H E^T) / tr(W H W^T)``. FOLDER_OF_SMOLLM2 is the ``--work``
folder of ``benchmarks.accuracy.smollm2``.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.export.calibration.activation_cache import Activations
from fusion_edge.export.calibration.blocks import blocks, prepare, without_outputs
from fusion_edge.export.calibration.observer import Observer
from fusion_edge.export.calibration.samples import read_samples
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.weights import CheckpointWeights, read_parameter
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.gptq import FactorizedHessian, gptq, output_error, round_to_nearest
from fusion_edge.runtime.bundle.manifest import TOKENIZER
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import integer_list, output_file, positive_integer
from fusion_edge.runtime.system.output_file import write_whole
from fusion_edge.runtime.system.resources import usable_processors

SETTINGS: dict[str, dict[str, Any]] = {
    "GPTQModel": {},
    "GPTQModel, desc_act, mse": {"desc_act": True, "act_group_aware": False, "mse": 2.4},
}
"""Settings of GPTQModel: its defaults, and activation order with scale search."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="work folder of benchmarks.accuracy.smollm2")
    add("--group-size", type=integer_list, default=(64, 128), metavar="N[,N...]", help="default: 64 and 128")
    add(
        "--every",
        type=positive_integer,
        default=6,
        metavar="N",
        help="LLM layers: 0, N, 2 N, ... (default: %(default)s)",
    )
    add("--samples", type=positive_integer, default=16, help="calibration samples (default: %(default)s)")
    add("--threads", type=positive_integer, default=usable_processors(), help="PyTorch threads (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


@torch.inference_mode()
def _main(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    linears = []
    for name, weights, hessian in observed(options.work, options.samples, options.every):
        for size in options.group_size:
            errors = compare(weights, hessian, size)
            linears.append({"name": name, "group_size": size, "errors": errors})
            sys.stderr.write(f"{name}:{size} {errors}\n")
    medians = {}
    for size in options.group_size:
        rows = [linear["errors"] for linear in linears if linear["group_size"] == size]
        medians[size] = {method: median(row[method] for row in rows) for method in rows[0]} | {
            f"ours over {method}": median(row["ours"] / row[method] for row in rows) for method in SETTINGS
        }
    result = {"settings": SETTINGS, "medians": medians, "linears": linears}
    if options.json is not None:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(medians, indent=1) + "\n")
    return 0


def observed(work: Path, samples: int, every: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield names, float weights ``[n,K]`` and Hessians ``[K,K]`` float64 of the linears of some LLM layers."""
    with Checkpoint(work / "checkpoint") as checkpoint:
        plan = plan_export(checkpoint, ExportOptions(image_tokens=1, vision="fp16"))
        source = CheckpointWeights(checkpoint, plan.parameters)

        @cache
        def weights(name: str) -> Tensor:
            return torch.from_numpy(np.array(read_parameter(source, name)))

        table = weights("llm.embed_tokens.weight")
        tokenizer = Tokenizer.from_str(plan.small_files[TOKENIZER].decode())
        found = read_samples(work / "samples.jsonl", samples, 1).calibrating
        prepared = [prepare(sample, tokenizer, plan.config, 1, 1, "cpu") for sample in found]
        activations: list[Activations] = [{} for _ in prepared]
        watched = {name: chosen for name, chosen in plan.quantized_formats.items() if name.startswith("llm.")}
        layers = [f"llm.layers.{i}" for i in range(0, plan.config.language.layers, every)]
        for block in blocks(plan.config)[:-1]:
            observer = Observer(plan.config, weights, lambda ids: table[ids], "cpu", watched)
            activations = [
                without_outputs(block.run(observer, sample, before))
                for sample, before in zip(prepared, activations, strict=True)
            ]
            for name, index in observer.hessian_index.items():
                if block.name in layers:
                    yield name, weights(f"{name}.weight"), observer.hessians[index]
            if block.name == layers[-1]:
                return


def compare(weights: Tensor, hessian: Tensor, group_size: int) -> dict[str, float]:
    """Return the relative squared error of the outputs by method."""
    weight_format = WeightFormat("int4", group_size)
    quantized = {
        "nearest": round_to_nearest(weights, weight_format).values,
        "ours": gptq(weights, FactorizedHessian(hessian), weight_format).values,
    }
    quantized |= {name: _gptqmodel(weights, hessian, group_size, **more) for name, more in SETTINGS.items()}
    errors = {}
    for name, values in quantized.items():
        error, energy = output_error(weights, values, hessian)
        errors[name] = error / energy
    return errors


def _gptqmodel(weights: Tensor, hessian: Tensor, group_size: int, **settings: Any) -> Tensor:
    """Quantize with GPTQModel on one sample per channel whose Hessian is the given one."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    values, vectors = torch.linalg.eigh(hessian)
    inputs = (vectors * values.clamp_min(0).sqrt()).T.float()
    linear = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weights.clone(), requires_grad=False)
    task = GPTQ(linear, QuantizeConfig(bits=4, group_size=group_size, sym=True, offload_to_disk=False, **settings))
    task.quantizer.configure(perchannel=True)
    task.add_batch(inputs[None], linear(inputs)[None])
    quantized: Tensor = task.quantize()[0]
    return quantized.float()


if __name__ == "__main__":
    sys.exit(main())
