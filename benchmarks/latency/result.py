"""What ``fusion-bench`` measured: the schema of its JSON, which is documented here and nowhere else.

Times are seconds, sizes bytes, rates per second. ``null`` is what a machine does not tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.schema import from_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one thing."""

    count: int
    least: float
    median: float
    p90: float
    p99: float
    largest: float
    interval: tuple[float, ...]
    """95 % confidence interval of the median, from order statistics."""
    values: tuple[float, ...]
    """In the order in which they were measured."""

    @property
    def error(self) -> float:
        """Half the interval as a share of the median."""
        low, high = self.interval
        return (high - low) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class BundleFacts:
    """What was run."""

    source: str
    """Name of the checkpoint that the bundle was made from."""
    target: str
    precision: str
    size: int
    digest: str
    """SHA-256 of ``bundle.json``."""
    max_context: int


@dataclass(frozen=True)
class Machine:
    """Where it was run, and in what state that was at the start."""

    processor: str
    cores: int
    """That this process may use."""
    memory: int
    governor: str | None
    """CPU frequency governor."""
    load_average: float
    """Of the last minute."""
    gpu: str | None
    power_mode: str | None
    """As ``nvpmodel`` or NVML name it."""
    throttled: str | None
    """Why clocks were held down, if they were."""
    system: str
    versions: Mapping[str, str]
    """Of Python, the runtime libraries and the driver."""


@dataclass(frozen=True)
class Rates:
    """What a short probe of the processor reached."""

    bandwidth: float
    """Bytes a second that are read from memory by all threads."""
    multiplications: float
    """Multiply-adds a second of products of matrices as the backend computes them."""


@dataclass(frozen=True)
class Case:
    """One combination of options."""

    device: str
    threads: int
    query_length: int
    image_tokens: int
    prompt_tokens: int
    """Rows of the prompt: text, image tokens and latents."""
    new_tokens: int
    context: int
    """Positions in the cache when steps are timed."""


@dataclass(frozen=True)
class Limits:
    """What the case needs at the least, and how much of the machine it reached."""

    step_bytes: int
    step_seconds: float
    """They take so long at the probed bandwidth."""
    step_share: float
    """Of that limit reached by the median step: 1 is all of it."""
    prefill_multiplications: int
    prefill_seconds: float
    prefill_share: float


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    loaded: int
    """Resident in the process once the bundle is loaded."""
    steady: int
    """At the end."""
    peak: int
    """The most so far, from loading on."""
    device: int | None
    """More in use on the GPU than before loading; None without one."""
    over_time: tuple[tuple[float, ...], ...]
    """Pairs of seconds since the start and resident bytes."""


@dataclass(frozen=True)
class Energy:
    """Of a window of at least five seconds of steps."""

    source: str
    """``nvml``, or the sensor's name."""
    seconds: float
    joules: float
    joules_a_token: float


@dataclass(frozen=True)
class Measured:
    """One case."""

    case: Case
    load_seconds: float
    stages: Mapping[str, Summary]
    """``image decode``, ``preprocess``, ``vision of the image``, ``alignment``, ``vision of the question``,
    ``prefill``, ``step``, ``sampling``; those that the case has, in this order."""
    first_token: Summary
    """First question about an image, from the image on, to its first token."""
    further_first_token: Summary
    """Further question about the same image, to its first token."""
    tokens_per_second: float
    """One-token steps and sampling."""
    answer_seconds: Summary
    """First question, from the image on, to its last token."""
    jitter: float
    """99th percentile of a step over its median, less 1."""
    is_noisy: bool
    """Whether some median is not known to 3 %: the machine was too noisy for the time given."""
    limits: Limits | None
    """None on a GPU: the probe is of the processor."""
    memory: Memory
    energy: Energy | None


@dataclass(frozen=True)
class Result:
    """The whole file."""

    schema_version: int
    producer: str
    created: str
    """ISO 8601, UTC."""
    command: str
    bundle: BundleFacts
    machine: Machine
    rates: Rates
    measured: tuple[Measured, ...]

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_result(path: Path) -> Result:
    """Raises :class:`FusionError` for a file that is no result, or of another schema."""
    expected = "expected what fusion-bench --json wrote"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"Cannot read {path} ({error}); {expected}.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise FusionError(f"{path} has schema {version!r}, this fusion-edge reads {SCHEMA_VERSION}; {expected}.")
    try:
        return from_json(Result, data)
    except ValueError as error:
        raise FusionError(f"{path} is no result ({error}); {expected}.") from None
