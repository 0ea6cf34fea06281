"""The pipeline of a question: stages from an image and a prompt to the tokens of the answer.

A stage hook observes the stages: ``hook(name)`` returns a context manager that wraps the stage of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer

from fusion_edge.runtime.arguments import check_flag, is_integer, short_repr
from fusion_edge.runtime.backends.base import Backend, Floats, ImageAlignment, Integers, KvPrefix
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, FusionConfig
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.constraints.compiler import GrammarCompiler
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.image_cache import CacheEntry, EncodedImage, ImageCache
from fusion_edge.runtime.images.grids import alignment_cells, resize_grid
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image, normalize
from fusion_edge.runtime.prompts.prompt import ContextBudget, Prompt, PromptEncoder, PromptLayout, Turn
from fusion_edge.runtime.requests import Color, Crops, ImageLike, PreparedLook, PreparedQuestion
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.stages import (
    ALIGNMENT,
    DECODE_STEP,
    ENCODE_GLOBAL,
    ENCODE_LOCAL,
    PREFILL,
    PREPROCESS,
    SAMPLING,
    StageHook,
    no_hook,
)
from fusion_edge.runtime.structured import with_grammar

Embed = Callable[[Integers], Floats]
"""Token ids ``[n]`` to embeddings ``[n,D]``."""


def load_subject(image: ImageLike | Crops | CacheEntry, color: Color) -> Image.Image | Crops | CacheEntry:
    """Return crops and a scene as they are, and load any other image."""
    return image if isinstance(image, Crops | CacheEntry) else load_image(image, color)


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A sequence after its prompt."""

    length: int
    """Tokens in the KV cache."""
    capacity: int
    """Limit of the sequence in tokens."""
    token: int
    """First token of the answer."""


