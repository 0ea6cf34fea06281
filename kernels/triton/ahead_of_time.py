"""Compile the recursive alignment's kernels to PTX for every GPU that engines are built for. Needs no GPU.

    python -m fusion_edge.kernels.triton.ahead_of_time --output FOLDER

An engine holds the PTX, so the device needs neither Triton nor Python to run it. ``fusion-build --kernels FOLDER`` also
builds engines without Triton. Registers, shared memory and spills are as reported by NVIDIA's assembler (the one in
Triton's wheel).
"""

# Triton's own types do not describe how kernels are launched.
# pyright: reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_edge.kernels.triton.kernel_folder import CompiledKernel, KernelEntry, write_index
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS, ALIGNMENT_NORM_EPS
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.system.output_file import write_whole

JETPACK_6, JETPACK_7 = (8, 5), (9, 0)
ARCHITECTURES = {
    "80": JETPACK_6,
    "86": JETPACK_6,
    "87": JETPACK_6,
    "89": JETPACK_6,
    "90": JETPACK_6,
    "110": JETPACK_7,
    "120": JETPACK_7,
}
"""PTX ISA version by compute capability.

JetPack 6.2's driver (CUDA 12.6) reads up to 8.5, JetPack 7's (CUDA 13) up to 9.0. Compute capability 11.0 (Thor) needs
9.0, and 12.0 needs 8.7.
"""
CONTEXT_ROWS = 9  # a window of 3 x 3, as in every released model
HIDDEN_SIZES = (3072, 4096)  # 3B, 8B
WARP_SIZE = 32


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel for one GPU and its resources."""

    entry: KernelEntry
    registers: int
    """Registers per thread."""
    spilled_bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write")
    add(
        "--architecture",
        action="append",
        choices=ARCHITECTURES,
        help="compute capability without the dot, as 87; repeatable (default: all)",
    )
    add("--width", type=positive_integer, action="append", help="hidden size, repeatable (default: 3072 and 4096)")
    add("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="element type (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    try:
        import triton  # noqa: F401
    except ImportError:
        raise FusionError("Triton is not installed; run pip install '.[kernels]' in a clone of fusion-edge.") from None
    widths = options.width or HIDDEN_SIZES
    for width in widths:
        if width % ALIGNMENT_HEADS:
            heads = ALIGNMENT_HEADS
            raise UsageError(f"--width {width} cannot be split into {heads} heads; use a multiple of {heads}.")
    options.output.mkdir(parents=True, exist_ok=True)
    built = [
        build(options.output, kernel, architecture, width, options.dtype)
        for architecture in options.architecture or ARCHITECTURES
        for width in widths
        for kernel in KERNELS
    ]
    write_index(options.output, [one.entry for one in built])
    if options.json:
        sys.stdout.write(json.dumps([asdict(one) for one in built], indent=1) + "\n")
        return 0
    header = ("kernel", "sm", "width", "registers", "shared", "spilled")
    rows = [
        (
            one.entry.kernel,
            one.entry.architecture,
            *map(str, (one.entry.width, one.registers, one.entry.shared_bytes, one.spilled_bytes)),
        )
        for one in built
    ]
    sys.stdout.write(format_table([header, *rows]))
    return 0


@dataclass(frozen=True)
class Kernel:
    """Parameters of a kernel of recursive_alignment.py: inputs, 32-bit integers, the output, constants."""

    inputs: tuple[str, ...]
    integers: tuple[str, ...]
    constants: Callable[[int], dict[str, float]]
    """Return the constants for a hidden size."""

    def types(self, dtype: str) -> dict[str, str]:
        """Return Triton's type of each parameter but the constants, in order."""
        values = dict.fromkeys(self.inputs, f"*{dtype}") | dict.fromkeys(self.integers, "i32") | {"output": f"*{dtype}"}
        return {name: "*i64" if name == "positions" else kind for name, kind in values.items()}


def _attention_constants(width: int) -> dict[str, float]:
    from triton import next_power_of_2

    dim = width // ALIGNMENT_HEADS
    return {
        "CONTEXT": CONTEXT_ROWS,
        "DIM": dim,
        "WINDOW": next_power_of_2(CONTEXT_ROWS),
        "COLUMNS": next_power_of_2(dim),
    }


def _norm_constants(width: int) -> dict[str, float]:
    return {"EPS": ALIGNMENT_NORM_EPS, **_row_constants(width)}


def _row_constants(width: int) -> dict[str, float]:
    from triton import next_power_of_2

    return {"WIDTH": width, "COLUMNS": next_power_of_2(width)}


