"""Logits of a prompt, as the sampler gets them."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.prompts.prompt import Turn
from fusion_edge.runtime.requests import ImageLike
from fusion_edge.runtime.sampling import Sampler, Sampling


class _Watch(Sampler):
    """A greedy sampler that keeps the latest logits."""

    logits: Floats

    def __call__(self, logits: Floats) -> int:
        self.logits = logits.copy()
        return super().__call__(logits)


def first_logits(fusion: Fusion, image: ImageLike, question: str, history: Sequence[Turn] = ()) -> Floats:
    """Return the backend's float32 logits ``[V]`` after the prompt."""
    sampling = Sampling(max_new_tokens=1)
    watch = _Watch(sampling)
    fusion.pipeline.start(fusion.pipeline.prepare(image, question, history, sampling), watch)
    return watch.logits
