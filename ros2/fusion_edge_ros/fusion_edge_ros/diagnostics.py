"""The node's ``diagnostic_msgs/DiagnosticStatus``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from fusion_edge import Fusion, Latencies, Percentiles


@dataclass
class Diagnostics:
    """Reports the state of a node, and warns about what has gone wrong since the last report."""

    bundle: str = ""
    state: str = "unconfigured"
    """Lifecycle state."""
    fusion: Fusion | None = None
    """The model; None before configure."""
    frames: int = 0
    """Frames received since activate."""
    bad_frames: int = 0
    """Those that are no pictures for the model."""
    _reported: Counter[str] = field(default_factory=Counter)

    def activate(self) -> None:
        """Count from zero."""
        self.frames = self.bad_frames = 0
        self._reported.clear()

    def status(
        self, name: str, latencies: Latencies | None, ages: Mapping[str, float], max_frame_age: float
    ) -> DiagnosticStatus:
        """Return the status of a node.

        Args:
            name: Its name.
            latencies: Those since activate; None if it is not active.
            ages: Seconds since the newest frame, by topic.
            max_frame_age: Limit of ``ages`` in seconds; 0 for none.
        """
        values = {"state": self.state, "bundle": self.bundle}
        if self.fusion is not None:
            device = self.fusion.device
            values |= {"device": device.name, "kernels": device.kernels or "none", "remark": device.remark or ""}
        problems = []
        if latencies is not None:
            counts = {
                "bad frames": self.bad_frames,
                "failed": latencies.failed,
                "late": latencies.late,
                "refused by the queue": latencies.dropped,
            }
            problems = [
                f"{count - self._reported[what]} {what}"
                for what, count in counts.items()
                if count > self._reported[what]
            ]
            self._reported.update({what: count - self._reported[what] for what, count in counts.items()})
            late_topics = {topic: age for topic, age in ages.items() if 0 < max_frame_age < age}
            problems += [f"no frame on {topic} for {age:.1f} s" for topic, age in late_topics.items()]
            values |= {f"age of {topic} (s)": f"{age:.1f}" for topic, age in ages.items()}
            values |= {"frames": str(self.frames), "dropped frames": str(latencies.superseded)}
            values |= {what: str(count) for what, count in counts.items()}
            values |= {"answered": str(latencies.answered), "cancelled": str(latencies.cancelled)}
            values |= _percentiles("wait", latencies.wait_ms)
            values |= _percentiles("first token", latencies.first_token_ms)
            values |= _percentiles("total", latencies.total_ms)
        return DiagnosticStatus(
            level=DiagnosticStatus.WARN if problems else DiagnosticStatus.OK,
            name=f"{name}: answers",
            message=", ".join([self.state, *problems]),
            hardware_id=values.get("device", ""),
            values=[KeyValue(key=key, value=value) for key, value in values.items()],
        )


def _percentiles(name: str, percentiles: Percentiles) -> dict[str, str]:
    values = {"p50": percentiles.p50, "p95": percentiles.p95, "p99": percentiles.p99}
    return {f"{name} {key} (ms)": f"{value:.1f}" for key, value in values.items() if not math.isnan(value)}
