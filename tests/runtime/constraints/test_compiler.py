"""Grammars on both kinds of tokenizer: exact masks, ends, valid documents, errors."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from support.tokenizer_files import LLAMA, PHI, load
from tokenizers import Tokenizer

from fusion_edge.benchmarks.random_schemas import random_schema
from fusion_edge.runtime.constraints.compiler import GrammarCompiler
from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.constraints.json_schema import KEYWORDS
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.tokenization.token_bytes import TokenBytes, token_bytes

PADDING = 13  # logits without a token, which need not be a multiple of anything
ENDS = {PHI: ("<|end|>", "<|endoftext|>"), LLAMA: ("<|eot_id|>", "<|end_of_text|>")}


@dataclass
class Model:
    """A model with random logits."""

    tokenizer: Tokenizer
    compiler: GrammarCompiler
    end_ids: frozenset[int]
    vocabulary: TokenBytes

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    def answer(self, grammar: Grammar, seed: int, limit: int = 600, liked: tuple[bytes, ...] = ()) -> str | None:
        """Return an answer; None if it does not end within ``limit`` tokens. ``liked`` tokens are likelier."""
        bias = 9 * np.array([content in liked for content in self.vocabulary.tokens], np.float32)
        source = np.random.default_rng(seed)
        constraint = self.compiler.start(grammar)
        tokens: list[int] = []
        while len(tokens) < limit:
            logits = constraint.mask(bias + source.standard_normal(self.vocab_size).astype(np.float32))
            token = int(np.argmax(logits))
            assert np.isfinite(logits[token])
            if token in self.end_ids:
                return str(self.tokenizer.decode(tokens))
            constraint.accept(token)
            tokens.append(token)
        return None

    def allowed(self, grammar: Grammar, tokens: list[int]) -> set[int]:
        """Return the tokens that may follow ``tokens``."""
        constraint = self.compiler.start(grammar)
        for token in tokens:
            constraint.mask(np.zeros(self.vocab_size, np.float32))
            constraint.accept(token)
        return set(np.flatnonzero(np.isfinite(constraint.mask(np.zeros(self.vocab_size, np.float32)))).tolist())


@pytest.fixture(scope="module", params=[PHI, LLAMA], ids=["phi", "llama"])
def model(request: pytest.FixtureRequest) -> Model:
    tokenizer = load(request.param)
    size = tokenizer.get_vocab_size() + PADDING
    ends = frozenset(found for name in ENDS[request.param] if (found := tokenizer.token_to_id(name)) is not None)
    assert ends
    return Model(tokenizer, GrammarCompiler(tokenizer, ends, size), ends, token_bytes(tokenizer, size))


@pytest.mark.parametrize(
    "texts", [("yes", "no"), ("a", "ab", "abc"), ("größe", "gr", '"', "\\", "/", "日本 🚀", "<|end|>")]
)
def test_masks_equal_a_search_through_the_vocabulary(model: Model, texts: tuple[str, ...]) -> None:
    """After every token of every spelling: exactly the tokens that lead to a choice, and the end after a choice."""
    vocabulary = model.vocabulary
    spaces = (b"", b" ") if vocabulary.drops_first_space else (b"",)
    accepted = [space + text.encode() for space in spaces for text in texts]
    grammar, checked = Grammar.choices(texts), 0
    waiting: list[list[int]] = [[]]
    while waiting and checked < 60:
        tokens = waiting.pop()
        before = b"".join(vocabulary.tokens[token] for token in tokens)
        expected = {
            token
            for token, content in enumerate(vocabulary.tokens)
            if content and token not in model.end_ids and any(text.startswith(before + content) for text in accepted)
        }
        waiting += [[*tokens, token] for token in expected]
        assert model.allowed(grammar, tokens) == expected | (model.end_ids if before in accepted else set())
        checked += 1
    assert checked > 3


def test_choices_are_all_reached_and_nothing_else(model: Model) -> None:
    texts = ("left", "right", "left turn", "Größe 🚀", '{"a": 1}')
    assert {model.answer(Grammar.choices(texts), seed) for seed in range(80)} == set(texts)


@pytest.mark.parametrize(
    "pattern",
    [r"[A-Z]{2}-\d{3}", r"(?i)yes|no", r"[a-z/]{1,9}\.?", r"-?[0-9]{1,3}(\.[0-9])?", "^a\nb$", r"[^a-z]{2,4}", "[0-9]"],
)
def test_answers_match_their_pattern(model: Model, pattern: str) -> None:
    for seed in range(20):
        text = model.answer(Grammar.regex(pattern), seed)
        assert text is not None
        # The decoder of SentencePiece drops a first space.
        assert any(re.fullmatch(pattern, space + text) for space in ("", " ")), text


@pytest.mark.parametrize("seed", range(25))
def test_documents_of_random_schemas_are_valid(model: Model, seed: int) -> None:
    schema = random_schema(seed)
    text = model.answer(Grammar.json(schema), seed)
    assert text is not None
    Draft202012Validator(schema).validate(json.loads(text, parse_constant=pytest.fail))


def test_random_schemas_are_valid_and_use_every_keyword() -> None:
    schemas = [random_schema(seed) for seed in range(300)]
    for schema in schemas:
        Draft202012Validator.check_schema(schema)
    text = json.dumps(schemas)
    numbers = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
    texts = ("minLength", "maxLength", "pattern", "format", "enum", "const")
    parts = ("items", "prefixItems", "minItems", "maxItems", "required", "anyOf", "$ref", "$defs")
    assert all(f'"{keyword}"' in text for keyword in (*numbers, *texts, *parts))


ODD: list[Any] = [None, True, False, 0, -1, 2, 0.5, 1e30, "", "a", "[", "date", "null", "#/$defs/a", [], ["string"]]
ODD += [["number", "null"], {}, {"type": "null"}, [{"type": "null"}], {"a": {"type": "boolean"}}, [1, "1"]]
NAMES = ["type", "enum", "const", "anyOf", "$ref", *(name for names in KEYWORDS.values() for name in names)]


def places(node: Any) -> Iterator[Any]:
    """Yield every object and list of a schema."""
    if isinstance(node, dict | list):
        yield node
        for part in node.values() if isinstance(node, dict) else node:
            yield from places(part)


@pytest.mark.parametrize("seed", range(40))
def test_mutants_of_schemas_are_refused_or_give_valid_documents(model: Model, seed: int) -> None:
    source = random.Random(seed)
    schema = random_schema(seed)
    for _ in range(source.randint(1, 2)):
        place = source.choice(list(places(schema)))
        keys = [*place, source.choice(NAMES)] if isinstance(place, dict) else list(range(len(place)))
        if keys:
            place[source.choice(keys)] = copy.deepcopy(source.choice(ODD))
    try:
        text = model.answer(Grammar.json(schema), seed, limit=150)
    except UsageError:
        return
    if text is not None:  # else the mutant has no bounds
        Draft202012Validator(schema).validate(json.loads(text, parse_constant=pytest.fail))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number"},
        {"type": "integer"},
        {"type": "number", "exclusiveMinimum": 0.3, "exclusiveMaximum": 0.31},
        {"type": "number", "minimum": -1e12, "exclusiveMaximum": -1},
        {"type": "integer", "minimum": 2**53 - 10},
        {"type": "number", "multipleOf": 0.01, "maximum": 3, "minimum": -3},
        {"enum": [0.1, 123456.789012345, 1e-7, -0.0, 2**53 - 1, 1e15, 12345678901234.5]},
    ],
)
def test_numbers_are_short_finite_and_in_range(model: Model, schema: dict[str, Any]) -> None:
    for seed in range(40):
        text = model.answer(Grammar.json(schema), seed)
        assert text is not None
        assert len(text) <= 20
        value = json.loads(text, parse_constant=pytest.fail)
        if "multipleOf" in schema:
            assert abs(value * 100 - round(value * 100)) < 1e-9
        else:
            Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            r'^[^"]*$',
            r"^[^\\]+$",
            r"^[^\x22\x5c]{1,3}$",
            r"^[^ -~]{2}$",
            r"^[\x00-\x20a-z]+$",
            "^(?:[\x00-\x1f]|[a-z])+$",
        ),
        *("^.{1,3}$", r"^\S+$", "a", "^a|b$", "^(left|right)( turn)?$", "^[A-Zäöü]+/$", ""),
    ],
)
@pytest.mark.parametrize("limits", [{}, {"minLength": 2}, {"type": ["string", "null"]}])
def test_strings_match_their_pattern(model: Model, pattern: str, limits: dict[str, Any]) -> None:
    """The string of the parsed document, also if the model prefers escapes; other types need not match."""
    schema = {"type": "string", "pattern": pattern, "maxLength": 6} | limits
    grammar = Grammar.json(schema)
    texts = [model.answer(grammar, seed, 100, liked=(b"\\", b'"', b'\\"', b"\\\\")) for seed in range(8)]
    texts += [model.answer(grammar, seed, 100) for seed in range(4)]
    for text in texts:
        assert text is not None
        Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("bounds", [(1, 1.823), (-0.5, 0), (0, 0.25), (-2, -1.5), (0.3, 0.30001)])
def test_exclusive_bounds_are_never_reached(model: Model, bounds: tuple[float, float]) -> None:
    """Also if the model prefers to end soon, as with ``-0`` and ``1``."""
    grammar = Grammar.json({"type": "number", "exclusiveMinimum": bounds[0], "exclusiveMaximum": bounds[1]})
    for seed in range(30):
        text = model.answer(grammar, seed, liked=(b"", b"-", b"0") if seed % 2 else (b"", b"-", b"0", b"1", b"2"))
        assert text is not None
        assert bounds[0] < json.loads(text) < bounds[1], text


def test_strings_are_valid_unicode(model: Model) -> None:
    """Escapes too: no half of a surrogate pair, no control character as itself."""
    grammar = Grammar.json({"type": "string", "minLength": 9, "maxLength": 9})
    texts = [model.answer(grammar, seed, liked=(b"\\", b"u")) for seed in range(60)]
    for text in texts:
        assert text is not None
        value = json.loads(text)  # refuses control characters
        assert len(value) == 9
        value.encode()  # refuses surrogates
    assert any("\\u" in str(text) for text in texts)


def test_whitespace_is_bounded(model: Model) -> None:
    """A model that prefers spaces writes at most one after a comma or colon, and one before the answer."""
    schema = {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}}
    grammar = Grammar.json(schema | {"minItems": 2, "maxItems": 2})
    constraint, written = model.compiler.start(grammar), ""
    vocabulary = model.vocabulary
    spaces = np.array([content.count(b" ") for content in vocabulary.tokens], np.float32)
    for _ in range(100):
        token = int(np.argmax(constraint.mask(spaces)))
        if token in model.end_ids:
            break
        constraint.accept(token)
        written += vocabulary.tokens[token].decode()
    assert written.lstrip() == '[{"a": null}, {"a": null}]'
    assert len(written) - len(written.lstrip()) == vocabulary.drops_first_space


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.regex("("), "unclosed group"),
        (Grammar.regex("a(?=b)"), "look-around, including look-ahead and look-behind, is not supported"),
        (Grammar.regex(r"(a)\1"), "backreferences are not supported"),
        (Grammar.regex(r"(?-u:\xff)"), "pattern can match invalid UTF-8"),
        (Grammar.regex(r"[^\s\S]"), "no text fits it"),
        (Grammar.json({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable schema: minimum (3) is greater"),
        (Grammar.json({"type": "string", "pattern": "(?!a)"}), "look-around"),
        (Grammar.json({"type": "string", "minLength": 3, "maxLength": 2}), "Unsatisfiable schema"),
        (Grammar.json({"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 2}), "Unsatisfiable"),
        (Grammar.json({"type": "string", "enum": [1]}), "Unsatisfiable schema"),
        (Grammar.json({"enum": ["a", "b"], "const": "c"}), "no text fits its keywords."),
        (Grammar.json({"type": "string", "pattern": '^"$'}), "no text fits its keywords."),
        (Grammar.json({"type": "string", "format": "date", "minLength": 11}), "no text fits its keywords."),
        (
            Grammar.json({"type": "string", "pattern": "(.*a.{15}b.*c.{15}d)", "maxLength": 9999}),
            "its strings are too complex.",
        ),
    ],
)
def test_unusable_grammars_are_refused_before_the_first_token(model: Model, grammar: Grammar, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(grammar.title)} cannot be used: .*{re.escape(reason)}"):
        model.compiler.start(grammar)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a{1000}){1000}", "(?:a?){500}a{500}", "[ab]*a[ab]{200}", "(.*a.{15}b.*c.{15}d)", "(x+x+)+y", ".{100000}"),
        *(r"(\w+\s?){1,1000}", "(?:.{0,2000}a){50}", "(([a-z]{1,50}){1,50}){1,50}", "(" * 200 + "a" + ")" * 200),
    ],
)
def test_patterns_of_exponential_size_end_in_time(model: Model, pattern: str) -> None:
    """They either work or are refused as too complex; backtracking engines need hours for some."""
    reason = "is too complex"
    try:
        model.answer(Grammar.regex(pattern), seed=0, limit=200)
    except UsageError as error:
        reason = str(error)
    assert "is too complex" in reason


def test_a_grammar_is_compiled_once_and_threads_share_it(model: Model) -> None:
    compiler = GrammarCompiler(model.tokenizer, model.end_ids, model.vocab_size)
    first = Grammar.choices(["yes"])
    answers: list[str | None] = []
    shared = Model(model.tokenizer, compiler, model.end_ids, model.vocabulary)
    threads = [threading.Thread(target=lambda: answers.append(shared.answer(first, 0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["yes"] * 4
    compiled = compiler._compiled[first]
    for n in range(15):
        compiler.start(Grammar.choices([str(n)]))
    compiler.start(first)
    assert compiler._compiled[first] is compiled
    for n in range(16, 32):
        compiler.start(Grammar.choices([str(n)]))
    assert first not in compiler._compiled
    assert len(compiler._compiled) == 16


def test_constraints_of_one_grammar_are_independent(model: Model) -> None:
    grammar = Grammar.choices(["yes", "no"])
    [*yes] = model.tokenizer.encode("yes", add_special_tokens=False).ids
    one, two = model.compiler.start(grammar), model.compiler.start(grammar)
    zeros = np.zeros(model.vocab_size, np.float32)
    before = two.mask(zeros).copy()
    for token in yes:
        one.mask(zeros)
        one.accept(token)
    assert np.array_equal(two.mask(zeros), before)


def test_masked_logits_are_the_logits_or_minus_infinity(model: Model) -> None:
    logits = np.random.default_rng(0).standard_normal(model.vocab_size).astype(np.float32)
    logits[7], logits[8] = np.nan, np.inf  # of a bundle that overflows
    constraint = model.compiler.start(Grammar.regex("[a-z]+"))
    allowed = list(model.allowed(Grammar.regex("[a-z]+"), []))
    masked = constraint.mask(logits).copy()
    assert np.array_equal(masked[allowed], logits[allowed])
    assert np.isnan(masked[7])
    forbidden = np.setdiff1d(np.arange(model.vocab_size), [*allowed, 7])
    assert 8 in forbidden
    assert np.all(masked[forbidden] == -np.inf)


def test_a_missing_package_is_named(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(model.tokenizer, model.end_ids, model.vocab_size)
    with pytest.raises(FusionError, match=r"^Grammars need llguidance; run pip install '\.\[constrained\]' in a clone"):
        compiler.start(Grammar.choices(["yes"]))
