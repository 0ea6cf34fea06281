"""Log-probabilities of an answer in OpenAI's form."""

from __future__ import annotations

from functools import cached_property

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.serve.chat_response import Logprobs, TokenLogprob, TopLogprob
from fusion_edge.runtime.tokenization.token_bytes import TokenBytes, token_bytes


class LogprobWriter:
    """Writes log-probabilities. The first one reads the vocabulary."""

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion

    def write(self, answer: Answer, top: int) -> Logprobs:
        """Return the log-probability of each token of an answer, with the ``top`` likeliest ones."""
        tops = answer.top_logprobs or ({},) * len(answer.token_ids)
        return Logprobs(
            content=[
                TokenLogprob(
                    token=self._text(token),
                    logprob=logprob,
                    bytes=self._bytes(token),
                    top_logprobs=[
                        TopLogprob(token=self._text(other), logprob=value, bytes=self._bytes(other))
                        for other, value in list(likeliest.items())[:top]
                    ],
                )
                for token, logprob, likeliest in zip(answer.token_ids, answer.logprobs, tops, strict=True)
            ],
            refusal=None,
        )

    @cached_property
    def _vocabulary(self) -> TokenBytes:
        return token_bytes(self._fusion.tokenizer, self._fusion.config.language.vocab_size)

    def _bytes(self, token: int) -> list[int] | None:
        """Return the bytes of a token; None for one without text, such as the end of the answer."""
        return list(self._vocabulary.tokens[token]) or None

    def _text(self, token: int) -> str:
        content = self._vocabulary.tokens[token]
        return content.decode(errors="replace") if content else str(self._fusion.tokenizer.id_to_token(token) or "")
