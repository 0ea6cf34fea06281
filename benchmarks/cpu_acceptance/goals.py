"""Goals of the CPU kernels, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusion_edge.runtime.formatting import format_table


@dataclass(frozen=True)
class Goal:
    """A figure and the limit that it has to reach."""

    name: str
    figure: float
    limit: float
    unit: str
    """Empty for a ratio of two measurements."""
    is_upper: bool = False
    """Whether the figure may be at most, not at least, the limit."""

    @property
    def ratio(self) -> float:
        """Return how many times as good as the limit the figure is."""
        return self.limit / self.figure if self.is_upper else self.figure / self.limit

    @property
    def is_met(self) -> bool:
        """Return whether the figure reaches the limit."""
        return self.ratio >= 1


def goal_table(goals: Sequence[Goal]) -> str:
    """Format goals with their figures and ratios."""
    rows: list[tuple[str, ...]] = [("goal", "limit", "measured", "measured / limit", "")]
    for goal in goals:
        limit = f"{'<=' if goal.is_upper else '>='} {_number(goal.limit, goal.unit)}"
        state = "met" if goal.is_met else "NOT MET"
        rows.append((goal.name, limit, _number(goal.figure, goal.unit), f"{goal.figure / goal.limit:.2f}", state))
    return format_table(rows)


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}" if unit and value < 1000 else f"{value:.0f} {unit}" if unit else f"{value:.2f}"
