"""Figures of measurements, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.demo.accuracy.held_out import Asked, asked_questions, read_pictures
from fusion_edge.benchmarks.demo.accuracy.measure import conversation_pictures, read_measured
from fusion_edge.benchmarks.demo.accuracy.tables import BITS, FLOAT, GROUPS, RANDOM_CHOICES, Measurement, Row
from fusion_edge.benchmarks.demo.accuracy.work import Work
from fusion_edge.benchmarks.demo.samples import most_frequent_share
from fusion_edge.benchmarks.evaluation.paired import Estimate, Pictures
from fusion_edge.benchmarks.evaluation.report.rows import percent
from fusion_edge.benchmarks.evaluation.scores import is_exact
from fusion_edge.runtime.formatting import format_bytes

Flags = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
"""Bounds of a share, and of the difference of two."""


@dataclass(frozen=True)
class Figures:
    """Figures of a row."""

    label: str
    measurement: Measurement
    questions: int
    size: int
    """Bytes of the bundle; 0 for a checkpoint."""
    accuracy: Estimate
    """Share of exact answers. Rows about follow-up questions of right answers count different questions."""
    loss: Estimate
    """How much lower it is than that of the table's base on the same questions."""
    lost: int
    """Questions that only the base answers."""
    gained: int
    """Questions that only this row answers."""
    same_answers: Estimate
    """Share of the base's answers."""
    kl_first_token: Estimate | None
    """Mean KL(fp32 || row) of the first token, nats; None for conversations."""
    choose_accuracy: Estimate | None
    """Share of right choices; None for conversations."""
    choose_calibration_error: Estimate | None
    """Expected calibration error of the choices' probabilities."""
    accuracy_by_kind: dict[str, float]
    seconds: float
    """Processor time."""


@dataclass(frozen=True)
class Comparison:
    """A note below a table: the loss of a measurement divided by another's, or the share of a loss that it spares.

    None where the loss to compare with may be 0.
    """

    text: str
    lost_answers: Estimate | None
    """By answers that are less often right than fp32's."""
    changed_answers: Estimate | None
    """By answers that differ from fp32's, right or wrong."""
    kl_first_token: Estimate | None
    """By divergences from fp32."""


class Results:
    """Finished measurements, on the same questions."""

    def __init__(self, work: Work) -> None:
        pictures = read_pictures(work.pictures)
        self.measured = cache(partial(read_measured, work))
        """Returns a finished measurement."""
        self._asked = {
            False: asked_questions(pictures, False),
            True: asked_questions(conversation_pictures(pictures), True),
        }
        self._pictures = {key: Pictures([one.picture for one in asked]) for key, asked in self._asked.items()}

    def right(self, measurement: Measurement) -> Flags:
        """Return which answers are right."""
        pairs = zip(self.measured(measurement).answers, self._asked[measurement.is_conversation], strict=True)
        return np.array([is_exact(answer, one.question.answer) for answer, one in pairs])

    def figures(self, row: Row, base: Measurement) -> Figures | None:
        """Return the figures of a row; None if no question counts."""
        measurement, measured = row.measurement, self.measured(row.measurement)
        asked, right = self._asked[measurement.is_conversation], self.right(row.measurement)
        base_right, base_answers = self.right(base), self.measured(base).answers
        counts = PARTS[row.part](asked, right & base_right)  # the same for both, else the loss would be biased
        if not counts.any():
            return None
        same = np.array([one == other for one, other in zip(measured.answers, base_answers, strict=True)])
        share, difference = (None, None) if measurement == base else (SHARE, DIFFERENCE)  # a base equals itself
        pictures = self._pictures[measurement.is_conversation]
        if not counts.all():
            pictures = Pictures([one.picture for one, counted in zip(asked, counts, strict=True) if counted])
        chosen = [one.question.answer == text for one, text in zip(asked, measured.choices, strict=False)]
        of_chosen = Pictures([one.picture for one in asked[: len(chosen)]]) if chosen else None
        return Figures(
            label=row.label,
            measurement=measurement,
            questions=int(counts.sum()),
            size=measured.size,
            accuracy=pictures.mean(right[counts], SHARE),
            loss=pictures.mean(base_right[counts].astype(int) - right[counts], difference),
            lost=int((base_right & ~right & counts).sum()),
            gained=int((right & ~base_right & counts).sum()),
            same_answers=pictures.mean(same[counts], share),
            kl_first_token=pictures.mean(np.array(measured.divergences)[counts]) if measured.divergences else None,
            choose_accuracy=of_chosen.mean(chosen, SHARE) if of_chosen else None,
            choose_calibration_error=(
                of_chosen.calibration_error(measured.probabilities, chosen) if of_chosen else None
            ),
            accuracy_by_kind=_by_kind(asked, right, counts),
            seconds=measured.seconds,
        )

    def guessed(self) -> float:
        """Return the share of questions that the most frequent answer of each kind answers."""
        return most_frequent_share([(one.question.kind, one.question.answer) for one in self._asked[False]])

    def times(self, text: str, one: Measurement, other: Measurement) -> Comparison:
        """Return what one measurement loses over what another loses."""
        pictures = self._pictures[False]
        return Comparison(text, *(pictures.ratio(cost(one), cost(other)) for cost in self._costs()))

    def spared(self, text: str, one: Measurement, others: Sequence[Measurement]) -> Comparison:
        """Return the share of others' mean loss that a measurement spares.

        The intervals cover the choice of pictures, not that of the others.
        """
        pictures, ratios = self._pictures[False], []
        for cost in self._costs():
            mean = np.mean([cost(other) for other in others], axis=0)
            ratios.append(pictures.ratio(mean - cost(one), mean))
        return Comparison(text, *ratios)

    def _costs(self) -> tuple[Callable[[Measurement], Values], ...]:
        """Return what gives each question's lost answer, changed answer and divergence, against fp32."""
        reference, right = self.measured(FLOAT).answers, self.right(FLOAT).astype(float)

        def changed(one: Measurement) -> Values:
            pairs = zip(self.measured(one).answers, reference, strict=True)
            return np.array([answer != expected for answer, expected in pairs], float)

        return (
            lambda one: right - self.right(one),
            changed,
            lambda one: np.array(self.measured(one).divergences),
        )


