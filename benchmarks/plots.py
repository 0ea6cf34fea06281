"""Draw docs/assets/peers.svg: LLM speed of fusion-edge and other engines, from ``benchmarks/results/*.json``.

    pip install -e '.[plots]'
    python -m fusion_edge.benchmarks.plots            # draw
    python -m fusion_edge.benchmarks.plots --check    # compare the committed plot's data with the results

The SVG holds the data it was drawn from, so ``--check`` needs no matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any, TypeVar

from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "assets" / "peers.svg"

MACHINES = {
    "AMD Zen 4": "llm_peers_cpu.json",
    "Intel Ice Lake": "llm_peers_ice_lake_cpu.json",
}
"""Result files by panel title."""
ENGINES = {
    "ours-int8-cache": "fusion-edge, INT8 KV cache",
    "ours": "fusion-edge",
    "openvino-int4": "OpenVINO, INT4, bfloat16",
    "genai-b128": "onnxruntime-genai, INT4",
    "llama.cpp-q4_0": "llama.cpp, Q4_0",
}
"""Names in the plot by label in the result file."""
MEASURES = ("prefill tokens/s", "decode tokens/s")

# Readable on white and on a dark page.
TEXT, OURS, OTHERS = "#7d8790", "#c8501e", "#4c8ca3"

Data = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Tokens per second by machine, measure and engine."""


def read_data() -> Data:
    """Read the plotted medians from the result files."""
    return {machine: _machine(json.loads((RESULTS / file).read_text("utf-8"))) for machine, file in MACHINES.items()}


def _machine(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    prompt, contestants = result["workload"]["prompt"], result["contestants"]
    names = {label: name for label, name in ENGINES.items() if label in contestants}
    prefill = {name: prompt / _median(contestants[label], "prefill_seconds") for label, name in names.items()}
    decode = {name: _median(contestants[label], "decode_tokens_per_second") for label, name in names.items()}
    return {
        measure: {name: round(value, 3) for name, value in values.items()}
        for measure, values in zip(MEASURES, (prefill, decode), strict=True)
    }


def _median(contestant: Mapping[str, Any], figure: str) -> float:
    """Return the median of a figure; files without a schema version list ``turns`` instead of ``figures``."""
    if "figures" in contestant:
        return float(contestant["figures"][figure]["p50"])
    return float(statistics.median(turn[figure] for turn in contestant["turns"]))


def plotted_data(svg: Path) -> Any:
    """Read the data that a plot was drawn from. Raises :class:`FusionError` for a file without data."""
    text = svg.read_text("utf-8") if svg.is_file() else ""
    found = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
    if found is None:
        raise FusionError(f"{svg} is not a plot with data; draw it again, without --check.")
    return json.loads(unescape(found[1]))


@contextmanager
def svg_figure(svg: Path, size: tuple[float, float], data: object, title: str) -> Iterator[Any]:
    """Yield an empty figure of ``size`` in inches, and save it with the ``data`` that it shows.

    Raises :class:`FusionError` without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise FusionError("matplotlib is not installed; install it with pip install -e '.[plots]'.") from None
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fusion-edge",
        "font.family": "sans-serif",
        "font.size": 11,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), TEXT),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        metadata = {"Description": json.dumps(data), "Title": title, "Date": None}
        figure.savefig(svg, format="svg", transparent=True, metadata=metadata)


def draw(data: Data, svg: Path) -> None:
    """Draw the plot. Raises :class:`FusionError` without matplotlib."""
    heights = [len(next(iter(measures.values()))) for measures in data.values()]
    with svg_figure(svg, (9, 0.36 * sum(heights) + 1.5), data, "LLM speed, higher is better") as figure:
        grid = figure.subplots(len(data), len(MEASURES), sharex="col", height_ratios=heights)
        for row, (machine, measures) in zip(grid, data.items(), strict=True):
            for axes, (measure, values) in zip(row, measures.items(), strict=True):
                _bars(axes, values, has_names=measure == MEASURES[0])
                axes.set_title(f"{machine}: {measure}", loc="left", fontsize=11, fontweight="bold")


def _bars(axes: Any, values: Mapping[str, float], has_names: bool) -> None:
    names = list(values)
    colors = [OURS if name.startswith("fusion-edge") else OTHERS for name in names]
    bars = axes.barh(names, list(values.values()), color=colors, height=0.68)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(length=0, labelbottom=False, labelleft=has_names)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)


def run_plot(
    argv: Sequence[str] | None,
    module: str,
    what: str,
    plot: Path,
    read: Callable[[], T],
    draw: Callable[[T, Path], None],
) -> int:
    """Run the command that draws ``plot`` from ``read()``, or checks its data, and return the exit code."""
    prog = f"python -m fusion_edge.benchmarks.{module}"
    parser = argparse.ArgumentParser(prog=prog, description=f"Draw the {what} from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="only compare the plot's data with the results")
    parser.add_argument("--output", type=Path, default=plot, metavar="FILE", help=f"default: docs/assets/{plot.name}")

    def run(arguments: argparse.Namespace) -> int:
        data = read()
        if not arguments.check:
            draw(data, arguments.output)
        elif plotted_data(arguments.output) != data:
            raise FusionError(f"{arguments.output} is outdated; draw it again with {prog}.")
        return 0

    return run_command(run, parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_plot(argv, "plots", "plot of LLM speed against other engines", PLOT, read_data, draw)


if __name__ == "__main__":
    sys.exit(main())
