"""Grammars compiled for a tokenizer, with llguidance."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.tokenization.token_bytes import token_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_CACHED = 16
_MAX_LEXER_STATES = 100_000  # about 100 MB
_MAX_ITEMS = 10_000  # alternatives that the parser follows at once


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the latest ones. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], vocab_size: int) -> None:
        """Compile nothing yet: the first grammar imports llguidance and reads the vocabulary.

        Args:
            tokenizer: The bundle's tokenizer.
            end_ids: Tokens that end an answer.
            vocab_size: Number of logits.
        """
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._vocab_size = vocab_size
        self._lock = Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def start(self, grammar: Grammar) -> Constraint:
        """Return the constraint of a new answer.

        Raises:
            UsageError: llguidance refuses the grammar, or no text fits it.
            FusionError: llguidance is not installed.
        """
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Constraint(self._compiled[grammar].deep_copy(), grammar, self._end_ids, self._vocab_size)

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary(self._tokenizer, self._end_ids, self._vocab_size)

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise FusionError(
                "Grammars need llguidance; run pip install '.[constrained]' in a clone of fusion-edge."
            ) from None
        return LLTokenizer(TokenizerWrapper(self._vocabulary), eos_token=self._vocabulary.special_token_ids)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        matcher = _matcher(self._ll_tokenizer, grammar)
        first = matcher.deep_copy()
        first.compute_bitmask()
        _check(first, grammar)
        if self._vocabulary.drops_first_space:  # answers begin with tokens such as "▁yes"
            return _matcher(self._ll_tokenizer, grammar, start='" "? answer')
        return matcher


class Constraint:
    """What may follow in one answer."""

    def __init__(self, matcher: LLMatcher, grammar: Grammar, end_ids: frozenset[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._grammar = grammar
        self._end_ids = end_ids
        self._allowed = np.zeros((vocab_size + 31) // 32, np.int32)  # a bit a token
        self._masked = np.empty(vocab_size, np.float32)

    def mask(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return ``logits`` ``[V]`` with minus infinity for each forbidden token. The next call overwrites the result.

        End tokens are allowed where the answer may end, and they alone where nothing else fits. NaN stays NaN.

        Raises:
            UsageError: The grammar turns out to be too complex.
        """
        self._matcher.unsafe_compute_mask_ptr(self._allowed.ctypes.data, self._allowed.nbytes)
        _check(self._matcher, self._grammar)
        allowed = np.unpackbits(self._allowed.view(np.uint8), count=len(self._masked), bitorder="little")
        # Bounds of plus and minus infinity: without branches, which masks of half the vocabulary would mispredict.
        np.subtract(allowed, np.float32(0.5), out=self._masked)
        np.multiply(self._masked, np.float32(np.inf), out=self._masked)
        return np.minimum(self._masked, logits, out=self._masked)

    def accept(self, token: int) -> None:
        """Append an allowed token to the answer."""
        if token not in self._end_ids:
            self._matcher.consume_token(token)
            _check(self._matcher, self._grammar)


class _Vocabulary:
    """A tokenizer in llguidance's interface: the bytes of each token."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], vocab_size: int) -> None:
        found = token_bytes(tokenizer, vocab_size)
        self.tokens = found.tokens
        self.drops_first_space = found.drops_first_space
        self.special_token_ids = sorted(end_ids)
        self.eos_token_id = self.special_token_ids[0]

    def __call__(self, text: bytes) -> Sequence[int]:
        """Never called to tokenize: see ``no_forcing``."""
        raise NotImplementedError


def _matcher(tokenizer: LLTokenizer, grammar: Grammar, start: str = "answer") -> LLMatcher:
    """Compile a grammar, written in llguidance's variant of Lark. Raise :class:`UsageError` if it is refused."""
    from llguidance import LLMatcher, LLParserLimits, regex_to_lark

    if grammar.kind == "json":
        body = f"%json {grammar.source}"
    elif grammar.kind == "regex":
        body = f"/{regex_to_lark(grammar.source, 'd')}/"
    else:
        body = " | ".join(map(json.dumps, json.loads(grammar.source)))
    # Without forcing, a text that must follow may be spelled with any tokens: the model chooses them.
    lark = f'%llguidance {{"no_forcing": true}}\nstart: {start}\nanswer: {body}\n'
    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, max_items_in_row=_MAX_ITEMS, verbose_errors=False)
    matcher = LLMatcher(tokenizer, lark, log_level=0, limits=limits)
    _check(matcher, grammar)
    return matcher


def _check(matcher: LLMatcher, grammar: Grammar) -> None:
    if matcher.is_error():
        raise UsageError(f"{grammar.title} cannot be used: {_reason(matcher.get_error())}.")


def _reason(message: str) -> str:
    """Return the reason in a message of llguidance, which has many lines and quotes the grammar."""
    cause = re.search(r"^error: (.*)$", message, re.MULTILINE)
    reason = cause[1] if cause else message.splitlines()[0]
    reason = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", reason)
    reason = re.sub(r"^NoExtension.*", "no text fits it", reason)
    reason = re.sub(r"Regex is empty: .*", "no text fits its keywords", reason)
    reason = re.sub(r"^Unable to determine if regex is empty: .*", "its strings are too complex", reason)
    reason = re.sub(r"^(lexer error|Parser Error): (.*)$", r"it is too complex (\2)", reason)
    return reason.strip().rstrip(".:")
