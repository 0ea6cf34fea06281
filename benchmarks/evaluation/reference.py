"""The answers of a reference, and comparisons with them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np

from fusion_edge.benchmarks.evaluation.asking import Questioner, Response, model_info
from fusion_edge.benchmarks.evaluation.progress import shown
from fusion_edge.benchmarks.evaluation.result import CaseComparison, Settings
from fusion_edge.benchmarks.evaluation.teacher_forcing import LogProbabilityFile, ReferenceAnswer
from fusion_edge.runtime import Fusion
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.logprobs import divergences
from fusion_edge.runtime.samples import Sample


class Reference:
    """A reference's answers to samples. It may be closed when they are complete: a temporary file has the rest."""

    def __init__(self, fusion: Fusion, samples: Sequence[Sample], settings: Settings) -> None:
        """Ask a model every question."""
        self.model = model_info(fusion)
        self._kept = LogProbabilityFile(fusion.config.language.vocab_size)
        questioner, asked = Questioner(fusion, settings), shown("Asking the reference", samples)
        self._answers: list[ReferenceAnswer | Response] = [
            questioner.respond(sample) if settings.choices else questioner.generate(sample, self._kept)
            for sample in asked
        ]

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.close()

    def compare(self, number: int, sample: Sample, given: Response, questioner: Questioner) -> CaseComparison | None:
        """Compare a model's answer to sample ``number``; None if a deadline came before a choice.

        The log-probabilities of each of the reference's tokens are compared, or the choices' probabilities.
        """
        reference = self._answers[number]
        if isinstance(reference, Response):
            return compare_choices(given, reference)
        theirs = self._kept.read(reference.rows)
        ours = questioner.force(sample, reference.token_ids, len(reference.rows))
        return CaseComparison(
            answer=reference.text,
            is_same=given.token_ids == reference.token_ids,
            same_tokens=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
            kl_divergences=tuple(divergences(theirs, ours).tolist()),
        )


def compare_choices(given: Response, reference: Response) -> CaseComparison | None:
    """Compare the probabilities of the same choices; None without them. Every divergence is finite."""
    if not given.probabilities:
        return None
    tiny = np.finfo(np.float64).tiny  # in place of 0, whose divergence is infinite and no number in JSON
    ours, theirs = (np.log([[max(p, tiny) for p in one.probabilities.values()]]) for one in (given, reference))
    is_same = given.text == reference.text
    return CaseComparison(reference.text, is_same, int(is_same), tuple(divergences(theirs, ours).tolist()))


def vocabulary(fusion: Fusion) -> tuple[str, ...]:
    """Return what each row of the logits stands for, in order. Rows without a token have an empty name."""
    tokens = {number: token for token, number in fusion.tokenizer.get_vocab().items()}
    return tuple(tokens.get(number, "") for number in range(fusion.config.language.vocab_size))


def check_comparable(reference: Fusion, words: tuple[str, ...], source: str) -> None:
    """Raise :class:`UsageError` unless a reference has the vocabulary ``words`` of the model from ``source``."""
    if vocabulary(reference) != words:
        raise UsageError(
            f"The reference {reference.manifest.source} has another vocabulary than {source}; pass a bundle or "
            "checkpoint of the same model."
        )