class Pipeline:
    """The stages of a question on a backend. One call at a time.

    The features, latents, keys and values of the latest images stay cached, and the KV cache of scenes.
    """

    def __init__(
        self, manifest: Manifest, backend: Backend, tokenizer: Tokenizer, embed: Embed, cached_images: int = 1
    ) -> None:
        """Raise :class:`FusionError` if the tokenizer does not fit the bundle's template."""
        self.manifest = manifest
        self.backend = backend
        self.tokenizer = tokenizer
        self.embed = embed
        template = TEMPLATES[self.config.template]
        self.prompts = PromptEncoder(tokenizer, template)
        end_of_turn = tokenizer.token_to_id(template.answer_end)
        if end_of_turn is None:
            raise FusionError(
                f"The bundle's tokenizer has no {template.answer_end}, which ends an answer in the template "
                f"{self.config.template}; they do not belong together: export the bundle again."
            )
        self.end_ids = frozenset(self.config.eos_token_ids) | {end_of_turn}
        """Tokens that end an answer: the checkpoint's, and always the template's end of turn."""
        self.grammars = GrammarCompiler(tokenizer, self.end_ids, self.config.language.vocab_size)
        self.images = ImageCache(cached_images)

    @property
    def config(self) -> FusionConfig:
        """The model's configuration."""
        return self.manifest.model

    @property
    def max_context(self) -> int:
        """Size of the KV cache in tokens, prompt and answer together."""
        return min(self.manifest.max_context, self.backend.max_context)

    def prepare(
        self,
        image: ImageLike | Crops | CacheEntry,
        question: str,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        query_length: int | None = None,
        color: Color = "rgb",
        control_tokens: bool = False,
        regex: str | None = None,
        choices: Iterable[str] | None = None,
    ) -> PreparedQuestion:
        """Check the arguments of a question, load its image unless it is a scene, and tokenize its prompt."""
        sampling = with_grammar(sampling, regex=regex, choices=choices)
        constraint = None if sampling.grammar is None else self.grammars.start(sampling.grammar)
        length = self.query_length(query_length)
        budget = self._budget(length)
        is_markup = check_flag("control_tokens", control_tokens)
        prompt = self.prompts.encode(history, question, control_tokens=is_markup, budget=budget)
        return PreparedQuestion(load_subject(image, color), prompt, sampling, length, constraint)

    def prepare_look(
        self, image: ImageLike | Crops, guide: str | None, query_length: int | None = None, color: Color = "rgb"
    ) -> PreparedLook:
        """Check the arguments of a look, load its image and tokenize its guide."""
        length = self.query_length(query_length)
        start = None if guide is None else self.prompts.encode_start(guide, budget=self._budget(length))
        picture = image if isinstance(image, Crops) else load_image(image, color)
        return PreparedLook(picture, start, length)

    def _budget(self, query_length: int) -> ContextBudget:
        return ContextBudget(self.max_context, self.manifest.image_side**2, query_length)

    def query_length(self, length: int | None = None) -> int:
        """Return the query length, by default the bundle's first. Raise :class:`UsageError` if it is not offered."""
        offered = self.manifest.query_lengths
        if length is None:
            return offered[0]
        if not is_integer(length) or length not in offered:
            raise UsageError(
                f"Query length {short_repr(length)} is not offered; choose from {', '.join(map(str, offered))} "
                "(fusion-export --query-len sets them)."
            )
        return int(length)

    def start(self, question: PreparedQuestion, sampler: Sampler, hook: StageHook = no_hook) -> Prefilled:
        """Run every stage up to the first token of the answer."""
        length, capacity, logits = self.run_prompt(question, hook)
        with hook(SAMPLING):
            token = sampler(logits)
        return Prefilled(length, capacity, token)

    def run_prompt(self, question: PreparedQuestion, hook: StageHook = no_hook) -> tuple[int, int, Floats]:
        """Run every stage up to the logits of the prompt's last token. Return what :meth:`prefill` returns."""
        image, prefix = self._subject(question.subject, hook)
        seen: Floats | KvPrefix | None = prefix
        if seen is None:
            with hook(ENCODE_LOCAL):
                seen = self.encode_image_tokens(image, question.prompt.instruct_ids)
        with hook(ALIGNMENT):
            aligned = self.align(image, question.query_length)
        with hook(PREFILL):
            return self.prefill(question.prompt, seen, aligned, question.sampling.max_new_tokens)

    def decode(self, token: int, sampler: Sampler, hook: StageHook = no_hook) -> int:
        """Append ``token`` to the sequence and return the next one."""
        logits = self.step(token, hook)
        with hook(SAMPLING):
            return sampler(logits)

    def step(self, token: int, hook: StageHook = no_hook) -> Floats:
        """Append ``token`` to the sequence and return the logits ``[V]`` of the next one, valid until the next step."""
        with hook(DECODE_STEP):
            return self.backend.decode(self.embed(np.array([token]))[0])

    def look(self, look: PreparedLook, hook: StageHook = no_hook) -> CacheEntry:
        """Cache a scene: run every stage that its questions share. Each stage that is complete stays cached."""
        image, _ = self._subject(look.picture, hook)
        with hook(ALIGNMENT):
            self.align(image, look.query_length)
        entry = self.images.entry_for_scene(image)
        if look.start is not None:
            with hook(ENCODE_LOCAL):
                image_tokens = self.encode_image_tokens(image, look.start.instruct_ids)
            with hook(PREFILL):
                layout = look.start.layout(len(image_tokens), look.query_length)
                entry.prefix = self.backend.prefill_prefix(self._rows(layout, image_tokens))
        entry.is_scene = True
        return entry

    def _subject(
        self, subject: Image.Image | Crops | CacheEntry, hook: StageHook
    ) -> tuple[EncodedImage, KvPrefix | None]:
        """Return the features of a picture or scene, and the scene's prefix if it has a guide."""
        if isinstance(subject, CacheEntry):
            found = subject.scene()
            self.images.use(subject)
            return found
        with hook(PREPROCESS):
            crops = subject.pixels if isinstance(subject, Crops) else cut_crops(subject)
        with hook(ENCODE_GLOBAL):
            return self.encode_image(crops), None

    def encode_image(self, crops: npt.NDArray[np.uint8]) -> EncodedImage:
        """Return the features of ``crops`` ``[5,S,S,3]``, from the cache if it holds the same pixels."""
        image = self.images.find(crops)
        if image is None:
            pixels = normalize(crops)
            no_text = np.zeros((GLOBAL_CROPS, 0, self.config.language.hidden_size), np.float32)
            self.images.make_room()
            features = self.backend.encode(pixels[:GLOBAL_CROPS], no_text, np.zeros((GLOBAL_CROPS, 0), np.bool_))
            image = EncodedImage(crops, pixels[GLOBAL_CROPS:].copy(), features)
            self.images.add(image)
        return image

    def clear_image_cache(self) -> None:
        """Drop the cached images and scenes, so the next question encodes its image again."""
        self.images.clear()

    def close(self) -> None:
        """Free the cached images and scenes, and the backend."""
        self.clear_image_cache()
        self.backend.close()

    def encode_image_tokens(self, image: EncodedImage, instruct_ids: Integers) -> Floats:
        """Return the local crop's features ``[P',D]``, guided by the questions (docs/fusion-model.md section 2).

        Id 0 is masked.
        """
        text = self.embed(instruct_ids)[None]
        features = self.backend.encode(image.local_pixels, text, (instruct_ids != 0)[None])
        return resize_grid(np.asarray(features)[0], self.manifest.image_side)

    def align(self, image: EncodedImage, query_length: int) -> ImageAlignment:
        """Return latents, keys and values for a query length, and cache them with the image."""
        if query_length not in image.alignments:
            cells = alignment_cells(2 * self.config.vision.grid, query_length, self.config.alignment.window_size)
            image.alignments.clear()  # one length at a time: keys and values are large
            image.alignments[query_length] = self.backend.align(image.global_features, *cells)
        return image.alignments[query_length]

    def prefill(
        self, prompt: Prompt, image: Floats | KvPrefix, aligned: ImageAlignment, max_new_tokens: int
    ) -> tuple[int, int, Floats]:
        """Run a prompt with the image tokens ``[P',D]``, or behind a prefix that ends with them.

        Returns its length, the sequence's capacity, and the logits ``[V]`` of the last token.
        """
        layout = prompt.layout(self.manifest.image_side**2, len(aligned.latents))
        length, capacity = layout.length, min(self.max_context, layout.length + max_new_tokens)
        if isinstance(image, KvPrefix):
            prefix, layout = image, layout.after_image()
            rows = self._rows(layout)
        else:
            prefix, rows = None, self._rows(layout, image)
        rows[layout.latent_positions] = aligned.latents
        places = layout.latent_positions, layout.instruct_positions
        return length, capacity, self.backend.prefill(rows, aligned, *places, capacity, prefix)

    def _rows(self, layout: PromptLayout, image_tokens: Floats | None = None) -> Floats:
        """Return the LLM's input ``[L,D]`` without its latents."""
        rows = np.empty((layout.length, self.config.language.hidden_size), np.float32)
        rows[layout.text_positions] = self.embed(layout.text_ids)
        if image_tokens is not None:
            rows[layout.image_start : layout.image_end] = image_tokens
        return rows
