"""Accuracy of a checkpoint: what is measured, that a run resumes, and the figures of its tables."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_edge.benchmarks.demo.accuracy import __main__ as accuracy
from fusion_edge.benchmarks.demo.accuracy import bundles, held_out, tables
from fusion_edge.benchmarks.demo.accuracy.bundles import random_subset
from fusion_edge.benchmarks.demo.accuracy.held_out import Asked, Picture, asked_questions, read_pictures
from fusion_edge.benchmarks.demo.accuracy.measure import Measured
from fusion_edge.benchmarks.demo.accuracy.report import PARTS, Results, comparisons, table
from fusion_edge.benchmarks.demo.accuracy.schedule import Step, run, stages
from fusion_edge.benchmarks.demo.accuracy.tables import (
    BITS,
    BUNDLES,
    CHECKPOINT_WITHOUT_ALIGNMENT,
    FLOAT,
    RANDOM_CHOICES,
    TABLES,
    Measurement,
    Row,
    Table,
)
from fusion_edge.benchmarks.demo.accuracy.work import Work
from fusion_edge.benchmarks.demo.pictures import Question
from fusion_edge.benchmarks.demo.samples import SAMPLES, write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration import bit_budget
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.runtime import load
from fusion_edge.runtime.bundle.manifest import QUANTIZATION
from fusion_edge.runtime.bundle.quantization_report import (
    BitAllocation,
    LinearReport,
    QuantizationReport,
    Sensitivity,
)
from fusion_edge.runtime.errors import FusionError

OPTIONS = ("--questions", "10", "--chosen", "7", "--calibrating", "2", "--processes", "1")

# Data ------------------------------------------------------------------------------------------------------------


def test_rows_name_bundles_and_parts_that_exist() -> None:
    rows = [row for one in TABLES.values() for row in one.rows]
    for measurement in [row.measurement for row in rows] + [one.base for one in TABLES.values()]:
        assert measurement.model in {*BUNDLES, CHECKPOINT_WITHOUT_ALIGNMENT}
        assert measurement.guide in tables.GUIDES
    assert {row.part for row in rows} <= PARTS.keys()
    distinct = {row.measurement for row in rows}
    assert len({one.name for one in distinct}) == len(distinct)  # names of their files


@pytest.mark.parametrize("name", BUNDLES)
def test_options_of_bundles_exist(name: str) -> None:
    bundle = BUNDLES[name]
    assert cli.parser().parse_args(["checkpoint", *bundle.options]).checkpoint == "checkpoint"
    assert bundle.same_size_as is None or "--bits" in BUNDLES[bundle.same_size_as].options


def test_held_out_questions_are_those_of_the_samples(tmp_path: Path) -> None:
    held_out.write_pictures(tmp_path / "pictures", 2)
    write_samples(tmp_path / "samples", 10, held_out=True)
    lines = [json.loads(line) for line in (tmp_path / "samples" / SAMPLES).read_text("utf-8").splitlines()]
    pictures = read_pictures(tmp_path / "pictures")
    asked = [(one.picture, one.question.text, one.question.answer) for one in asked_questions(pictures, False)]
    assert asked == [(int(line["image"][:5]), line["question"], line["answer"]) for line in lines]
    assert [one.turn for one in asked_questions(pictures, True)] == [*range(held_out.TURNS)] * 2


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.text("abc", max_size=3), st.integers(1, 9), max_size=20), st.integers(0, 99), st.integers(0, 9)
)
def test_random_subset_is_as_large_as_possible(sizes: dict[str, int], total: int, seed: int) -> None:
    chosen = random_subset(sizes, total, seed)
    left = total - sum(sizes[name] for name in chosen)
    assert len(set(chosen)) == len(chosen)
    assert left >= 0
    assert all(sizes[name] > left for name in sizes.keys() - set(chosen))
    assert chosen == random_subset(dict(reversed(sizes.items())), total, seed)


# Run -------------------------------------------------------------------------------------------------------------

SMALL = {
    "formats": Table((Row("fp32", FLOAT), Row("rounded", Measurement("int4-128-rtn", 4, "none"))), FLOAT),
    "parts": Table((Row("off", Measurement(CHECKPOINT_WITHOUT_ALIGNMENT)),), FLOAT),
    "conversations": Table(
        tuple(Row(part, Measurement("fp32", is_conversation=True), part) for part in ("first question", "follow-up")),
        Measurement("fp32", is_conversation=True),
    ),
}


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, without calibration."""
    monkeypatch.setattr(accuracy, "TABLES", SMALL)
    monkeypatch.setattr(accuracy, "comparisons", lambda name, results: [])