KERNELS = {
    "context_attention": Kernel(("q", "k", "v"), ("rows", "latents"), _attention_constants),
    "add_layer_norm": Kernel(("x", "residual", "weight", "bias"), ("rows",), _norm_constants),
    "add_rows": Kernel(("x", "positions", "latents", "update"), ("rows", "length"), _row_constants),
}


def compile_kernel(kernel: str, architecture: str, width: int, dtype: str) -> CompiledKernel:
    """Compile a kernel of :data:`KERNELS` for one of :data:`ARCHITECTURES`; ``dtype`` is fp16, bf16 or fp32.

    Raises :class:`FusionError` if the kernel needs scratch memory, which only Triton's launcher allocates.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusion_edge.kernels.triton import recursive_alignment

    types, values = KERNELS[kernel].types(dtype), KERNELS[kernel].constants(width)
    function: Any = getattr(recursive_alignment, f"{kernel}_kernel")
    signature = types | dict.fromkeys(values, "constexpr")
    # Tensors are aligned to 16 bytes, so a thread may load 16 bytes at once.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
    constants = {(function.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(function, signature, constants, aligned)
    major, minor = ARCHITECTURES[architecture]
    target = GPUTarget("cuda", int(architecture), WARP_SIZE)
    # Threads that hold copies of a sum store it at once, so they must agree. Fused multiply-adds round a neighbor's
    # product, but not their own: they agree only where products are exact, as those of 16 bits in float32 are.
    options = {"ptx_version": 10 * major + minor, "enable_fp_fusion": dtype != "fp32"}
    binary = triton.compile(source, target=target, options=options)
    ptx = strip_scratch_parameters(strip_debug_info(binary.asm["ptx"]), len(types))
    return CompiledKernel(binary.metadata.name, ptx, binary.metadata.num_warps * WARP_SIZE, binary.metadata.shared)


def strip_debug_info(ptx: str) -> str:
    """Return the PTX without line numbers and source paths, which engines do not need."""
    code = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{.*?\}", "", ptx, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^\s*\.(file|loc)\b.*\n", "", code, flags=re.MULTILINE)


def strip_scratch_parameters(ptx: str, parameters: int) -> str:
    """Return the PTX with only the first ``parameters`` parameters of its entry point.

    Triton appends two pointers: scratch memory and profiler memory. TensorRT passes a kernel's own parameters only.
    Raises :class:`FusionError` if the kernel reads the appended ones.
    """
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    assert entry is not None
    declared = entry[1].split(",")
    for scratch in declared[parameters:]:
        name = scratch.split()[-1]
        if re.search(rf"\b{name}\b", ptx[entry.end() :]):
            raise FusionError(
                f"A kernel reads Triton's scratch memory ({name}), which only Triton's launcher allocates."
            )
    return ptx[: entry.start(1)] + ",".join(declared[:parameters]).rstrip() + "\n" + ptx[entry.end(1) :]


def build(folder: Path, kernel: str, architecture: str, width: int, dtype: str) -> BuiltKernel:
    """Compile one kernel and write its PTX to ``folder``. Raises :class:`FusionError` if it does not assemble."""
    compiled = compile_kernel(kernel, architecture, width, dtype)
    file, content = f"{kernel}_{width}_{dtype}_sm{architecture}.ptx", compiled.ptx.encode("ascii")
    write_whole(folder / file, content)
    digest = hashlib.sha256(content).hexdigest()
    entry = KernelEntry(
        kernel, architecture, width, dtype, file, digest, compiled.name, compiled.threads, compiled.shared_bytes
    )
    return BuiltKernel(entry, *assemble(compiled.ptx, architecture))


def assemble(ptx: str, architecture: str) -> tuple[int, int]:
    """Return registers and spilled bytes per thread, as NVIDIA's assembler reports them."""
    from triton import backends

    tools = Path(backends.__path__[0]) / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if int(architecture) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="ascii")
        target = re.search(r"\.target (sm_\w+)", ptx)
        assert target is not None
        command = [str(tool), "-v", f"--gpu-name={target[1]}", str(file), "-o", str(file.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    registers, spills = re.search(r"Used (\d+) registers", output), re.findall(r"(\d+) bytes spill", output)
    if done.returncode or registers is None:
        raise FusionError(f"{tool.name} fails to assemble a kernel for sm_{architecture}: {output.strip()[:500]}")
    return int(registers[1]), sum(map(int, spills))


if __name__ == "__main__":
    sys.exit(main())
