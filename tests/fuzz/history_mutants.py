"""Mutate questions, histories and sampling: text of every kind, values of every type."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from fusion_edge.runtime import Fusion, Sampling, Turn, load
from fusion_edge.runtime.bundle.templates import TEMPLATES, Template
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.prompts.prompt import ContextBudget, PromptEncoder
from fuzz.bundle_mutants import Bundles
from fuzz.judge import GROWTH, SECONDS, Mutant
from fuzz.mutations import NUMBERS, TEXTS, mutate_json, mutate_text, replace, to_json_bytes, value

CONTROL = (
    "<|end|>", "<|assistant|>", "<|user|>", "<|system|>", "<image>", "<latent_image>", "<vision_start>", "<vision_end>",
    "<|eot_id|>", "<|start_header_id|>", "<s>", "</s>", "<unk>", "<0x0A>", "<pad>", "<|", "|>", "<ima<image>ge>",
)  # fmt: skip
RANGES = ((0, 32), (32, 127), (128, 0x250), (0x300, 0x370), (0x590, 0x700), (0x2000, 0x2070), (0x2580, 0x2590),
          (0x4E00, 0x9FFF), (0xD800, 0xE000), (0xE000, 0xE100), (0xFE00, 0xFE10), (0xFFF0, 0x10000),
          (0x1F300, 0x1FAFF), (0xE0000, 0xE0080), (0x10FFF0, 0x110000))  # fmt: skip
LENGTHS = (100, 1000, 5000, 100_000, 1_000_000)
OPTIONS = ("--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--stop", "--query-len", "--threads")


class Histories:
    """See :class:`fuzz.judge.Kind`."""

    share = 22
    batch = 500
    seconds = SECONDS
    growth = GROWTH

    def __init__(self) -> None:
        self._bundles = Bundles()
        self._fusion: Fusion | None = None

    def prepare(self, folder: Path) -> None:
        self._bundles.prepare(folder)

    def fusion(self) -> Fusion:
        """Return the model, loaded once per process: sessions do not survive a fork."""
        if self._fusion is None:
            self._fusion = load(self._bundles.bases[0], device="cpu", threads=1)
        return self._fusion

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        fusion = self.fusion()
        if draw is None:
            return self._answer("What is it?", [Turn("Is it?", "Yes.")], {"max_new_tokens": 2}, ())
        what = draw.random()
        if what < 0.15:
            return self._command(draw, folder)
        question = text(draw) if draw.random() < 0.95 else value(draw)
        history = _history(draw)
        changes = (f"question {_shown(question)}", f"history {_shown(history)}")
        if what < 0.6:
            template = TEMPLATES[draw.choice(sorted(TEMPLATES))]
            return Mutant(changes, lambda: _encode(fusion, template, history, question))
        sampling = {"max_new_tokens": draw.choice([1, 1, 2]), **(_sampling(draw) if draw.random() < 0.5 else {})}
        return self._answer(question, history, sampling, (*changes, f"sampling {_shown(sampling)}"))

    def _answer(self, question: Any, history: Any, sampling: dict[str, Any], changes: tuple[str, ...]) -> Mutant:
        def run() -> None:
            chosen = Sampling(**sampling)
            if chosen.max_new_tokens > 3:  # answers may be long; a mutant's may not
                chosen = Sampling(**(sampling | {"max_new_tokens": 3}))
            self.fusion().answer(str(self._bundles.picture), question, history=history, sampling=chosen)

        return Mutant(changes, run)

    def _command(self, draw: Random, folder: Path) -> Mutant:
        """Run ``fusion-run`` with a history from a file and values as text."""
        path = folder / "history.json"
        turns: Any = [{"question": text(draw), "answer": text(draw)} for _ in range(draw.choice([0, 1, 2, 40]))]
        change = ""
        if draw.random() < 0.7:
            turns, change = mutate_json(draw, turns)
        content, written = to_json_bytes(draw, turns)
        replace(path, content)
        question = text(draw).replace("\0", "")[:30_000]  # no argument holds a zero byte
        arguments = [str(self._bundles.bases[0]), "--image", str(self._bundles.picture), f"--ask={question}"]
        arguments += ["--threads=1", "--max-new-tokens=1"] + ["--history", str(path)] * (draw.random() < 0.7)
        if draw.random() < 0.5:
            option = draw.choice(OPTIONS)
            number = str(draw.choice([*NUMBERS, *TEXTS[:14]])).replace("\0", "")
            if option not in ("--max-new-tokens", "--threads") or not number.lstrip("+ ").isdecimal():
                arguments.append(f"{option}={number}")
        changes = (f"history{change}{written}", *(_shown(argument) for argument in arguments[3:]))
        return Mutant(changes, lambda: cli_run.main(arguments))


def _encode(fusion: Fusion, template: Template, history: Any, question: Any) -> None:
    room = ContextBudget(fusion.max_context, image_tokens=16, query_length=4)
    PromptEncoder(fusion.tokenizer, template).encode(history, question, budget=room).layout(16, 4)


def text(draw: Random) -> str:
    """Return a question or answer: plain, of any characters, of control tokens, or far too long."""
    what = draw.randrange(10)
    if what == 0:
        return draw.choice(TEXTS)
    if what == 1:
        return "".join(draw.choice(CONTROL) for _ in range(draw.randrange(6)))
    if what <= 3:
        return mutate_text(draw, f"What is {draw.choice(CONTROL)} in the picture?")
    if what == 4:
        unit = draw.choice(
            ["a", " ", "\n", "é", "😀", "\u200b", "\u0301", "<image>", "<|end|>", "<", "▁", "ab c", "\ufdfa"]
        )
        return unit * (draw.choice(LENGTHS) // len(unit))
    if what == 5:
        low, high = draw.choice(RANGES)
        return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(200)))
    characters = [chr(draw.randrange(*draw.choice(RANGES))) for _ in range(draw.randrange(40))]
    return "".join(characters) + draw.choice(["", "?", *CONTROL])


def _history(draw: Random) -> Any:
    what = draw.randrange(12)
    if what == 0:
        return value(draw)
    if what == 1:
        return [
            draw.choice([Turn(value(draw), "x"), Turn("x", value(draw)), ("a", "b"), {"question": "a", "answer": "b"}])
        ]
    if what == 2:
        return (Turn("What?", "This."),) * draw.choice([1, 100, 1000, 20_000])
    return [Turn(text(draw), text(draw)) for _ in range(draw.choice([0, 0, 1, 1, 2, 5]))]


def _sampling(draw: Random) -> dict[str, Any]:
    values = [*NUMBERS, None, True, "x", (), ("x",), ("",), ["x"], ("\ud800",), ("x" * 100_000,)]
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    return {draw.choice(names): draw.choice(values) for _ in range(draw.choice([1, 1, 3]))}


def _shown(data: Any) -> str:
    shown = json.dumps(data, default=repr, skipkeys=True) if not isinstance(data, dict | list) else repr(data)
    return shown if len(shown) <= 120 else f"{shown[:100]}... ({len(shown)} characters)"
