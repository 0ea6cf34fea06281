"""Bytes that attention of one decode step moves, with a KV cache of 16 and of 8 bits, on TensorRT-RTX.

    python -m fusion_edge.benchmarks.kv_cache_formats --device 12.0 --json FILE

Nothing runs: the compiler lists each layer with the types and sizes of its inputs and outputs, which are added up. Two
lists are corrected. TensorScatter writes one row in place, and its list has both caches, twice. A slice reads what it
returns, and its list has the whole cache.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_edge.benchmarks.acceptance.engine import BuildLog
from fusion_edge.benchmarks.kv_cache_graphs import CAPACITY, FIRST, FORMS, IN_PLACE, WINDOW, Heads
from fusion_edge.export.engines.builder import compute_capability
from fusion_edge.export.engines.graph_values import tensor_shape
from fusion_edge.export.engines.optimization_profiles import profile_shapes
from fusion_edge.runtime.backends.tensorrt.library import find_library
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file
from fusion_edge.runtime.system.output_file import write_whole

MODELS = {"3B": Heads(32, 32, 96), "8B": Heads(32, 8, 128)}
BYTES = {"Half": 2, "FP8": 1, "Int8": 1, "Float": 4, "Bool": 1, "Int64": 8, "Int32": 4}
LAYER = re.compile(r"^Name: (\S+), LayerType: \w+, (Inputs: .*)$", re.MULTILINE)
VALUE = re.compile(r"Dimensions: \[([\d,]*)\][^{}]*Datatype: (\w+)")


@dataclass(frozen=True)
class Result:
    """What became of one form of cache."""

    form: str
    megabytes: dict[str, float]
    """Of all layers of a decode step, by model; empty if it is refused."""
    refusal: str | None = None


def measured(form: str, capability: str) -> Result:
    """Compile a form for the heads of every model, and add up the bytes of its layers."""
    megabytes: dict[str, float] = {}
    for model, heads in MODELS.items():
        count = moved_bytes(form, heads, capability)
        if isinstance(count, str):
            return Result(form, {}, count)
        megabytes[model] = round(count / 1e6, 1)
    return Result(form, megabytes)


def moved_bytes(form: str, heads: Heads, capability: str) -> int | str:
    """Return the bytes that the layers of a form's last profile read and write, or why TensorRT-RTX refuses it."""
    found = layers(form, heads, capability)
    return found if isinstance(found, str) else sum(map(_bytes, found[-1].values())) - _not_moved(form, heads)


def layers(form: str, heads: Heads, capability: str) -> list[dict[str, str]] | str:
    """Return the layers of each profile of a form, as TensorRT-RTX lists them: its tensors by name, or its refusal."""
    library, profiles = find_library("tensorrt-rtx"), FORMS[form].profiles
    trt, log = library.module, BuildLog(library)
    logger = log.logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    onnx_parser, model = trt.OnnxParser(network, logger), FORMS[form].graph(heads)
    if not onnx_parser.parse(model.SerializeToString()):
        return _reason(str(onnx_parser.get_error(0)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(compute_capability(trt, capability), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for value in model.graph.input:
            if any(isinstance(size, str) for size in tensor_shape(value)):
                profile.set_shape(value.name, *profile_shapes(tensor_shape(value), ranges))
        config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        return _reason(log.first_error())
    listed = [one for text in log.texts for one in LAYER.findall(text)]
    numbers = range(max(len(profiles), 1))
    return [{name: tensors for name, tensors in listed if re.search(rf"_myl{i}_\d+$", name)} for i in numbers]


def _not_moved(form: str, heads: Heads) -> int:
    """Return the bytes that layers list and do not move."""
    if IN_PLACE not in form:
        return 0
    rows = 4 * CAPACITY + (2 * (CAPACITY - WINDOW) if form.endswith(FIRST) else 0)
    return rows * heads.row * BYTES["Half"]


def _bytes(tensors: str) -> int:
    return sum(math.prod(map(int, sizes.split(","))) * BYTES[kind] for sizes, kind in VALUE.findall(tensors) if sizes)


def _reason(text: str) -> str:
    """Return what TensorRT's message says in brackets."""
    found = re.search(r"API Usage Error \((.*?)(?:\. In | at |$)", text, re.DOTALL)
    return (found[1] if found else text)[:200]


def table(results: Sequence[Result]) -> str:
    """Return the results as Markdown."""
    rows = []
    for one in results:
        cells = [f"refused: {one.refusal}"] if one.refusal else [f"{one.megabytes[model]} MB" for model in MODELS]
        rows.append(f"| {one.form} | {' | '.join(cells)} |")
    return "\n".join([f"| cache | {' | '.join(MODELS)} |", "|---" * (1 + len(MODELS)) + "|", *rows]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="12.0", metavar="CAPABILITY", help="default: %(default)s")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to a file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    results = [measured(form, options.device) for form in FORMS]
    library = find_library("tensorrt-rtx")
    facts = {
        "library": f"{library.name} {library.version}",
        "compute_capability": options.device,
        "capacity": CAPACITY,
        "heads": {model: asdict(heads) for model, heads in MODELS.items()},
        "results": [asdict(one) for one in results],
    }
    if options.json is not None:
        path: Path = options.json
        write_whole(path, json.dumps(facts, indent=1) + "\n")
    sys.stdout.write(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
