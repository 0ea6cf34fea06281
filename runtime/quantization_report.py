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

from fusion_edge.runtime import cli
from fusion_edge.runtime.schema import from_json

WORST = 12  # rows of the table


@dataclass(frozen=True)
class LinearReport:
    """How one weight was quantized. SQNR is signal over quantization noise in dB, more is better."""

    name: str
    format: str
    method: str
    """``gptq``, ``rtn`` (rounded to nearest)."""
    weight_sqnr: float
    output_sqnr: float | None
    """Of its outputs on the calibration samples; None without samples."""
    equalisation: float | None
    """Exponent of the factors that its input channels were divided by (SmoothQuant's alpha); None if by none."""
    seconds: float


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
            ("KL divergence", f"{self.kl_divergence:.4f} nats"),
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

    def to_json(self, with_seconds: bool = False) -> dict[str, Any]:
        """The object in ``quantization.json``, which is without seconds."""
        linears = [asdict(linear) for linear in self.linears]
        for linear in linears if not with_seconds else ():
            del linear["seconds"]
        return {
            "calibration_samples": self.calibration_samples,
            "end_to_end": None if self.end_to_end is None else asdict(self.end_to_end),
            "linears": linears,
        }

    @classmethod
    def planned(cls, formats: Mapping[str, str]) -> QuantizationReport:
        """As large as the report of an export without calibration will be."""
        linears = tuple(LinearReport(name, form, "rtn", 20.12, None, None, 0) for name, form in formats.items())
        return cls(linears, 0, None)

    @classmethod
    def read(cls, path: Path) -> QuantizationReport:
        """From ``quantization.json``, without seconds. Raises ``ValueError`` if it holds something else."""
        data = json.loads(path.read_text(encoding="utf-8"))
        for linear in data["linears"]:
            linear["seconds"] = 0.0
        return from_json(cls, data)

    def to_bytes(self) -> bytes:
        """The content of ``quantization.json``."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    def worst(self) -> list[LinearReport]:
        """All weights, those first whose outputs, or else the weights themselves, lost most."""

        def quality(linear: LinearReport) -> float:
            return linear.weight_sqnr if linear.output_sqnr is None else linear.output_sqnr

        return sorted(self.linears, key=quality)

    def table(self) -> str:
        """The worst weights, and what came of it end to end."""

        rows = [("worst weights", "format", "method", "SQNR of weights", "of outputs", "seconds")]
        for linear in self.worst()[:WORST]:
            outputs = "" if linear.output_sqnr is None else f"{linear.output_sqnr:.1f} dB"
            sqnr, seconds = f"{linear.weight_sqnr:.1f} dB", f"{linear.seconds:.1f}"
            rows.append((linear.name, linear.format, linear.method, sqnr, outputs, seconds))
        facts = self.end_to_end.rows() if self.end_to_end else []
        width = max((len(name) for name, _ in facts), default=0)
        return cli.table(rows) + "".join(f"{name.ljust(width)}  {value}\n" for name, value in facts)


def sqnr(noise: float, signal: float) -> float:
    """Decibels of two sums of squares, to a hundredth; 200 where nothing is lost."""
    if noise <= 0:
        return 200.0
    return round(min(10 * math.log10(max(signal, 1e-300) / noise), 200.0), 2)
