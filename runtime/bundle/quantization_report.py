"""What quantizing did: ``quantization.json`` of a bundle, and a table for people, worst weights first.

Seconds are in the table and what ``--json`` prints alone: a bundle has the same bytes on every run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.formatting import format_table

WORST = 12  # rows of the table
TAKEN_OVER = "checkpoint"  # the method of weights that were quantized before


@dataclass(frozen=True)
class LinearReport:
    """How one weight was quantized. SQNR is signal over quantization noise in dB, more is better."""

    name: str
    format: str
    method: str
    """``gptq``, ``rtn`` (rounded to nearest), ``checkpoint`` (taken over as a quantized checkpoint has it)."""
    weight_sqnr: float | None
    """None where the weight before it was quantized is not known."""
    output_sqnr: float | None
    """Of its outputs on the calibration samples, rows counted as for fitting; None without samples."""
    equalisation: float | None
    """Exponent of the factors that its input channels were divided by (SmoothQuant's alpha); None if by none."""
    seconds: float


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to give one linear 4 bits and nothing else."""

    name: str
    kl_divergence: float
    """Mean KL(float || float but for this linear) of a token, nats."""
    output_sqnr: float
    """Of its outputs, dB."""


@dataclass(frozen=True)
class BitAllocation:
    """Which linears got 8 bits, and why."""

    bits: float
    """Mean bits of a weight that could have had 4, scales included."""
    samples: int
    raised: tuple[str, ...]
    """The linears with 8 bits."""
    sensitivities: tuple[Sensitivity, ...]
    """Of all linears that could have had 4."""

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        left = sum(s.kl_divergence for s in self.sensitivities if s.name not in self.raised)
        total = sum(s.kl_divergence for s in self.sensitivities)
        share = f"{1 - left / total:.0%}" if total else "none"
        return [
            ("Mixed precision", f"{self.bits:.2f} bits a weight, {len(self.raised)} of {len(self.sensitivities)} in 8"),
            ("Sensitivity removed", f"{share} of the KL divergences that 4 bits cost one by one"),
        ]


@dataclass(frozen=True)
class EndToEnd:
    """The quantized model against the float one on samples that no weight was fitted to."""

    samples: int
    tokens: int
    cosine: Mapping[str, float]
    """By graph: mean cosine of its outputs to the float model's."""
    top1_agreement: float
    """Share of tokens that both hold for the likeliest."""
    kl_divergence: float
    """Mean KL(float || quantized) of a token, nats."""
    perplexity: float
    """Of the answers; of the float model's first token where no answer is known."""
    float_perplexity: float
    answers: int
    """Samples whose answer is known."""
    accuracy: float | None
    """Share of those that the quantized model answers exactly; None if there are none."""
    float_accuracy: float | None

    @property
    def accuracy_drop(self) -> float:
        """Percentage points: of exact answers, or of likeliest tokens where no answer is known."""
        if self.accuracy is None or self.float_accuracy is None:
            return round(100 * (1 - self.top1_agreement), 6)
        return round(100 * (self.float_accuracy - self.accuracy), 6)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        rows = [("Held-out samples", str(self.samples))]
        rows += [(f"Cosine of {graph}", f"{cosine:.5f}") for graph, cosine in self.cosine.items()]
        rows += [
            ("Top-1 agreement", f"{self.top1_agreement:.1%} of {self.tokens} tokens"),
            ("KL divergence", f"{self.kl_divergence:.2g} nats"),
            ("Perplexity of the answers", f"{self.perplexity:.3f} (float {self.float_perplexity:.3f})"),
        ]
        if self.accuracy is not None and self.float_accuracy is not None:
            rows.append(("Exact answers", f"{self.accuracy:.1%} (float {self.float_accuracy:.1%})"))
        return rows


@dataclass(frozen=True)
class QuantizationReport:
    """Everything that is known of a quantization."""

    linears: tuple[LinearReport, ...]
    calibration_samples: int
    """0 without calibration."""
    end_to_end: EndToEnd | None
    mixed_precision: BitAllocation | None = None

    def to_json(self, with_seconds: bool = False) -> dict[str, Any]:
        """The object in ``quantization.json``, which is without seconds."""
        linears = [asdict(linear) for linear in self.linears]
        for linear in linears if not with_seconds else ():
            del linear["seconds"]
        return {
            "calibration_samples": self.calibration_samples,
            "end_to_end": None if self.end_to_end is None else asdict(self.end_to_end),
            "mixed_precision": None if self.mixed_precision is None else asdict(self.mixed_precision),
            "linears": linears,
        }

    @classmethod
    def planned(cls, rounded: Mapping[str, str], taken_over: Mapping[str, str]) -> QuantizationReport:
        """As large as the report of an export without calibration will be, given formats by weight."""
        linears = [LinearReport(name, form, "rtn", 20.12, None, None, 0) for name, form in rounded.items()]
        linears += [LinearReport(name, form, TAKEN_OVER, None, None, None, 0) for name, form in taken_over.items()]
        return cls(tuple(linears), 0, None)

    @classmethod
    def read(cls, path: Path) -> QuantizationReport:
        """From ``quantization.json``, without seconds. Raises ``ValueError`` if it holds something else."""
        data = read_json(path)
        linears = data.get("linears") if isinstance(data, dict) else None
        for linear in linears if isinstance(linears, list) else ():
            if isinstance(linear, dict):
                linear["seconds"] = 0.0
        return from_json(cls, data)

    def to_bytes(self) -> bytes:
        """The content of ``quantization.json``."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    def worst(self) -> list[LinearReport]:
        """All weights, those first whose outputs, or else the weights themselves, lost most."""

        def quality(linear: LinearReport) -> float:
            known = linear.weight_sqnr if linear.output_sqnr is None else linear.output_sqnr
            return math.inf if known is None else known

        return sorted(self.linears, key=quality)

    def rows(self) -> list[tuple[str, str]]:
        """What was chosen and what came of it, for people."""
        return [row for part in (self.mixed_precision, self.end_to_end) if part is not None for row in part.rows()]

    def table(self) -> str:
        """The worst weights, and what came of it end to end."""

        rows = [("worst weights", "format", "method", "SQNR of weights", "of outputs", "seconds")]
        for linear in self.worst()[:WORST]:
            qualities = linear.weight_sqnr, linear.output_sqnr
            sqnr, outputs = ("" if known is None else f"{known:.1f} dB" for known in qualities)
            rows.append((linear.name, linear.format, linear.method, sqnr, outputs, f"{linear.seconds:.1f}"))
        samples = [("Calibration samples", str(self.calibration_samples))] if self.calibration_samples else []
        facts = samples + self.rows()
        width = max((len(name) for name, _ in facts), default=0)
        return format_table(rows) + "".join(f"{name.ljust(width)}  {value}\n" for name, value in facts)


def sqnr(noise: float, signal: float) -> float:
    """Decibels of two sums of squares, to a hundredth; 200 where nothing is lost."""
    if noise <= 0:
        return 200.0
    return round(min(10 * math.log10(max(signal, 1e-300) / noise), 200.0), 2)
