"""Plugin layers built with the fake TensorRT. As a script: print them with their real PTX as JSON.

Triton reads TRITON_INTERPRET when kernels are defined, so a process either compiles them or interprets them.
"""

from __future__ import annotations

import json
import sys

from fakes import fake_tensorrt_plugin as fake
from fakes.fake_tensorrt_plugin import DataType

from fusion_edge.kernels.tensorrt_plugins import PLUGINS, Plugin, register
from fusion_edge.kernels.triton.ahead_of_time import CONTEXT_ROWS

WIDTH = 64
FLOATS = {DataType.FLOAT: "fp32", DataType.HALF: "fp16", DataType.BF16: "bf16"}
"""Triton's type names by TensorRT type."""
ROWS = ("R", "q", WIDTH)
CONTEXT = (1, "q", CONTEXT_ROWS, WIDTH)
SHAPES: dict[str, list[tuple[int | str, ...]]] = {
    "ContextAttention": [ROWS, CONTEXT, CONTEXT],
    "AddLayerNorm": [ROWS, ROWS, (WIDTH,), (WIDTH,)],
    "AddRows": [(1, "L", WIDTH), ("R", "q"), ROWS, ROWS],
}


def types(plugin: Plugin, dtype: DataType) -> tuple[DataType, ...]:
    """Return the types of the inputs and the output."""
    return tuple(DataType.INT64 if name == "positions" else dtype for name in (*plugin.inputs, "output"))


def layer(plugin: Plugin, dtype: DataType) -> fake.Layer:
    return fake.engine(plugin.id, SHAPES[plugin.operator], types(plugin, dtype))


def main() -> None:
    """Print name, PTX, threads per block and number of integers of every layer, by plugin and type."""
    register(fake, "87")
    built = {}
    for plugin in PLUGINS:
        for dtype, name in FLOATS.items():
            one = layer(plugin, dtype)
            threads = one.launch["block_x"].at({})
            built[f"{plugin.operator} {name}"] = [one.name, one.ptx, threads, len(one.extra)]
    sys.stdout.write(json.dumps(built))


if __name__ == "__main__":
    main()
