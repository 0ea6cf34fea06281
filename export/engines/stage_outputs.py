"""The outputs of every stage of one fixed question, on a backend: what :mod:`.engine_check` compares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.runtime.backends.base import Backend, Floats, ImageAlignment
from fusion_edge.runtime.bundle.config import IMAGE_SIZE
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.image_cache import EncodedImage
from fusion_edge.runtime.images.preprocessing import cut_crops
from fusion_edge.runtime.pipeline import Pipeline
from fusion_edge.runtime.prompts.prompt import ContextBudget, PromptEncoder
from fusion_edge.runtime.tokenization.embeddings import Embeddings
from fusion_edge.runtime.tokenization.tokenizer import load_tokenizer

QUESTION = "What is this?"
STEPS = 8
"""Most decode steps. Several, because later ones read what earlier ones wrote."""
RUN_STEPS = 5 + STEPS
"""Steps of progress of a run: loading, four stages, and the decode steps."""
BLOBS = 12
"""Blobs of color along a side of the picture, which is neither flat nor noise."""
DIMENSIONS = {
    "global_features": 3,
    "image_tokens": 2,
    "latents": 2,
    "keys": 4,
    "values": 4,
    "prompt": 2,
    "steps": 2,
    "tokens": 1,
}
"""Number of dimensions of the arrays of :class:`StageOutputs`, by their names in a file."""


@dataclass(frozen=True, eq=False)
class StageOutputs:
    """Outputs of the stages, in float32."""

    global_features: Floats
    """``[4,P,D]``: features of the global crops."""
    image_tokens: Floats
    """``[P',D]``: features of the local crop under the question."""
    alignment: tuple[Floats, ...]
    """Latents ``[q,D]``, then keys and values ``[layers,q,9,D]``."""
    prompt: Floats
    """``[1,V]``: logits behind the prompt."""
    steps: Floats
    """``[n,V]``: logits behind each decode step."""
    tokens: npt.NDArray[np.int64]
    """``[n]``: the token that each decode step appends."""

    def arrays(self) -> dict[str, Any]:
        """Return the arrays by the names of :data:`DIMENSIONS`."""
        latents, keys, values = self.alignment
        others = {name: array for name, array in vars(self).items() if name != "alignment"}
        return {"latents": latents, "keys": keys, "values": values} | others

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> StageOutputs:
        """Return the outputs with these :meth:`arrays`. Raises ``ValueError`` for other names or dimensions."""
        if {name: array.ndim for name, array in arrays.items()} != DIMENSIONS:
            raise ValueError("these are no outputs of stages")
        others = dict(arrays)
        return cls(alignment=tuple(others.pop(name) for name in ("latents", "keys", "values")), **others)

    def save(self, path: Path) -> None:
        """Write the outputs to a file of NumPy (``.npz``)."""
        np.savez(path, **self.arrays())

    @classmethod
    def load(cls, path: Path) -> StageOutputs:
        """Read what :meth:`save` wrote."""
        with np.load(path) as file:
            return cls.of_arrays(dict(file))

    def first_steps(self, count: int) -> StageOutputs:
        """Return the outputs with no more than ``count`` decode steps."""
        return replace(self, steps=self.steps[:count], tokens=self.tokens[:count])


@dataclass(frozen=True, eq=False)
class Reference:
    """The CPU's outputs, from a file (:mod:`.cpu_reference`)."""

    outputs: StageOutputs
    made_by: str
    """What computed them, such as ``ONNX Runtime 1.27.0 on x86_64``."""


class ReadableBackend(Backend, Protocol):
    """A backend whose outputs can all be read."""

    def read_alignment(self, image: ImageAlignment) -> tuple[Floats, ...]:
        """Return an image's keys and values ``[layers,q,9,D]`` on the host."""
        ...


def _picture() -> Image.Image:
    """Return the picture: random, but the same every time."""
    colors = np.random.default_rng(0).integers(0, 256, (BLOBS, BLOBS, 3)).astype(np.uint8)
    return Image.fromarray(colors).resize((2 * IMAGE_SIZE, 2 * IMAGE_SIZE), Image.Resampling.BICUBIC)


def question_digest() -> str:
    """Return the SHA-256 of question and picture. Versions of this program, NumPy or Pillow may have others."""
    return hashlib.sha256(QUESTION.encode() + _picture().tobytes()).hexdigest()


class StageRunner:
    """The fixed question of a bundle, for any backend."""

    def __init__(self, bundle: Bundle, max_context: int, advance: Callable[[int], None] = lambda _: None) -> None:
        """Load tokenizer and token table.

        Sequences have at most ``max_context`` tokens. ``advance`` receives 1 for each stage and each step that ran.
        """
        self._manifest = replace(bundle.manifest, max_context=max_context)
        self._tokenizer, self._embeddings = load_tokenizer(bundle), Embeddings(bundle)
        self._picture, self._advance = _picture(), advance

    def check_context(self) -> None:
        """Raise :class:`FusionError` if the question does not fit the context."""
        manifest = self._manifest
        budget = ContextBudget(manifest.max_context, manifest.image_side**2, manifest.query_lengths[0])
        PromptEncoder(self._tokenizer, TEMPLATES[manifest.model.template]).encode((), QUESTION, budget=budget)

    def run(self, backend: ReadableBackend, given: StageOutputs | None = None) -> StageOutputs:
        """Run every stage.

        With ``given`` outputs of another backend, a stage reads those of the stages before it that pass through the
        host, and steps append its tokens: so errors do not add up, and all steps are comparable. There are no more
        steps than the other backend's, and fewer if the context ends.

        Raises :class:`FusionError` if the question does not fit the context, or the backend fails.
        """
        pipeline = Pipeline(self._manifest, backend, self._tokenizer, self._embeddings)
        question = pipeline.prepare(self._picture, QUESTION)
        image = pipeline.encode_image(cut_crops(self._picture))
        global_features = np.array(image.global_features, np.float32)
        self._advance(1)
        image_tokens = pipeline.encode_image_tokens(image, question.prompt.instruct_ids)
        self._advance(1)
        if given is not None:
            image = EncodedImage(image.crops, image.local_pixels, given.global_features)
        aligned = pipeline.align(image, question.query_length)
        self._advance(1)
        seen = image_tokens if given is None else given.image_tokens
        steps = STEPS if given is None else len(given.tokens)
        length, capacity, logits = pipeline.prefill(question.prompt, seen, aligned, steps)
        rows, tokens = [logits.copy()], []
        self._advance(1)
        for number in range(capacity - length):
            tokens.append(int(rows[-1].argmax() if given is None else given.tokens[number]))
            rows.append(pipeline.step(tokens[-1]).copy())
            self._advance(1)
        return StageOutputs(
            global_features=global_features,
            image_tokens=image_tokens,
            alignment=(aligned.latents, *backend.read_alignment(aligned)),
            prompt=np.stack(rows[:1]),
            steps=np.stack(rows)[1:],
            tokens=np.array(tokens, np.int64),
        )

    def ask_scene(self, backend: Backend) -> Floats:
        """Return the logits ``[1,V]`` behind the question in a scene, with no other backend's outputs.

        The guide is the question, so they are those behind the whole prompt, but for rounding.
        """
        pipeline = Pipeline(self._manifest, backend, self._tokenizer, self._embeddings)
        scene = pipeline.look(pipeline.prepare_look(self._picture, QUESTION))
        _, _, logits = pipeline.run_prompt(pipeline.prepare(scene, QUESTION))
        return np.array(logits[None])
