"""``fusion-eval``: figures, reference, report and errors, on a bundle with random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fusion_edge.benchmarks.evaluation import models
from fusion_edge.benchmarks.evaluation.cli import main
from fusion_edge.runtime import Sampling, load

Evaluated = Callable[..., dict[str, Any]]
TOKENS = 3
QUESTIONS = ("How many?", "What is it?", "Is <b>it</b> & clear?", "Where?")
EVIL = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def answers(tiny_bundle: Path, data: Path) -> list[str]:
    """Return the bundle's own answers to the questions about two pictures."""
    with load(tiny_bundle) as fusion:
        return [
            fusion.answer(data.parent / f"{i}.png", question, sampling=Sampling(max_new_tokens=TOKENS)).text
            for i in range(2)
            for question in QUESTIONS
        ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder / "samples.jsonl"


@pytest.fixture(scope="module")
def samples(data: Path, answers: list[str]) -> Path:
    """Eight samples: five expect the bundle's answer, two a part of it or more, one another."""
    expected = [*answers[:5], f" {answers[5]}\n", f"{answers[6]} and more", EVIL]
    lines = [
        {"image": f"{i // 4}.png", "question": QUESTIONS[i % 4], "answer": answer} for i, answer in enumerate(expected)
    ]
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return data


@pytest.fixture
def evaluated(capsys: pytest.CaptureFixture[str]) -> Evaluated:
    """Run the command with ``--json`` and return the result."""

    def run(*arguments: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        given = [*map(str, arguments), "--json", "--max-new-tokens", str(TOKENS)]
        assert main(given) == code
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def test_figures(tiny_bundle: Path, samples: Path, answers: list[str], evaluated: Evaluated) -> None:
    result = evaluated(tiny_bundle, samples)
    assert [case["answer"] for case in result["cases"]] == answers
    exact = result["accuracy"]["exact"]
    assert (exact["count"], exact["total"], exact["share"]) == (6, 8, 0.75)
    assert result["accuracy"]["contains"]["count"] >= 6
    assert [case["is_right"]["exact"] for case in result["cases"]] == [True] * 6 + [False] * 2
    assert [case["is_follow_up"] for case in result["cases"]] == [False, True, True, True] * 2
    assert (result["first"]["total"]["count"], result["follow_up"]["TTFT"]["count"]) == (2, 6)
    assert {"image decode", "preprocess", "vision", "prefill", "TTFT", "total"} <= set(result["first"])
    for stages in (result["first"], result["follow_up"]):
        assert all(0 <= one["p50"] <= one["p95"] <= one["p99"] for one in stages.values())
        assert stages["TTFT"]["p50"] <= stages["total"]["p50"]
    confidences = [case["confidence"] for case in result["cases"]]
    assert sum(bin["count"] for bin in result["calibration"]["bins"]) == 8
    assert sum(bin["count"] * bin["confidence"] for bin in result["calibration"]["bins"]) == pytest.approx(
        sum(confidences)
    )
    assert (result["late"], result["comparison"], result["judged_by"]) == (0, None, "exact")
    assert (result["schema"], result["schema_version"], result["data"]) == ("fusion-eval", 1, samples.name)


def test_limit_and_query_length(tiny_bundle: Path, samples: Path, evaluated: Evaluated) -> None:
    result = evaluated(tiny_bundle, samples.parent, "--limit", 3, "--query-len", 4)
    assert len(result["cases"]) == 3
    assert result["settings"]["query_length"] == 4


def test_bundle_agrees_with_itself(tiny_bundle: Path, samples: Path, evaluated: Evaluated) -> None:
    comparison = evaluated(tiny_bundle, samples, "--reference", tiny_bundle)["comparison"]
    assert comparison["same_answer"]["share"] == comparison["same_token"]["share"] == 1
    assert comparison["kl_first_token"] == comparison["kl_per_position"] == 0


def test_quantization_against_the_checkpoint(
    tiny_bundle: Path, tiny_checkpoint: Path, samples: Path, evaluated: Evaluated
) -> None:
    result = evaluated(tiny_bundle, samples, "--reference", tiny_checkpoint)
    comparison = result["comparison"]
    assert 0 < comparison["kl_first_token"] < 1
    divergences = [value for case in result["cases"] for value in case["comparison"]["kl_divergences"]]
    assert comparison["kl_per_position"] == pytest.approx(np.mean(divergences))
    assert comparison["same_token"]["total"] == len(divergences)
    assert comparison["reference"]["precision"] == "fp32"


def test_a_checkpoint_is_evaluated(tiny_checkpoint: Path, samples: Path, evaluated: Evaluated) -> None:
    result = evaluated(tiny_checkpoint, samples, "--limit", 1)
    assert (result["model"]["precision"], result["model"]["device"]) == ("fp32", "eager")


def test_table(tiny_bundle: Path, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [tiny_bundle, samples, "--max-new-tokens", TOKENS, "--deadline", 60, "--reference", tiny_bundle]
    assert main(list(map(str, command))) == 0
    table = capsys.readouterr().out
    assert re.search(r"accuracy, exact +75\.0% +40\.9% to 92\.9% +6 of 8\n", table)
    assert re.search(r"same answer as the reference +100\.0%", table)
    assert re.search(r"KL divergence, first token +0 nats\n", table)
    assert re.search(r"later than the deadline of 60 s +0\n", table)
    assert re.search(r"follow-up question about the same image +p50 +p95 +p99 +count\n", table)


def test_more_threads_than_processors(tiny_bundle: Path, refused: Callable[..., str]) -> None:
    message = refused(main, tiny_bundle, "unread.jsonl", "--threads", 100000, code=2)
    assert message.startswith("error: --threads is 100000; choose at most ")


def test_least_accuracy(tiny_bundle: Path, samples: Path, refused: Callable[..., str], evaluated: Evaluated) -> None:
    options = ("--max-new-tokens", TOKENS, "--min-accuracy")
    evaluated(tiny_bundle, samples, "--min-accuracy", "75%")
    message = refused(main, tiny_bundle, samples, *options, "75.1", code=6)
    assert message == "error: 6 of 8 answers are right (exact, 75.0%); --min-accuracy expects 75.1%.\n"


def test_a_deadline_ends_answers(tiny_bundle: Path, samples: Path, evaluated: Evaluated) -> None:
    result = evaluated(tiny_bundle, samples, "--deadline", 1e-6)
    assert result["late"] == 8
    assert result["accuracy"]["exact"]["count"] == 0
    assert result["calibration"] == {"error": 0, "bins": []}
    assert {case["confidence"] for case in result["cases"]} == {None}


def test_page(tiny_bundle: Path, samples: Path, tmp_path: Path, evaluated: Evaluated) -> None:
    page = tmp_path / "report.html"
    evaluated(tiny_bundle, samples, "--html", page, "--reference", tiny_bundle)
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "&lt;script&gt;alert" in text
    assert "Is &lt;b&gt;it&lt;/b&gt; &amp; clear?" in text
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert len(pictures) == 2  # the wrong answers; right ones equal the reference's
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\(|@import|<script", text)
    assert "2 of 8 answers are wrong" in text


def test_page_without_wrong_answers(tiny_bundle: Path, samples: Path, tmp_path: Path, evaluated: Evaluated) -> None:
    evaluated(tiny_bundle, samples, "--html", tmp_path / "r.html", "--limit", 1)
    assert "Every answer is right." in (tmp_path / "r.html").read_text(encoding="utf-8")


CHOICES = ("yes", "no", "perhaps")


@pytest.fixture(scope="module")
def chosen(tiny_bundle: Path, data: Path) -> Path:
    """Four samples: the answers to three are the bundle's choices, the last one's is not."""
    with load(tiny_bundle) as fusion:
        best = [fusion.choose(data.parent / "0.png", question, CHOICES).text for question in QUESTIONS]
    best[3] = next(choice for choice in CHOICES if choice != best[3])
    lines = [{"image": "0.png", "question": QUESTIONS[i], "answer": best[i]} for i in range(4)]
    file = data.parent / "chosen.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return file


def test_choices(tiny_bundle: Path, chosen: Path, evaluated: Evaluated) -> None:
    result = evaluated(tiny_bundle, chosen, "--choices", ",".join(CHOICES), "--reference", tiny_bundle)
    assert result["accuracy"].keys() == {"choice"}
    assert (result["accuracy"]["choice"]["count"], result["accuracy"]["choice"]["total"]) == (3, 4)
    assert all(1 / 3 < case["confidence"] <= 1 for case in result["cases"])
    comparison = result["comparison"]
    assert comparison["same_answer"]["share"] == comparison["same_token"]["share"] == 1
    assert (comparison["kl_first_token"], comparison["same_token"]["total"]) == (0, 4)


def test_choices_against_the_checkpoint(
    tiny_bundle: Path, tiny_checkpoint: Path, chosen: Path, evaluated: Evaluated
) -> None:
    result = evaluated(tiny_bundle, chosen, "--choices", ",".join(CHOICES), "--reference", tiny_checkpoint)
    assert 0 < result["comparison"]["kl_first_token"] < 1


def test_a_deadline_before_a_choice(tiny_bundle: Path, chosen: Path, evaluated: Evaluated) -> None:
    options = ("--choices", "yes,no,perhaps", "--deadline", 1e-6, "--reference", tiny_bundle)
    result = evaluated(tiny_bundle, chosen, *options)
    assert (result["late"], result["accuracy"]["choice"]["count"], result["comparison"]) == (4, 0, None)


def test_answers_are_choices(tiny_bundle: Path, samples: Path, refused: Callable[..., str]) -> None:
    message = refused(main, tiny_bundle, samples, "--choices", "yes,no", code=2)
    assert re.match("error: Sample 1 has the answer '.*', which is none of the choices; add it to --choices", message)


def test_choices_are_judged_as_choices(tiny_bundle: Path, samples: Path, refused: Callable[..., str]) -> None:
    message = refused(main, tiny_bundle, samples, "--choices", "yes,no", "--match", "exact", code=2)
    assert "--match judges generated answers" in message


def test_own_question_as_guide_changes_nothing(
    tiny_bundle: Path, data: Path, answers: list[str], evaluated: Evaluated
) -> None:
    """Two questions about two images: each scene has the question as its guide."""
    line = [{"image": f"{i}.png", "question": QUESTIONS[0], "answer": answers[4 * i]} for i in range(2)]
    file = data.parent / "guided.jsonl"
    file.write_text("".join(f"{json.dumps(one)}\n" for one in line), encoding="utf-8")
    result = evaluated(tiny_bundle, file, "--guide", QUESTIONS[0], "--reference", tiny_bundle)
    assert result["accuracy"]["exact"]["count"] == 2
    assert result["comparison"]["kl_per_position"] < 1e-6


@pytest.mark.parametrize("guide", ["What else?", ""])
def test_guide(tiny_bundle: Path, samples: Path, guide: str, evaluated: Evaluated) -> None:
    result = evaluated(tiny_bundle, samples, "--guide", guide, "--reference", tiny_bundle)
    assert result["settings"]["guide"] == guide
    assert 0 < result["comparison"]["kl_first_token"] < 10
    assert result["first"]["look"]["count"] == 2
    assert result["follow_up"].keys() & {"look", "image decode"} == set()
    assert all(
        case["seconds"]["total"] > sum(case["seconds"].get(one, 0) for one in ("look", "prefill"))
        for case in result["cases"]
    )


def test_choices_under_a_guide(tiny_bundle: Path, chosen: Path, evaluated: Evaluated) -> None:
    options = ("--choices", ",".join(CHOICES), "--reference", tiny_bundle, "--guide", "What else?")
    assert 0 < evaluated(tiny_bundle, chosen, *options)["comparison"]["kl_first_token"] < 10


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "has no samples"),
        ('{"image": "0.png", "question": "?"}\n', "Sample 1 of .* has no answer"),
        ('{"image": "0.png", "question": "?", "answer": " "}\n', "Sample 1 of .* has no answer"),
        ('{"image": "absent.png", "question": "?", "answer": "a"}\n', "1 images of .* cannot be read: absent.png"),
        ('{"image": "0.png"}\n', "Line 1 of .* is not a sample"),
    ],
)
def test_unusable_samples(
    tiny_bundle: Path, data: Path, content: str, expected: str, refused: Callable[..., str]
) -> None:
    file = data.parent / "unusable" / "samples.jsonl"
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(file.parent / "0.png")
    file.write_text(content, encoding="utf-8")
    assert re.search(expected, refused(main, tiny_bundle, file))


def test_folder_of_images_has_no_answers(tiny_bundle: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert "has no samples" in refused(main, tiny_bundle, tmp_path)


def test_neither_bundle_nor_checkpoint(samples: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "bundle" in refused(main, tmp_path, samples)


def test_a_checkpoint_needs_torch(
    tiny_checkpoint: Path, samples: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "LIBRARIES", ("onnx", "no_such_library"))
    message = refused(main, tiny_checkpoint, samples)
    assert f"{tiny_checkpoint} is a checkpoint, which needs no_such_library; run pip install '.[calibrate]'" in message


def test_query_length_that_is_not_offered(tiny_bundle: Path, samples: Path, refused: Callable[..., str]) -> None:
    assert "Query length 9 is not offered" in refused(main, tiny_bundle, samples, "--query-len", 9, code=2)


@pytest.mark.parametrize("value", ["-1", "101", "much", "100.5"])
def test_wrong_percentage(tiny_bundle: Path, samples: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tiny_bundle), str(samples), f"--min-accuracy={value}"])
    assert ended.value.code == 2
    assert f"{value!r} is not a percentage from 0 to 100, such as 95%" in capsys.readouterr().err
