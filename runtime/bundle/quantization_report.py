"""The quantization report: ``quantization.json`` of a bundle, and a printed table with the worst weights first.

Only the table and the output of ``--json`` have seconds, so that a bundle has the same bytes on every run.
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

WORST = 12
"""Number of weights in the table."""
PREQUANTIZED = "checkpoint"
"""Method of weights from a prequantized checkpoint."""


@dataclass(frozen=True)
class LinearReport:
    """Quantization of one weight. SQNR is the signal to quantization noise ratio in dB; higher is better."""

    name: str
    format: str
    method: str
    """``gptq``, ``rtn`` (round to nearest) or ``checkpoint`` (prequantized)."""
    weight_sqnr: float | None
    """None if the original weight is not known."""
    output_sqnr: float | None
    """SQNR of the outputs on the calibration samples, with the row weights of calibration; None without samples."""
    equalisation: float | None
    """SmoothQuant's alpha; None without smoothing."""
    seconds: float


@dataclass(frozen=True)
class Sensitivity:
    """Error of quantizing one linear to 4 bits and no other."""

    name: str
    kl_divergence: float
    """Mean KL(float || quantized) per token in nats."""
    output_sqnr: float
    """SQNR of the linear's outputs in dB."""


@dataclass(frozen=True)
class BitAllocation:
    """Result of bit allocation: the linears with 8 bits, and the sensitivities of all."""

    bits: float
    """Mean bits per weight, with scales, over the linears that may have 4 bits."""
    samples: int
    raised: tuple[str, ...]
    """Names of the linears with 8 bits."""
    sensitivities: tuple[Sensitivity, ...]
    """Of all linears that may have 4 bits."""

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values to print."""
        left = sum(s.kl_divergence for s in self.sensitivities if s.name not in self.raised)
        total = sum(s.kl_divergence for s in self.sensitivities)
        share = f"{1 - left / total:.0%}" if total else "none"
        return [
            (
                "Bit allocation",
                f"{self.bits:.2f} bits per weight, {len(self.raised)} of {len(self.sensitivities)} linears in INT8",
            ),
            ("Sensitivity removed", f"{share} of the sum of KL divergences"),
        ]


@dataclass(frozen=True)
class EndToEnd:
    """The quantized model against the float model on held-out samples."""

    samples: int
    tokens: int
    cosine: Mapping[str, float]
    """Mean cosine similarity of outputs by graph."""
    top1_agreement: float
    """Share of tokens with the same likeliest prediction."""
    kl_divergence: float
    """Mean KL(float || quantized) per token in nats."""
    perplexity: float
    """Perplexity of the answers; of the float model's first token if no answer is known."""
    float_perplexity: float
    answers: int
    """Number of samples with a known answer."""
    accuracy: float | None
    """Share of exact answers among those; None without any."""
    float_accuracy: float | None

    @property
    def accuracy_drop(self) -> float:
        """Loss in percentage points: of exact answers, or of top-1 agreement if no answer is known."""
        if self.accuracy is None or self.float_accuracy is None:
            return round(100 * (1 - self.top1_agreement), 6)
        return round(100 * (self.float_accuracy - self.accuracy), 6)

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values to print."""
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
    """The content of ``quantization.json``."""

    linears: tuple[LinearReport, ...]
    calibration_samples: int
    """Number of calibration samples; 0 without calibration."""
    end_to_end: EndToEnd | None
    mixed_precision: BitAllocation | None = None

    def to_json(self, with_seconds: bool = False) -> dict[str, Any]:
        """Return the JSON object. ``quantization.json`` has no seconds."""
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
    def planned(cls, rounded: Mapping[str, str], prequantized: Mapping[str, str]) -> QuantizationReport:
        """Return a report of the size that an export without calibration writes, given formats by weight."""
        linears = [LinearReport(name, form, "rtn", 20.12, None, None, 0) for name, form in rounded.items()]
        linears += [LinearReport(name, form, PREQUANTIZED, None, None, None, 0) for name, form in prequantized.items()]
        return cls(tuple(linears), 0, None)

    @classmethod
    def read(cls, path: Path) -> QuantizationReport:
        """Read ``quantization.json``. Raise ``ValueError`` if it is not a report."""
        data = read_json(path)
        linears = data.get("linears") if isinstance(data, dict) else None
        for linear in linears if isinstance(linears, list) else ():
            if isinstance(linear, dict):
                linear["seconds"] = 0.0
        return from_json(cls, data)

    def to_bytes(self) -> bytes:
        """Return the bytes of ``quantization.json``."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    def worst(self) -> list[LinearReport]:
        """Return all weights by SQNR of the outputs, or of the weights if that is not known; the lowest first."""

        def quality(linear: LinearReport) -> float:
            known = linear.weight_sqnr if linear.output_sqnr is None else linear.output_sqnr
            return math.inf if known is None else known

        return sorted(self.linears, key=quality)

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values of bit allocation and evaluation to print."""
        return [row for part in (self.mixed_precision, self.end_to_end) if part is not None for row in part.rows()]

    def table(self) -> str:
        """Return a table of the worst weights and the evaluation."""

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
    """Return the ratio of two sums of squares in dB, to two decimals; 200 for no noise."""
    if noise <= 0:
        return 200.0
    return round(min(10 * math.log10(max(signal, 1e-300) / noise), 200.0), 2)
