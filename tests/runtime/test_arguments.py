"""Wrong types of numbers, texts and options, in every public function."""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.fake_backend import FakeBackend

from fusion_edge.runtime import Fusion, FusionError, Sampling, Turn, UsageError, load
from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.sampling import Sampler
from fusion_edge.runtime.tokenization.detokenizer import Detokenizer
from fusion_edge.runtime.tokenization.embeddings import Embeddings

PICTURE = np.zeros((5, 7, 3), np.uint8)
SHORT = Sampling(max_new_tokens=4)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


NO_INTEGERS = (
    *(4.0, np.float32(4), True, np.True_, float("nan"), float("inf"), "4", b"4", [4], (4,), {4}, 4j, 1e400),
    *(np.array(4), np.array([4]), decimal.Decimal(4), fractions.Fraction(4), object(), Unprintable(), int, 0.5),
)
NO_NUMBERS = (
    *(True, np.True_, float("nan"), float("inf"), -float("inf"), np.float32("nan"), 10**400, -(10**400), "1", b"1"),
    *([1], 1j, np.array(1.0), decimal.Decimal(1), object(), Unprintable(), float, 10**5000),
)


@pytest.fixture(scope="module")
def fusion(tiny_bundle: Path) -> Iterator[Fusion]:
    with load(tiny_bundle, threads=1) as loaded:
        yield loaded


def refused(call: Any, beginning: str) -> None:
    """Assert that a call raises a ``UsageError`` with one line that starts with ``beginning``."""
    with pytest.raises(UsageError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(beginning)
    assert len(message.splitlines()) == 1
    assert len(message) < 400


@pytest.mark.parametrize("field", ["max_new_tokens", "top_k", "seed"])
def test_integers_of_sampling(field: str) -> None:
    for wrong in (*NO_INTEGERS, -1, -(10**5000)):
        refused(lambda wrong=wrong: Sampling(**{field: wrong}), f"{field} is ")
    for right in (4, np.int8(4), np.uint64(4), np.int64(4)):
        value = getattr(Sampling(**{field: right}), field)  # type: ignore[arg-type]
        assert (type(value), value) == (int, 4)
    assert getattr(Sampling(**{field: 10**5000}), field) == 10**5000  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["temperature", "top_p"])
def test_floats_of_sampling(field: str) -> None:
    for wrong in (*NO_NUMBERS, None, -1, -1e-9):
        refused(lambda wrong=wrong: Sampling(**{field: wrong}), f"{field} is ")
    for right in (1, 0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), np.int32(1), fractions.Fraction(1, 2)):
        value = getattr(Sampling(**{field: right}), field)  # type: ignore[arg-type]
        assert (type(value), value) == (float, float(right))


def test_extreme_numbers_draw_a_token(fusion: Fusion) -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    for temperature in (5e-324, 1e-310, 1e-30, 1e30, 1.7e308, np.float16(6e-8)):
        for top_p in (5e-324, 1e-9, 1.0):
            for top_k in (0, 1, 10**5000):
                sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=10**400)
                assert 0 <= Sampler(sampling)(logits) < 50
    answer = fusion.answer(PICTURE, "What?", sampling=Sampling(max_new_tokens=10**5000, temperature=1e30, seed=1))
    assert answer.prompt_tokens + len(answer.token_ids) <= fusion.max_context


@pytest.mark.parametrize(
    "stop",
    ["###", ["###"], b"###", ("",), ("ok", ""), (1,), (b"a",), (None,), None, {"a"}, iter("a"), 3, Unprintable()],
)
def test_stop_strings(stop: Any) -> None:
    refused(lambda: Sampling(stop=stop), "stop is ")


def test_a_long_stop_string_is_fast(fusion: Fusion) -> None:
    stream = Detokenizer(fusion.tokenizer, ["a" * 1_000_000, "b" * 1_000_000 + "c"])
    started = time.process_time()
    for _ in range(500):
        stream.push(fusion.tokenizer.encode("a").ids[-1])
    assert time.process_time() - started < 2


def test_query_length(fusion: Fusion, tiny_bundle: Path) -> None:
    for wrong in (*NO_INTEGERS, 0, -4, 5, 10**5000, np.int64(5)):
        refused(lambda wrong=wrong: fusion.query_length(wrong), "Query length ")
        refused(lambda wrong=wrong: fusion.answer(PICTURE, "What?", query_length=wrong), "Query length ")
        refused(lambda wrong=wrong: next(fusion.conversation(PICTURE).ask("?", query_length=wrong)), "Query length ")
    assert type(fusion.query_length(np.int64(4))) is int
    expected = fusion.answer(PICTURE, "What?", query_length=4, sampling=SHORT)
    numpys = fusion.answer(PICTURE, "What?", query_length=np.int16(4), sampling=SHORT)
    assert (numpys.token_ids, numpys.prompt_tokens) == (expected.token_ids, expected.prompt_tokens)


def test_threads(tiny_bundle: Path) -> None:
    for wrong in (*NO_INTEGERS, 0, -1, -(10**5000)):
        refused(lambda wrong=wrong: load(tiny_bundle, threads=wrong), "threads is ")
    load(tiny_bundle, threads=np.int64(1)).close()


def test_flags_of_load(tiny_bundle: Path) -> None:
    for name in ("spin", "preload", "lock_memory"):
        for wrong in (0, 1, None, "yes", np.True_):
            arguments: Any = {name: wrong}
            refused(lambda arguments=arguments: load(tiny_bundle, **arguments), f"{name} is ")


