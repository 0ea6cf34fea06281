"""Small PTX kernels of a few instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.kernels.ptx.arithmetic import element, register_bits
from fusion_edge.kernels.ptx.machine import run

Array = npt.NDArray[Any]
THREADS = 32
PREFIXES = {1: "%p", 16: "%h", 32: "%r", 64: "%d"}


def kernel(body: str, *parameters: int, threads: int = THREADS) -> str:
    """Return a kernel with parameters ``p0``, ``p1``, ... of some bits.

    Registers are %p, %h (16 bits), %r (32) and %d (64), from 0 to 9.
    """
    declared = ", ".join(f".param .u{bits} p{index}" for index, bits in enumerate(parameters))
    return f"""
.version 8.5
.target sm_87
.address_size 64
.extern .shared .align 16 .b8 shared[];
.visible .entry test({declared})
.reqntid {threads}
{{
    .reg .pred %p<10>;
    .reg .b16 %h<10>;
    .reg .b32 %r<10>;
    .reg .b64 %d<10>;
{body}
    ret;
}}
"""


def compute(opcode: str, sources: Sequence[str], result: str, values: Sequence[Array]) -> Array:
    """Return what an instruction computes: thread i from element i of each array, or two elements of a packed type."""
    registers = [f"{PREFIXES[register_bits(kind)]}{index}" for index, kind in enumerate((*sources, result))]
    lines = ["mov.u32 %r9, %tid.x;"]
    for index, kind in enumerate((*sources, result)):
        bits = max(register_bits(kind), 16)  # a predicate is 0 or 1 in 16 bits of memory
        lines += [f"ld.param.b64 %d9, [p{index}];", f"mad.wide.u32 %d{index + 4}, %r9, {bits // 8}, %d9;"]
    for index, kind in enumerate(sources):
        load = f"ld.global.b{max(register_bits(kind), 16)}"
        lines.append(f"{load} {f'%h{index}' if kind == 'pred' else registers[index]}, [%d{index + 4}];")
        if kind == "pred":
            lines.append(f"setp.ne.b16 {registers[index]}, %h{index}, 0;")
    lines.append(f"{opcode} {registers[-1]}, {', '.join(registers[:-1])};")
    if result == "pred":
        lines.append(f"selp.b16 %h9, 1, 0, {registers[-1]};")
    stored = "%h9" if result == "pred" else registers[-1]
    lines.append(f"st.global.b{max(register_bits(result), 16)} [%d{len(sources) + 4}], {stored};")
    buffers = [array.astype(np.uint16) if array.dtype == bool else array.copy() for array in values]
    output = np.zeros(THREADS * (2 if result.endswith("x2") else 1), np.uint16 if result == "pred" else element(result))
    ptx = kernel("\n".join(lines), *[64] * (len(sources) + 1))
    run(ptx, grid=1, block=THREADS, arguments=[*buffers, output])
    return output.astype(bool) if result == "pred" else output
