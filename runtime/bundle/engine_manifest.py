"""``engines.json``: its schema. It describes the TensorRT engines of a bundle for one platform."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion_edge.runtime.bundle.files import FileEntry
from fusion_edge.runtime.bundle.graphs import LLM, sized

SCHEMA_VERSION = 1
ENGINES_MANIFEST = "engines.json"


@dataclass(frozen=True)
class EnginePlatform:
    """Library and GPU that an engine is built for."""

    library: str
    """Name of the Python module: ``tensorrt`` or ``tensorrt_rtx``."""
    version: str
    """Version of the library."""
    compute_capability: str
    """Compute capability of the GPU, such as ``8.7``."""

    @property
    def architecture(self) -> str:
        """Compute capability without the dot, as in ``sm_87``."""
        return self.compute_capability.replace(".", "")

    def __str__(self) -> str:
        return f"{self.library} {self.version} and compute capability {self.compute_capability}"


@dataclass(frozen=True)
class Engine:
    """One engine: a graph, or a partition of one."""

    file: FileEntry
    inputs: tuple[Mapping[str, Any], ...]
    """Name, dtype and shape of each input; a shape may have symbolic dimensions, such as ``text`` and ``text+729``."""
    outputs: tuple[Mapping[str, Any], ...]
    """As ``inputs``."""
    profiles: tuple[Mapping[str, tuple[int, ...]], ...]
    """Minimum, optimum and maximum by symbolic dimension.

    The LLM has one for short prompts if whole ones are longer, one for all prompts, then one for decode by window of
    the KV cache (``slots``), the smallest first.
    """
    float16_reason: str | None
    """Error of TensorRT for which INT8 was replaced by float16; None for the formats of the bundle."""

    @property
    def tensors(self) -> tuple[Mapping[str, Any], ...]:
        """Inputs and outputs."""
        return *self.inputs, *self.outputs

    @property
    def largest_shapes(self) -> dict[str, tuple[int, ...]]:
        """Largest shape of every tensor over all profiles, by name."""
        largest = {name: max(profile[name][2] for profile in self.profiles) for name in self.profiles[0]}
        return {tensor["name"]: sized(tensor["shape"], largest) for tensor in self.tensors}


@dataclass(frozen=True)
class LogitDifference:
    """How much the distributions of next tokens differ."""

    kl_divergence: float
    """Largest KL(CPU || engines), nats."""
    kl_limit: float
    """Largest one that rounding explains."""
    same_tokens: int
    """Distributions with the same likeliest token."""
    tokens: int
    """Distributions compared."""


@dataclass(frozen=True)
class StageDifference:
    """How much a stage of the engines differs from that of the CPU."""

    stage: str
    relative_error: float
    """Norm of the difference, relative to that of the CPU's output."""
    limit: float
    """Largest error that rounding explains."""
    logits: LogitDifference | None
    """None for a stage without logits."""


@dataclass(frozen=True)
class EngineCheck:
    """Comparison of the engines with the CPU."""

    skipped: str | None
    """Why nothing was compared, as a sentence; None if it was."""
    stages: tuple[StageDifference, ...]
    """In running order; empty if nothing was compared."""
    is_final: bool = False
    """Whether later builds do not try again: the CPU does not run the bundle, or not with this context."""
    reference: str | None = None
    """What computed the outputs of a reference file; None: this machine's CPU, or nothing was compared."""


@dataclass(frozen=True)
class Engines:
    """The content of ``engines.json``."""

    schema_version: int
    producer: str
    machine: EnginePlatform
    bundle: str
    """SHA-256 of ``bundle.json`` at build time."""
    max_context: int
    """Size of the KV cache in tokens."""
    workspace: int | None
    """Limit of scratch memory at build time in bytes; None for TensorRT's default."""
    parts: int
    """Requested number of partitions of the LLM."""
    max_block: int | None
    """Limit of a block for weights at build time in bytes; None for no limit."""
    timed_on: str | None
    """Model of the Jetson whose GPU timed the kernels; None for another machine."""
    operator: str
    """Implementation of the recursive alignment: ``plugin`` or ``function``."""
    engines: Mapping[str, tuple[Engine, ...]]
    """By graph name; the partitions of a graph in execution order."""
    check: EngineCheck

    @property
    def prompt_lengths(self) -> list[tuple[int, int]]:
        """Fewest and most tokens of the LLM's profiles for prompts, which come first."""
        ranges = (profile["positions"] for profile in self.engines[LLM][0].profiles)
        return [(least, most) for least, _, most in ranges if most > 1]

    @property
    def decode_windows(self) -> list[int]:
        """Tokens of the KV cache that each of the LLM's profiles for decode reads, ascending."""
        profiles = self.engines[LLM][0].profiles
        return [profile["slots"][2] for profile in profiles if profile["positions"][2] == 1]

    @property
    def float16_parts(self) -> dict[str, str]:
        """TensorRT's errors by file name of the engines in which float16 replaced INT8."""
        all_engines = (engine for parts in self.engines.values() for engine in parts)
        return {one.file.path: one.float16_reason for one in all_engines if one.float16_reason is not None}

    @property
    def size(self) -> int:
        """Bytes of all engine files: the memory of their weights on the device."""
        return sum(engine.file.size for parts in self.engines.values() for engine in parts)

    def to_text(self) -> str:
        """Return the text of ``engines.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"
