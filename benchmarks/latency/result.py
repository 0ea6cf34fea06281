"""What ``fusion-bench`` measured: the schema of its JSON, which is documented here and nowhere else.

Times are seconds, sizes bytes, rates per second. ``null`` is what a machine does not tell. docs/fusion-bench.md says
how to read the figures. A change of any name or meaning here raises :data:`SCHEMA_VERSION`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.errors import FusionError

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one thing: one or several in each round."""

    count: int
    least: float
    median: float
    p90: float
    p99: float
    largest: float
    interval: tuple[float, ...] | None
    """95 % confidence interval of the median, from order statistics; it allows for what the values of a round have in
    common. None if there were fewer than seven rounds: six miss the median with 3 %."""
    values: tuple[float, ...]
    """In the order in which they were measured."""

    @property
    def error(self) -> float | None:
        """Half the interval as a share of the median."""
        if self.interval is None:
            return None
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
    """Why clocks were held down while it ran, if they were."""
    clocks: Mapping[str, tuple[float, ...]]
    """Lowest, median and highest rate while it ran, in Hz: ``processor`` (its fastest core at each moment), ``gpu``,
    ``gpu memory``, and what a Jetson's kernel lists as ``devfreq``. Those that the machine tells."""
    system: str
    versions: Mapping[str, str]
    """Of Python, the runtime libraries and the driver."""


@dataclass(frozen=True)
class Rates:
    """What a short probe of a device reached (probes.py): for a CPU with as many threads as the case with the most."""

    bandwidth: float | None
    """Bytes a second: of a CPU those that all threads read from memory beside the cases' steps, of a GPU those read and
    written by a copy."""
    multiplications: float | None
    """Multiply-adds a second of products of matrices: of a CPU the fastest of INT4 and INT8, of a GPU float16."""
    not_measured: Mapping[str, str]
    """Why a rate is None, by its name."""


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
class Limit:
    """What a stage needs at the least, and how near to the machine's limit it came."""

    needed: int
    """Bytes that a step reads, or multiply-adds of a prefill."""
    seconds: float | None
    """They take so long at the probed rate; None where that was not measured.

    The bandwidth of a CPU is the median of what was read beside this case's own steps.
    """
    share: float | None
    """Of that rate, what the stage's median reached: 1 is all of it."""


@dataclass(frozen=True)
class Limits:
    """Of the stages whose limit is known."""

    step: Limit
    """By the bandwidth."""
    prefill: Limit
    """By the rate of products."""


@dataclass(frozen=True)
class Memory:
    """Bytes: resident in the process, or on the GPU those that are in use more than before loading.

    ``loaded`` and ``load_peak`` are of loading the bundle, the same in all cases on that device. The rest is of the
    case alone; what an allocator kept from an earlier case counts.
    """

    loaded: int
    """Once the bundle was loaded."""
    load_peak: int
    """The most while it was."""
    steady: int
    """At the end of the case."""
    peak: int
    """The most in the case, its warm-up included: the largest of ten samples a second, and for a process the kernel's
    own count where that can begin anew."""
    over_time: tuple[tuple[float, ...], ...]
    """Pairs of seconds since the case began and bytes."""


@dataclass(frozen=True)
class Energy:
    """Of a window of at least five seconds of steps, from the case's context on; no prefill is in it."""

    source: str
    """``nvml``, or the names of the sensors that were added up."""
    seconds: float
    joules: float
    joules_a_token: float


@dataclass(frozen=True)
class Measured:
    """One case."""

    case: Case
    remark: str | None
    """Why the device is slower than it may be, such as kernels that are missing (runtime/backends/devices.py)."""
    load_seconds: float
    """Of one load, from the disk or from what the system's memory still had of the files."""
    stages: Mapping[str, Summary]
    """``image decode``, ``preprocess``, ``vision of the image``, ``alignment``, ``vision of the question``,
    ``prefill``, ``step``, ``sampling``; those that the case has, in this order."""
    first_token: Summary
    """First question about an image, from the image's file on, to its first token."""
    further_first_token: Summary
    """Further question about the same image, from the decoded image on, to its first token."""
    tokens_per_second: float
    """1 over the medians of a step and of sampling."""
    answer_seconds: Summary
    """First question, from the image's file on, to its last token: the prefill's, and ``new_tokens`` steps more."""
    jitter: float
    """99th percentile of a step over its median, less 1."""
    is_noisy: bool
    """Whether the median of a step, of a first token or of a further question is not known to 3 %: the machine was too
    noisy for the time given."""
    limits: Limits
    memory: Memory
    """Of the process."""
    device_memory: Memory | None
    """Of the GPU; None without one. On a Jetson it is the memory of the whole machine, the process included."""
    energy: Energy | None
    """None where the machine tells none, or the context has no room for five seconds of steps."""


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
    rates: Mapping[str, Rates]
    """By device."""
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
