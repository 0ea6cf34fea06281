"""Draw docs/assets/reliability.svg: accuracy of the demo model's choices by their probability.

    python -m fusion_edge.benchmarks.demo.reliability_plot            # draw
    python -m fusion_edge.benchmarks.demo.reliability_plot --check    # compare the plot with the result

The result is that of ``benchmarks.demo.reliability``. The SVG holds the data it was drawn from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.plots import OTHERS, OURS, RESULTS, ROOT, TEXT, run_plot, svg_figure

RESULT = RESULTS / "demo_reliability.json"
PLOT = ROOT / "docs" / "assets" / "reliability.svg"
FORMATS = {"fp32": (OTHERS, "s"), "int4": (OURS, "o")}
"""Color and marker by format."""
PANELS = {"clear": "Clear pictures", "degraded": "Dark, blurred, noisy pictures"}
"""Title by kind of pictures."""
LEAST = 10
"""Answers from which a bin is drawn."""

Data = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By panel and format: ``error``, and ``points`` ``[[confidence, accuracy, answers]]``."""


def read_data() -> Data:
    """Read the plotted figures from the result."""
    rows = json.loads(RESULT.read_text("utf-8"))["rows"]
    return {
        pictures: {row["format"]: _plotted(row) for row in rows if row["pictures"] == pictures} for pictures in PANELS
    }


def _plotted(row: Mapping[str, Any]) -> dict[str, Any]:
    points = [
        [round(bin["confidence"], 4), round(bin["accuracy"], 4), bin["count"]]
        for bin in row["bins"]
        if bin["count"] >= LEAST
    ]
    return {"error": round(row["choice_calibration_error"], 4), "points": points}


def draw(data: Data, svg: Path) -> None:
    """Draw the plot. Raises :class:`FusionError` without matplotlib."""
    with svg_figure(svg, (9, 4.4), data, "Accuracy by probability; on the line is calibrated") as figure:
        for axes, (pictures, formats) in zip(figure.subplots(1, len(data), sharey=True), data.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=TEXT, linewidth=1, linestyle=(0, (4, 4)))
            for name, plotted in formats.items():
                color, marker = FORMATS[name]
                confidences, accuracies, counts = zip(*plotted["points"], strict=True)
                label = f"{name}, calibration error {plotted['error']:.1%}"
                axes.plot(confidences, accuracies, color=color, linewidth=1.2)
                axes.scatter(
                    confidences,
                    accuracies,
                    s=[16 + 90 * (count / sum(counts)) for count in counts],
                    color=color,
                    marker=marker,
                    label=label,
                )
            axes.set_title(PANELS[pictures], loc="left", fontsize=11, fontweight="bold")
            axes.set_xlabel("probability of the choice")
            axes.set_xlim(0, 1.02)
            axes.set_ylim(0, 1.04)
            axes.set_aspect("equal")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(loc="upper left", frameon=False, fontsize=10, labelcolor=TEXT)
        figure.axes[0].set_ylabel("share of right choices")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_plot(argv, "demo.reliability_plot", "reliability plot of the demo model", PLOT, read_data, draw)


if __name__ == "__main__":
    sys.exit(main())