@pytest.mark.usefixtures("small_tables")
def test_run_measures_and_resumes(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--checkpoint", str(tiny_checkpoint), "--work", str(tmp_path / "work"))
    options = [*where, *OPTIONS, "--json", str(tmp_path / "result.json")]
    assert accuracy.main(options) == 0
    first = capsys.readouterr()
    assert "| formats | size |" in first.out
    assert first.err.splitlines()[-1].startswith("8 of 8, ")

    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    fp32, rounded = result["tables"]["formats"]
    assert (fp32["questions"], fp32["lost"], fp32["gained"], fp32["kl_first_token"]["value"]) == (10, 0, 0, 0)
    assert rounded["kl_first_token"]["value"] > 1e-6
    assert 0 < rounded["choose_calibration_error"]["value"] < 1
    assert result["tables"]["parts"][0]["kl_first_token"]["value"] > 1e-6
    assert [row["questions"] for row in result["tables"]["conversations"]] == [1, held_out.TURNS - 1]

    work = Work(tmp_path / "work", tiny_checkpoint, 10, 7, 2)
    assert not any(stages([row.measurement for one in SMALL.values() for row in one.rows], work))
    assert accuracy.main(options) == 0
    second = capsys.readouterr()
    assert (second.out, second.err) == (first.out, "")

    assert accuracy.main([*where, "--questions", "5"]) == 2
    assert "holds results of another checkpoint, other numbers" in capsys.readouterr().err


def test_random_choice_promotes_as_many_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fusion-export`` gets rules for other linears than those that sensitivity chose, and as many weights."""
    work = Work(tmp_path, tiny_checkpoint, 5, 5, 2)
    with Checkpoint(tiny_checkpoint) as checkpoint:
        linears = bit_budget.candidates(plan_export(checkpoint, ExportOptions()))
    sizes = {name: rows * columns for name, (rows, columns) in linears.items()}
    raised = tuple(name for name in linears if name.startswith("llm.layers.0."))
    report = QuantizationReport(
        tuple(LinearReport(name, "int8:32", "gptq", 20.0, None, None, 0.0) for name in raised),
        calibration_samples=2,
        end_to_end=None,
        mixed_precision=BitAllocation(6.0, 2, raised, tuple(Sensitivity(name, 0.1, 20.0) for name in linears)),
    )
    mixed, random = (f"int4-{BITS[0]}-bits{suffix}" for suffix in ("", "-random-1"))
    work.bundle(mixed).mkdir(parents=True)
    (work.bundle(mixed) / QUANTIZATION).write_bytes(report.to_bytes())
    given: list[str] = []

    def export_to(options: list[str]) -> int:
        given.extend(options)
        return 0

    monkeypatch.setattr(cli, "main", export_to)
    bundles.export(random, work)
    promoted = {option.removeprefix("--rule=").split("=")[0] for option in given if option.endswith("=int8:32")}
    assert promoted != set(raised)
    assert promoted <= linears.keys()
    assert sum(sizes[name] for name in promoted) == sum(sizes[name] for name in raised)

    monkeypatch.setattr(cli, "main", lambda options: 1)
    with pytest.raises(FusionError, match=r"random-1 failed; see its error above"):
        bundles.export(random, work)


def test_no_text_row_guides_without_a_guide(tiny_bundle: Path) -> None:
    """The row "text guidance off" is that of an empty guide."""
    with load(tiny_bundle) as fusion:
        assert len(fusion.pipeline.prompts.encode_start(tables.GUIDES["none"] or "").instruct_ids) == 0


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--checkpoint", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    assert "has no checkpoint" in capsys.readouterr().err


def test_stages_run_in_order_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [Step(f"write {name}", partial(Path.write_text, tmp_path / name, name), 1) for name in "ab"]
    second = [Step("rename", partial(Path.rename, tmp_path / "a", tmp_path / "c"), 2)]
    run([first, second], processes=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "c"]
    assert capsys.readouterr().err.splitlines()[-1].endswith("rename")


FAILING = {"raises": partial(divmod, 1, 0), "is killed": partial(signal.raise_signal, signal.SIGKILL)}


@pytest.mark.parametrize("failing", FAILING)
def test_failed_step_ends_the_run(failing: str) -> None:
    started = time.monotonic()
    with pytest.raises(FusionError, match=r"^Step 'fail' failed \(exit code -?\d+\); see above\.$"):
        run([[Step("fail", FAILING[failing], 1), Step("wait", partial(time.sleep, 60), 1)]], processes=2)
    assert time.monotonic() - started < 30


# Figures ---------------------------------------------------------------------------------------------------------

ANSWERS = ("dog", "cat", "two", "yes")
"""Right answers to the questions of each picture."""


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """40 questions about ten pictures, answered by fp32 and others, with divergences of 1 for wrong answers."""
    questions = tuple(Question(f"{number}?", answer, "what") for number, answer in enumerate(ANSWERS))
    pictures = tuple(Picture(f"{number}.png", questions, questions) for number in range(10))
    work = Work(tmp_path, tmp_path, 40, 2, 2)
    for folder in (work.pictures, work.reference.parent):
        folder.mkdir()
    content = held_out._Content(pictures)
    (work.pictures / held_out.FILE).write_text(json.dumps(asdict(content)), "utf-8")
    return work


def write(work: Work, measurement: Measurement, wrong: set[int], count: int = 40) -> None:
    """Write a measurement with these wrong answers."""
    answers = tuple("wrong" if number in wrong else ANSWERS[number % 4] for number in range(count))
    far = tuple(float(number in wrong) for number in range(count))
    measured = Measured(answers, far, ("dog", "dog"), (0.8, 0.6), 1000, 1.0)
    work.measurement(measurement).write_text(json.dumps(vars(measured)), "utf-8")


def test_figures_of_a_row(work: Work) -> None:
    other = Measurement("int8-128")
    write(work, FLOAT, {0, 4})
    write(work, other, {4, 5, 6})
    figures = Results(work).figures(Row("int8", other), FLOAT)
    assert figures is not None
    assert figures.accuracy.value == pytest.approx(37 / 40)
    assert figures.loss.value == pytest.approx(1 / 40)
    assert figures.loss.ci95[0] < 0 < figures.loss.ci95[1]
    assert (figures.lost, figures.gained) == (2, 1)
    assert figures.same_answers.value == pytest.approx(37 / 40)
    assert figures.kl_first_token is not None
    assert figures.kl_first_token.value == pytest.approx(3 / 40)
    assert figures.choose_accuracy is not None
    assert figures.choose_accuracy.value == 0.5
    assert figures.choose_calibration_error is not None
    assert figures.choose_calibration_error.value == pytest.approx((0.2 + 0.6) / 2)
    assert figures.accuracy_by_kind == {"what": pytest.approx(37 / 40)}
    line = table("formats", [figures], []).splitlines()[-1]
    assert line.startswith("| int8 | 1.00 kB | 92.5% [")
    assert "| 2, 1 of 40 | 92.5% | 0.075 [" in line
    assert line.endswith("] nats | 40.0% [40.0 to 40.0] |")


def test_follow_up_questions_come_after_right_answers_of_both(work: Work) -> None:
    """Else the base's loss would depend on which questions the row reached."""
    base, other = (Measurement(model, is_conversation=True) for model in ("fp32", "int8-128"))
    write(work, base, set(range(0, 8, 4)), count=20)  # of five conversations, two begin wrong
    write(work, other, {8}, count=20)  # and another
    figures = Results(work).figures(Row("int8", other, "follow-up of right answers"), base)
    assert figures is not None
    assert (figures.questions, figures.lost, figures.gained) == (2 * 3, 0, 0)


def test_row_without_questions_has_no_figures(work: Work) -> None:
    conversations = Measurement("fp32", is_conversation=True)
    write(work, conversations, set(range(20)), count=20)  # every first answer is wrong
    assert Results(work).figures(Row("fp32", conversations, "follow-up of right answers"), conversations) is None


def test_parts_of_a_conversation() -> None:
    asked = [Asked(number, turn, Question("?", "dog", "what")) for number in range(2) for turn in range(3)]
    right = np.array([True, False, True, True, True, False])
    parts = {name: part(asked, right).astype(int).tolist() for name, part in PARTS.items()}
    assert parts == {
        "all": [1, 1, 1, 1, 1, 1],
        "first question": [1, 0, 0, 1, 0, 0],
        "follow-up": [0, 1, 1, 0, 1, 1],
        "follow-up of right answers": [0, 1, 0, 0, 1, 1],
    }


def test_comparisons(work: Work) -> None:
    """GPTQ loses an answer of each picture, rounding three."""
    write(work, FLOAT, set())
    for group in tables.GROUPS:
        write(work, Measurement(f"int4-{group}-rtn"), {number for number in range(40) if number % 4})
        write(work, Measurement(f"int4-{group}-gptq"), {number for number in range(40) if number % 4 == 1})
    for bits in BITS:
        write(work, Measurement(f"int4-{bits}-bits"), set(range(0, 40, 4)))
        for number in range(1, RANDOM_CHOICES + 1):
            wrong = set() if bits == BITS[0] else set(range(0, 40, 2))
            write(work, Measurement(f"int4-{bits}-bits-random-{number}"), wrong)
    results = Results(work)
    (times, *_), (nothing, spared) = (comparisons(name, results) for name in ("formats", "mixed"))
    for ratio in (times.lost_answers, times.changed_answers, times.kl_first_token):
        assert ratio is not None
        assert (ratio.value, *ratio.ci95) == pytest.approx((3, 3, 3))
    assert nothing.lost_answers is None
    assert spared.lost_answers is not None
    assert spared.lost_answers.value == pytest.approx(1 / 2)
    text = table("mixed", [], [nothing, spared]).splitlines()[-1]
    assert text.startswith(
        "5.5 bits, part of the mean loss of 3 random choices that sensitivity spares: lost answers 0.50 ["
    )
