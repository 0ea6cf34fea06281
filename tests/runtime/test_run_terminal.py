"""``fusion-run`` on a terminal: the stage, the answer, the prompt and signals."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.demo_model import PICTURE
from support.terminal import Terminal

from fusion_edge.runtime import Sampling, load

QUESTIONS = ("What?", "Where?")
LIMIT = 6
RUN = """
import sys, time
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.cli import run, stage_display
stage_display.REFRESH_SECONDS = 1e-3
"""
END = "sys.exit(run.main())"
SLOW_START = """
prefill = OnnxRuntimeBackend.prefill
OnnxRuntimeBackend.prefill = lambda *arguments: (time.sleep(0.3), prefill(*arguments))[1]
"""
ENDLESS_DECODE = """
def decode(backend, embedding):
    sys.stderr.write("<decode>")
    sys.stderr.flush()
    time.sleep(10)
OnnxRuntimeBackend.decode = decode
"""


def arguments(bundle: Path, *more: str) -> list[str | Path]:
    return [bundle, "--image", PICTURE, "--max-new-tokens", str(LIMIT), "--threads", "1", *more]


@pytest.fixture(scope="module")
def answers(tiny_bundle: Path) -> list[str]:
    """The first line of each answer of a conversation."""
    with load(tiny_bundle, threads=1) as fusion:
        conversation = fusion.conversation(PICTURE)
        return ["".join(conversation.ask(question, sampling=Sampling(max_new_tokens=LIMIT))) for question in QUESTIONS]


def test_a_stage_is_shown_until_the_text(tiny_bundle: Path, answers: list[str]) -> None:
    asked = [f"--ask={question}" for question in QUESTIONS]
    terminal = Terminal(RUN + SLOW_START + END, arguments(tiny_bundle, *asked))
    assert terminal.finish() == 0
    assert "\r\x1b[K[5/5] prefill 0 s\r\x1b[K" in terminal.printed
    assert terminal.screen == [*answers, ""]


def test_the_prompt(tiny_bundle: Path, answers: list[str]) -> None:
    """Questions, a wrong one, and the end of input."""
    terminal = Terminal(RUN + END, arguments(tiny_bundle))
    terminal.wait_for("> ")
    terminal.type(f"{QUESTIONS[0]}\n")
    terminal.wait_for("> ")
    terminal.type("why " * 600 + "\n")
    terminal.wait_for("> ")
    terminal.type(f"{QUESTIONS[1]}\n")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.finish() == 0
    first, second = QUESTIONS
    screen = terminal.screen
    assert screen[:2] + screen[4:] == [f"> {first}", answers[0], f"> {second}", answers[1], "> "]
    assert screen[3].startswith("error: The prompt has ")


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_keeps_the_text(tiny_bundle: Path, answers: list[str], number: int, code: int, said: str) -> None:
    terminal = Terminal(RUN + ENDLESS_DECODE + END, arguments(tiny_bundle, f"--ask={QUESTIONS[0]}"))
    terminal.wait_for("<decode>")
    terminal.process.send_signal(number)
    assert terminal.finish() == code
    text, message, end = terminal.screen
    assert text.endswith("<decode>")
    assert answers[0].startswith(text.removesuffix("<decode>"))
    assert len(text) > len("<decode>")
    assert (message, end) == (said, "")
    assert "Traceback" not in terminal.printed


def test_ctrl_c_ends_the_answer_and_at_the_prompt_the_command(tiny_bundle: Path) -> None:
    terminal = Terminal(RUN + ENDLESS_DECODE + END, arguments(tiny_bundle))
    terminal.wait_for("> ")
    for question in QUESTIONS:
        terminal.type(f"{question}\n")
        terminal.wait_for("<decode>")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("> ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 130
    assert terminal.screen[-2:] == ["> interrupted", ""]


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_deadline_that_is_too_short(tiny_bundle: Path, more: list[str]) -> None:
    asked = [f"--ask={QUESTIONS[0]}", "--deadline=0.2", *more]
    terminal = Terminal(RUN + SLOW_START + END, arguments(tiny_bundle, *asked))
    assert terminal.finish() == 1
    error, end = terminal.screen
    assert error.startswith("error: The deadline of 0.2 s passed ")
    assert end == ""
