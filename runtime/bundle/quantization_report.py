"""Report of a quantization: ``quantization.json`` of a bundle, and a printed table, worst weights first.

Only the table and ``--json`` contain seconds: a bundle has the same bytes on every run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.bundle.manifest import QUANTIZATION
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_table

WORST = 12  # rows of the table
PREQUANTIZED = "checkpoint"  # method of prequantized weights


@dataclass(frozen=True)
class LinearReport:
    """Quantization of one weight. SQNR is the signal-to-quantization-noise ratio in dB; higher is better."""

    name: str
    format: str
    method: str
    """``gptq``, ``rtn`` (round to nearest) or ``checkpoint`` (prequantized: the checkpoint's integers)."""
    weight_sqnr: float | None
    """None for a prequantized weight."""
    output_sqnr: float | None
    """SQNR of the outputs on the calibration samples, rows weighted as in GPTQ; None without calibration."""
    equalisation: float | None
    """SmoothQuant's alpha; None if the activations are not smoothed."""
    seconds: float


@dataclass(frozen=True)
class Sensitivity:
    """Cost of quantizing one linear, and nothing else, to 4 bits."""

    name: str
    kl_divergence: float
    """Mean KL(float || float with this linear quantized) per token, nats."""
    output_sqnr: float
    """SQNR of its outputs, dB."""


@dataclass(frozen=True)
class BitAllocation:
    """Allocation of 8 bits: linears are promoted in order of KL divergence per extra byte."""

    bits: float
    """Mean bits per weight over all candidates, scales included."""
    samples: int
    raised: tuple[str, ...]
    """Linears promoted to 8 bits."""
    sensitivities: tuple[Sensitivity, ...]
    """Sensitivities of all candidates: the 4-bit linears that may be promoted."""

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values to print."""
        left = sum(s.kl_divergence for s in self.sensitivities if s.name not in self.raised)
        total = sum(s.kl_divergence for s in self.sensitivities)
        promoted = f"{len(self.raised)} of {len(self.sensitivities)}"
        share = f"{1 - left / total:.0%}" if total else "none"
        return [
            ("Bit allocation", f"{self.bits:.2f} bits per weight, {promoted} linears promoted to INT8"),
            ("Sensitivity removed", f"{share} of the summed KL divergences"),
        ]


@dataclass(frozen=True)
class EndToEnd:
    """Comparison of the quantized with the float model on held-out samples."""

    samples: int
    tokens: int
    cosine: Mapping[str, float]
    """Mean cosine similarity of a graph's outputs to the float model's, by graph."""
    top1_agreement: float
    """Share of tokens with the same top-1 token in both models."""
    kl_divergence: float
    """Mean KL(float || quantized) per token, nats."""
    perplexity: float
    """Perplexity of the answers; of the float model's first token for samples without one."""
    float_perplexity: float
    answers: int
    """Number of samples with an answer."""
    accuracy: float | None
    """Share of these answers that the quantized model gives exactly; None without answers."""
    float_accuracy: float | None

    @property
    def accuracy_drop(self) -> float:
        """Drop of exact answers, or of top-1 agreement if no sample has an answer, in percentage points."""
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
    """Report of a quantization."""

    linears: tuple[LinearReport, ...]
    calibration_samples: int
    """0 without calibration."""
    end_to_end: EndToEnd | None
    mixed_precision: BitAllocation | None = None

    def to_json(self, with_seconds: bool = False) -> dict[str, Any]:
        """Return the object of ``quantization.json``, which has no seconds."""
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
        """Return a report with the size of that of an export without calibration, given formats by weight."""
        linears = [LinearReport(name, kind, "rtn", 20.12, None, None, 0) for name, kind in rounded.items()]
        linears += [LinearReport(name, kind, PREQUANTIZED, None, None, None, 0) for name, kind in prequantized.items()]
        return cls(tuple(linears), 0, None)

    @classmethod
    def read(cls, path: Path) -> QuantizationReport:
        """Read ``quantization.json``. Raises ``ValueError`` for other content."""
        data = read_json(path)
        linears = data.get("linears") if isinstance(data, dict) else None
        for linear in linears if isinstance(linears, list) else ():
            if isinstance(linear, dict):
                linear["seconds"] = 0.0
        return from_json(cls, data)

    def to_bytes(self) -> bytes:
        """Return the content of ``quantization.json``."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    def worst(self) -> list[LinearReport]:
        """Return all weights, lowest SQNR first: of the outputs where known, else of the weights."""

        def quality(linear: LinearReport) -> float:
            known = linear.weight_sqnr if linear.output_sqnr is None else linear.output_sqnr
            return math.inf if known is None else known

        return sorted(self.linears, key=quality)

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values of bit allocation and accuracy, to print."""
        return [row for part in (self.mixed_precision, self.end_to_end) if part is not None for row in part.rows()]

    def table(self) -> str:
        """Return the printed table: the worst weights and the accuracy."""
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
    """Return the ratio of two sums of squares in dB, rounded to 0.01; 200 without noise."""
    if noise <= 0:
        return 200.0
    return round(min(10 * math.log10(max(signal, 1e-300) / noise), 200.0), 2)


def read_report(bundle: Bundle) -> QuantizationReport | None:
    """Return the report of a bundle; None if it has none. Raise :class:`FusionError` if it is invalid."""
    if all(entry.path != QUANTIZATION for entry in bundle.manifest.files):
        return None
    path = bundle.path(QUANTIZATION)
    try:
        return QuantizationReport.read(path)
    except (ValueError, RecursionError) as error:
        raise FusionError(f"{path} is not a quantization report ({error}); export the bundle again.") from None
