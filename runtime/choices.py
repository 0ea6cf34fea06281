"""Choices: the probabilities of given answers, scored behind one prefill."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.image_cache import CacheEntry
from fusion_edge.runtime.logprobs import LogProbabilities
from fusion_edge.runtime.pipeline import Pipeline, load_subject
from fusion_edge.runtime.prompts.prompt import Turn
from fusion_edge.runtime.requests import Color, Crops, ImageLike, PreparedQuestion
from fusion_edge.runtime.run_control import RunControl
from fusion_edge.runtime.sampling import Sampling

MAX_CHOICES = 256
"""Limit of choices of a question."""
TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The likeliest of the given answers to a question."""

    text: str
    """The likeliest choice, as it was passed; the first of equally likely ones."""
    probabilities: dict[str, float]
    """Probability of every choice, in the order of the choices. They sum to 1."""
    margin: float
    """Difference between the two largest probabilities."""
    logprobs: dict[str, float]
    """Natural logarithm of the probability that the model's answer begins with a choice. Not normalized: the sum of the
    exponentials is the probability that it begins with any of the choices."""
    prompt_tokens: int
    """Length of the prompt: text tokens, image tokens and latents."""
    timings_ms: dict[str, float]
    """Milliseconds by stage, as in :attr:`Answer.timings_ms`."""


@dataclass(frozen=True, eq=False)
class PreparedChoices:
    """A question and its choices, checked and tokenized."""

    question: PreparedQuestion
    texts: tuple[str, ...]
    sequences: tuple[TokenIds, ...]


def prepare_choices(
    pipeline: Pipeline,
    image: ImageLike | Crops | CacheEntry,
    questions: Sequence[str],
    choices: Sequence[str],
    history: Sequence[Turn] = (),
    query_length: int | None = None,
    color: Color = "rgb",
    control_tokens: bool = False,
) -> list[PreparedChoices]:
    """Check the arguments of questions about one image or scene, and tokenize prompts and choices. Runs no graph.

    Raises as :meth:`Pipeline.prepare`, :class:`UsageError` for choices that cannot be compared or no questions, and
    :class:`FusionError` for a choice longer than the rest of the context.
    """
    texts = check_choices(choices)
    if not questions:
        raise UsageError("The list of questions is empty; ask at least one.")
    subject = load_subject(image, color)

    def prepared(question: str) -> PreparedChoices:
        asked = pipeline.prepare(subject, question, history, query_length=query_length, control_tokens=control_tokens)
        layout = asked.prompt.layout(pipeline.manifest.image_side**2, asked.query_length)
        encode, room = pipeline.prompts.encode_choices, pipeline.max_context - layout.length
        sequences = encode(history, question, texts, control_tokens=control_tokens, room=room)
        check_prefixes(texts, [text.strip() for text in texts])
        check_prefixes(texts, sequences)
        sampling = Sampling(max_new_tokens=max(map(len, sequences)))
        return PreparedChoices(replace(asked, sampling=sampling), texts, tuple(sequences))

    return [prepared(question) for question in questions]


def choose(pipeline: Pipeline, prepared: PreparedChoices, control: RunControl) -> Choice:
    """Score the choices behind one prefill. Call it in the queue."""
    before, hook = dict(control.timings_ms), control.stage_hook
    length, _, logits = pipeline.run_prompt(prepared.question, hook)
    logprobs = score(
        prepared.sequences,
        logits,
        step=lambda token: pipeline.step(token, hook),
        rewind=lambda tokens: pipeline.backend.rewind(length + tokens),
    )
    timings = {name: ms - before[name] for name, ms in control.timings_ms.items()}
    return likeliest(prepared.texts, logprobs, length, timings)


def likeliest(
    choices: Sequence[str], logprobs: Sequence[float], prompt_tokens: int, timings_ms: dict[str, float]
) -> Choice:
    """Return the choice for the log-probability of each of the ``choices``.

    Raises :class:`FusionError` if no choice is possible.
    """
    largest = max(logprobs)
    if largest == -math.inf:
        raise FusionError(
            "The model gives every choice the probability 0: the bundle overflows on this device; export it with a "
            "higher precision."
        )
    weights = [math.exp(logprob - largest) for logprob in logprobs]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    best, second = sorted(probabilities, reverse=True)[:2]
    return Choice(
        text=choices[logprobs.index(largest)],
        probabilities=dict(zip(choices, probabilities, strict=True)),
        margin=best - second,
        logprobs=dict(zip(choices, logprobs, strict=True)),
        prompt_tokens=prompt_tokens,
        timings_ms=timings_ms,
    )


def score(
    sequences: Sequence[TokenIds],
    logits: Floats,
    step: Callable[[int], Floats],
    rewind: Callable[[int], None],
) -> list[float]:
    """Return the log-probability of each token sequence behind a prompt.

    A sequence's probability is the product of its tokens' probabilities. No sequence may be a prefix of another. Common
    first tokens run once, and no last token runs: every inner node of the sequences' trie is one step.

    Args:
        sequences: Token ids, at least one each.
        logits: ``[V]``, of the prompt's last token.
        step: Appends a token and returns its logits ``[V]``.
        rewind: Drops the tokens after the first ``n`` behind the prompt.
    """
    scores = [0.0] * len(sequences)
    waiting: list[tuple[int, int, list[int]]] = []  # tokens before a step, its token, and the sequences that go on

    def branch(members: Sequence[int], depth: int, logits: Floats) -> None:
        """Add the log-probabilities of the tokens at ``depth``."""
        logprobs = LogProbabilities(logits)
        branches: dict[int, list[int]] = {}
        for member in members:
            token = sequences[member][depth]
            scores[member] += logprobs[token]
            branches.setdefault(token, []).append(member)
        for token, group in branches.items():
            if longer := [member for member in group if len(sequences[member]) > depth + 1]:
                waiting.append((depth, token, longer))

    branch(range(len(sequences)), 0, logits)
    length = 0
    while waiting:  # depth first: what precedes the last one's token is the start of the present sequence
        depth, token, members = waiting.pop()
        if depth < length:
            rewind(depth)
        branch(members, depth + 1, step(token))
        length = depth + 1
    return scores


def check_choices(choices: object) -> tuple[str, ...]:
    """Return a copy of the choices. Raise :class:`UsageError` unless they are 2 to :data:`MAX_CHOICES` strings."""
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise UsageError(f"The choices are {short_repr(choices)}; expected a list of strings.")
    texts: list[str] = []
    for choice in choices:
        if not isinstance(choice, str):
            raise UsageError(f"The choice {short_repr(choice)} is of type {type(choice).__name__}; expected a string.")
        texts.append(choice)
    if len(texts) < 2:
        raise UsageError(f"The choices are {short_repr(choices)}; expected at least two.")
    if len(texts) > MAX_CHOICES:
        raise UsageError(f"There are {len(texts)} choices; expected at most {MAX_CHOICES}.")
    return tuple(texts)


def check_prefixes(choices: Sequence[str], parts: Sequence[str] | Sequence[TokenIds]) -> None:
    """Raise :class:`UsageError` if the text or tokens of a choice are the start of another's."""
    order = sorted(zip(parts, choices, strict=True))
    for (part, choice), (following, other) in pairwise(order):  # sorted, a part precedes what it begins
        if part == following:
            raise UsageError(f"The choices {short_repr(choice)} and {short_repr(other)} are equal; drop one.")
        if part == following[: len(part)]:
            raise UsageError(
                f"The choice {short_repr(choice)} is the start of {short_repr(other)}, so their probabilities are not "
                "comparable; word one of them differently."
            )
