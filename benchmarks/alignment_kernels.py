"""Check and time the recursive alignment's Triton kernels on a GPU.

    python -m fusion_edge.benchmarks.alignment_kernels --json FILE

Needs the extra ``kernels``. Errors are relative to float64. Times are of a CUDA graph over enough sets of inputs that
none stays in the L2 cache from one run to the next. A device copy of the same number of bytes is the roofline.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusion_edge.kernels.triton import recursive_alignment as kernels
from fusion_edge.kernels.triton.ahead_of_time import CONTEXT_ROWS
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS, ALIGNMENT_NORM_EPS
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.system.output_file import write_whole

INPUT_BYTES = 512_000_000  # of all sets of inputs: several times any L2 cache
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class KernelTiming:
    """Error and times of one kernel."""

    kernel: str
    largest_error: float
    """Relative to the largest magnitude of the result."""
    microseconds: float
    unfused_microseconds: float
    copy_microseconds: float
    bytes_moved: int

    @property
    def bandwidth_share(self) -> float:
        """Bandwidth as a share of a device copy's."""
        return self.copy_microseconds / self.microseconds


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--questions", type=positive_integer, default=1, help="number of questions (default: %(default)s)")
    add("--latents", type=positive_integer, default=144, help="latents per question (default: %(default)s)")
    add("--width", type=positive_integer, default=3072, help="hidden size (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp16", help="element type (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


@torch.inference_mode()
def _main(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise FusionError(
            "There is no GPU, or torch has no CUDA; run this on a machine with an NVIDIA GPU and a CUDA build of torch."
        )
    shape = options.questions, options.latents, options.width
    measured = [measure(name, shape, DTYPES[options.dtype]) for name in RUNS]
    header = ("kernel", "largest error", "time", "unfused", "speedup", "copy", "of copy bandwidth")
    rows: list[tuple[str, ...]] = [header]
    for one in measured:
        times = (f"{t:.2f} us" for t in (one.microseconds, one.unfused_microseconds))
        speedup = f"{one.unfused_microseconds / one.microseconds:.1f} x"
        copy = f"{one.copy_microseconds:.2f} us"
        rows.append((one.kernel, f"{one.largest_error:.1e}", *times, speedup, copy, f"{one.bandwidth_share:.0%}"))
    sys.stdout.write(format_table(rows))
    if options.json is not None:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        sizes = {"questions": shape[0], "latents": shape[1], "width": shape[2], "dtype": options.dtype}
        kernels_json = [asdict(one) | {"bandwidth_share": one.bandwidth_share} for one in measured]
        result = facts | sizes | {"kernels": kernels_json}
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    return 0


def measure(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> KernelTiming:
    """Measure a kernel with inputs of ``[questions, latents, width]``."""
    moved = kernels.bytes_moved(*shape, CONTEXT_ROWS, dtype.itemsize)[name]
    sets = [inputs(shape, dtype, "cuda", seed) for seed in range(max(2, INPUT_BYTES // moved))]
    fused, unfused = RUNS[name]
    halves = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in sets]
    return KernelTiming(
        kernel=name,
        largest_error=largest_error(name, sets[0]),
        microseconds=_timed([partial(fused, one) for one in sets]),
        unfused_microseconds=_timed([partial(unfused, one) for one in sets]),
        copy_microseconds=_timed([partial(pair[0].copy_, pair[1]) for pair in halves]),
        bytes_moved=moved,
    )


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Return random inputs of all kernels, by name."""
    questions, latents, width = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    rows = questions * latents
    return {
        "q": normal(*shape),
        "k": normal(1, latents, CONTEXT_ROWS, width),
        "v": normal(1, latents, CONTEXT_ROWS, width),
        "residual": normal(*shape),
        "weight": normal(width),
        "bias": normal(width),
        "x": normal(2 * rows, width),
        "positions": torch.randperm(2 * rows, generator=generator, device=device)[:rows].reshape(questions, latents),
    }


def largest_error(name: str, one: Inputs) -> float:
    """Return the largest error of a kernel against float64, relative to the largest magnitude."""
    exact = {key: value.double() if value.is_floating_point() else value for key, value in one.items()}
    copies = [{key: value.clone() for key, value in given.items()} for given in (one, exact)]
    actual, expected = RUNS[name][0](copies[0]), RUNS[name][1](copies[1])
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def _attention(one: Inputs) -> Tensor:
    return kernels.context_attention(one["q"], one["k"], one["v"], ALIGNMENT_HEADS)


def _attention_unfused(one: Inputs) -> Tensor:
    query, keys, values = (one[name].reshape(*one[name].shape[:-1], ALIGNMENT_HEADS, -1) for name in ("q", "k", "v"))
    weights = ((query.unsqueeze(2) * keys).sum(-1) * query.shape[-1] ** -0.5).softmax(2)
    attended: Tensor = (weights.unsqueeze(-1) * values).sum(2)
    return attended.flatten(-2)


def _layer_norm(one: Inputs) -> Tensor:
    return kernels.add_layer_norm(one["q"], one["residual"], one["weight"], one["bias"], ALIGNMENT_NORM_EPS)


def _layer_norm_unfused(one: Inputs) -> Tensor:
    total = one["q"] + one["residual"]
    return torch.nn.functional.layer_norm(total, total.shape[-1:], one["weight"], one["bias"], ALIGNMENT_NORM_EPS)


def _add_rows(one: Inputs) -> Tensor:
    kernels.add_rows(one["x"], one["positions"], one["q"], one["residual"])
    return one["x"]


def _add_rows_unfused(one: Inputs) -> Tensor:
    rows = (one["q"] + one["residual"]).flatten(0, 1)
    return one["x"].index_copy_(0, one["positions"].flatten(), rows)


RUNS: dict[str, tuple[Callable[[Inputs], Tensor], Callable[[Inputs], Tensor]]] = {
    "context_attention": (_attention, _attention_unfused),
    "add_layer_norm": (_layer_norm, _layer_norm_unfused),
    "add_rows": (_add_rows, _add_rows_unfused),
}
"""By kernel: the kernel, and unfused PyTorch operations in the type of the inputs."""


def _timed(runs: list[Callable[[], Tensor]]) -> float:
    """Return the median time of one run in microseconds, with all runs in one CUDA graph."""
    from triton.testing import do_bench_cudagraph

    def every() -> None:
        for run in runs:
            run()

    milliseconds: Any = do_bench_cudagraph(every, return_mode="median")  # a float, with this mode
    return float(1000 * milliseconds / len(runs))


if __name__ == "__main__":
    sys.exit(main())
