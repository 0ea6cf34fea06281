"""A result as text for a terminal."""

from __future__ import annotations

from fusion_edge.benchmarks.evaluation.report import rows
from fusion_edge.benchmarks.evaluation.result import EvalResult
from fusion_edge.runtime.formatting import format_table


def text(result: EvalResult) -> str:
    """Return a header, the shares, the other figures, and the latencies."""
    lines = [rows.model_name(result.model), rows.asked(result)]
    if result.comparison is not None:
        lines.append(f"reference: {rows.model_name(result.comparison.reference)}")
    shares = [
        [name, rows.percent(share.share), rows.interval(share), f"{share.count:,} of {share.total:,}"]
        for name, share in rows.shares(result).items()
    ]
    blocks = ["".join(f"{line}\n" for line in lines), format_table([["", "share", "95% interval", ""], *shares])]
    blocks.append(format_table(list(rows.figures(result).items())))
    for name, stages in rows.latencies(result).items():
        header = [name.lower(), "p50", "p95", "p99", "count"]
        blocks.append(format_table([header, *([stage, *rows.times(one)] for stage, one in stages.items())]))
    return "\n".join(blocks)