@pytest.mark.parametrize("device", [None, 3, b"cpu", ["cpu"], "CPU", "", Unprintable])
def test_devices(tiny_bundle: Path, device: Any) -> None:
    refused(lambda: load(tiny_bundle, device=device), "Unknown device ")


class PathOfBytes(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"bundle"


@pytest.mark.parametrize("folder", [None, 3, b"bundle", ["bundle"], PathOfBytes(), Unprintable()])
def test_folders(folder: Any) -> None:
    refused(lambda: load(folder), "The bundle is of type ")


def test_paths_that_are_not_valid_text(tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff"))
    copy.symlink_to(tiny_bundle)
    missing = Path(os.fsdecode(os.fsencode(tmp_path) + b"/missing\xff"))
    for path in (copy, missing):
        with pytest.raises(FusionError, match="is not UTF-8, and ONNX Runtime opens no other paths; rename the folder"):
            load(path)
        assert cli_run.main([str(path), "--image", "x.png", "--ask", "What?"]) == 1
        assert capsys.readouterr().err.startswith("error: The bundle's path ")
    for text in ("nul\0", "x" * 5000, ""):
        with pytest.raises(FusionError):
            load(text)
    options = [str(tiny_bundle), "--image", "x.png", "--ask", "What?", "--history"]
    assert cli_run.main([*options, str(missing)]) == 1
    assert "Cannot read the history in " in capsys.readouterr().err


@pytest.mark.parametrize(
    "history",
    [
        *("ab", b"ab", 3, None, {}, {"question": "a"}, {Turn("a", "b")}, iter([Turn("a", "b")]), np.array([1])),
        *([("a", "b")], [Turn("a", "b"), None], (Turn("a", "b"), "b"), Turn("a", "b"), [Unprintable()], [10**5000]),
        (turn for turn in [Turn("a", "b")]),
    ],
)
def test_histories(fusion: Fusion, history: Any) -> None:
    refused(lambda: fusion.answer(PICTURE, "What?", history=history), "The history is ")


@pytest.mark.parametrize("text", [None, 3, b"What?", ["What?"], np.array("What?"), Unprintable()])
def test_texts(fusion: Fusion, text: Any) -> None:
    for history, question in (([], text), ([Turn(text, "b")], "What?")):
        refused(lambda h=history, q=question: fusion.answer(PICTURE, q, history=h), "The question is of type ")
        refused(lambda h=history, q=question: fusion.stream(PICTURE, q, history=h), "The question is of type ")
    refused(lambda: fusion.ask(PICTURE, "What?", history=[Turn("a", text)]), "An answer in the history is of type ")
    conversation = fusion.conversation(PICTURE)
    refused(lambda: conversation.answer(text), "The question is of type ")
    conversation.history.append(text)
    refused(lambda: conversation.answer("What?"), "The history is ")


def test_tuples_and_numpy_strings_are_accepted(fusion: Fusion) -> None:
    turns = [Turn("a", "b")]
    expected = fusion.answer(PICTURE, "What?", history=turns, sampling=SHORT).token_ids
    assert fusion.answer(PICTURE, np.str_("What?"), history=tuple(turns), sampling=SHORT).token_ids == expected


@pytest.mark.parametrize("sampling", ["greedy", 0, {"temperature": 1}, Sampling, Unprintable()])
def test_wrong_types_of_sampling(fusion: Fusion, sampling: Any) -> None:
    refused(lambda: fusion.stream(PICTURE, "What?", sampling=sampling), "sampling is of type ")
    refused(lambda: fusion.conversation(PICTURE).answer("What?", sampling=sampling), "sampling is of type ")


def test_values_are_formatted_on_one_short_line() -> None:
    assert short_repr(3) == "3"
    assert short_repr("a\nb") == r"'a\nb'"
    assert short_repr(np.eye(2)) == "array([[1., 0.], [0., 1.]])"
    assert short_repr(Unprintable()) == "of type Unprintable"
    assert len(short_repr("x" * 10**6)) == 83
    assert "\n" not in short_repr(10**5000)


def test_the_templates_end_of_turn_ends_an_answer(tiny_bundle: Path) -> None:
    """Even if the checkpoint names only other end tokens, or one outside the vocabulary."""
    bundle = open_bundle(tiny_bundle)
    with load(tiny_bundle, threads=1) as loaded:
        tokenizer = loaded.tokenizer
    config = bundle.manifest.model
    end = tokenizer.token_to_id(TEMPLATES[config.template].answer_end)

    class EndsAtOnce(FakeBackend):
        def decode(self, embedding: Any) -> Any:
            logits = super().decode(embedding)
            logits[end] = logits.max() + 1
            return logits

    for ids in ((), (config.language.vocab_size + 5,), (2,)):
        manifest = dataclasses.replace(bundle.manifest, model=dataclasses.replace(config, eos_token_ids=ids))
        fusion = Fusion(manifest, EndsAtOnce(config), tokenizer, Embeddings(bundle))
        answer = fusion.answer(PICTURE, "What?", sampling=Sampling(max_new_tokens=9))
        assert (len(answer.token_ids), answer.finish_reason) == (1, "stop")


def test_a_token_id_outside_the_embedding_table(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    rows = bundle.manifest.model.language.vocab_size
    with pytest.raises(FusionError, match=f"gives ids up to {rows} and the token table has {rows} rows"):
        Embeddings(bundle)(np.array([0, rows]))