def _by_kind(asked: Sequence[Asked], right: Flags, counts: Flags) -> dict[str, float]:
    kinds = np.array([one.question.kind for one in asked])
    return {str(kind): float(right[counts & (kinds == kind)].mean()) for kind in np.unique(kinds[counts])}


def _is_first(asked: Sequence[Asked]) -> Flags:
    return np.array([one.turn == 0 for one in asked])


def _follows_right_answers(asked: Sequence[Asked], right: Flags) -> Flags:
    """Return which follow-up questions come after right answers alone."""
    follows, so_far = [], True
    for one, is_right in zip(asked, right, strict=True):
        so_far = so_far or one.turn == 0
        follows.append(so_far and one.turn > 0)
        so_far = so_far and bool(is_right)
    return np.array(follows)


PARTS: dict[str, Callable[[Sequence[Asked], Flags], Flags]] = {
    "all": lambda asked, _: np.ones(len(asked), bool),
    "first question": lambda asked, _: _is_first(asked),
    "follow-up": lambda asked, _: ~_is_first(asked),
    "follow-up of right answers": _follows_right_answers,
}
"""Questions that count, by name."""


def comparisons(name: str, results: Results) -> list[Comparison]:
    """Return what is said below a table."""
    if name == "formats":
        return [
            results.times(
                f"int4:{group}, RTN over GPTQ",
                Measurement(f"int4-{group}-rtn"),
                Measurement(f"int4-{group}-gptq"),
            )
            for group in GROUPS
        ]
    if name == "mixed":
        return [
            results.spared(
                f"{bits} bits, part of the mean loss of {RANDOM_CHOICES} random choices that sensitivity spares",
                Measurement(f"int4-{bits}-bits"),
                [Measurement(f"int4-{bits}-bits-random-{number}") for number in range(1, RANDOM_CHOICES + 1)],
            )
            for bits in BITS
        ]
    return []


def table(name: str, figures: Sequence[Figures], compared: Sequence[Comparison]) -> str:
    """Return rows and comparisons as Markdown."""
    lines = [
        f"| {name} | size | accuracy | loss, points | lost, gained | same answers | KL, first token "
        "| choose: calibration error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures:
        cells = [
            row.label,
            format_bytes(row.size) if row.size else "",
            _share(row.accuracy),
            f"{100 * row.loss.value:.2f} [{_interval(row.loss, 2)}]",
            f"{row.lost}, {row.gained} of {row.questions:,}",
            percent(row.same_answers.value),
            "" if row.kl_first_token is None else _nats(row.kl_first_token),
            "" if row.choose_calibration_error is None else _share(row.choose_calibration_error),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{one.text}: {_text(one)}" for one in compared)] if compared else []
    return "\n".join(lines) + "\n"


def _share(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} [{_interval(estimate)}]"


def _nats(estimate: Estimate) -> str:
    return f"{estimate.value:.2g} [{' to '.join(f'{bound:.2g}' for bound in estimate.ci95)}] nats"


def _interval(estimate: Estimate, digits: int = 1) -> str:
    return " to ".join(f"{100 * bound:.{digits}f}" for bound in estimate.ci95)


def _text(compared: Comparison) -> str:
    """Return the ratios with their intervals."""
    named = {
        "lost answers": compared.lost_answers,
        "changed answers": compared.changed_answers,
        "KL divergence": compared.kl_first_token,
    }
    return "; ".join(f"{name} {_ratio(ratio)}" for name, ratio in named.items())


def _ratio(ratio: Estimate | None) -> str:
    if ratio is None:
        return "unknown, as there may be none"
    return f"{ratio.value:.2f} [{' to '.join(f'{bound:.2f}' for bound in ratio.ci95)}]"
