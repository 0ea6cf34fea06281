"""Asking questions about images: the graphs of a bundle stitched together.

    with load("bundle") as fusion:
        for piece in fusion.ask("frame.jpg", "Is the path clear?"):
            print(piece, end="", flush=True)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
import tokenizers
from PIL import Image
from tokenizers import Tokenizer

from fusion_edge.runtime.backends.base import Backend, Floats, ImageAlignment
from fusion_edge.runtime.bundle import TOKENIZER, Bundle, Manifest, open_bundle
from fusion_edge.runtime.config import GLOBAL_CROPS, FusionConfig, side
from fusion_edge.runtime.devices import AUTO, Device, open_device
from fusion_edge.runtime.embeddings import Embeddings
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.grids import pooling_cells, resize_grid
from fusion_edge.runtime.images import cut_crops, load_image, normalize
from fusion_edge.runtime.prompts import TEMPLATES, Prompt, Turn, encode_prompt
from fusion_edge.runtime.resources import check_threads
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.text_stream import TextStream

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]
Color = Literal["rgb", "bgr"]
Embed = Callable[[npt.NDArray[np.int64]], Floats]
STAGES = ("preprocess", "vision", "alignment", "prefill", "decode")
"""Cutting the crops; both runs of the vision encoder; the alignment decoder; the prompt; one-token steps."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    """Without whitespace at its ends."""
    token_ids: tuple[int, ...]
    """Generated tokens, the end token not included."""
    prompt_tokens: int
    """Rows of the LLM's input: text, image tokens and latents."""
    finish_reason: str
    """``stop`` (end token or stop string) or ``length`` (token limit or full context)."""
    timings_ms: dict[str, float]
    """Milliseconds by stage, see ``STAGES``."""
    tokens_per_second: float
    """Rate of the one-token steps; 0 when the answer took none."""


@dataclass(eq=False)
class SeenImage:
    """What is kept of the latest image: all that does not depend on a question."""

    crops: npt.NDArray[np.uint8]
    local_pixels: Floats
    global_features: npt.ArrayLike
    """In the backend's own form."""
    alignments: dict[int, ImageAlignment] = field(default_factory=dict)
    """By query length."""


class Fusion:
    """A loaded model. One question at a time: not for use by several threads at once.

    The vision features, latents, keys and values of the latest image are kept and used again for as long as the
    same pixels are asked about, so a reused camera buffer is never mistaken for the frame it held before.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        tokenizer: Tokenizer,
        embed: Embed,
        device: Device | None = None,
    ) -> None:
        """Use :func:`load` unless you bring your own backend. ``embed`` maps ids ``[n]`` to rows ``[n,D]``."""
        self.manifest = manifest
        self.backend = backend
        self.device = Device(backend.name) if device is None else device
        self.tokenizer = tokenizer
        self.embed = embed
        self._template = TEMPLATES[self.config.template]
        self._latest: SeenImage | None = None
        self._generation = 0
        self._closed = False

    @property
    def config(self) -> FusionConfig:
        """The model's sizes."""
        return self.manifest.model

    @property
    def max_context(self) -> int:
        """Positions that prompt and answer may have together."""
        return min(self.manifest.max_context, self.backend.max_context)

    def __enter__(self) -> Fusion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the backend's memory. Nothing can be asked afterwards; closing twice does no harm."""
        if not self._closed:
            self._closed = True
            self._generation += 1
            self._latest = None
            self.backend.close()

    def ask(
        self,
        image: ImageLike,
        question: str,
        *,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        query_length: int | None = None,
        color: Color = "rgb",
    ) -> Iterator[str]:
        """The answer piece by piece, as it is generated. Parameters and errors as of :meth:`answer`."""
        return self.stream(
            image, question, history=history, sampling=sampling, query_length=query_length, color=color
        )

    def answer(
        self,
        image: ImageLike,
        question: str,
        *,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        query_length: int | None = None,
        color: Color = "rgb",
    ) -> Answer:
        """The whole answer to ``question`` about ``image``.

        ``image`` is a path, a PIL image, or uint8 ``[height, width, 3]`` in ``color`` order; ``history`` the
        questions asked before about the same image with their answers; ``query_length`` one of the bundle's
        (default: its first). Raises :class:`UsageError` for a value that is out of range, :class:`FusionError`
        for an image that cannot be read or a conversation that does not fit the context.
        """
        stream = self.stream(
            image, question, history=history, sampling=sampling, query_length=query_length, color=color
        )
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        image: ImageLike,
        question: str,
        *,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        query_length: int | None = None,
        color: Color = "rgb",
    ) -> AnswerStream:
        """An iterator over the pieces of text whose ``answer`` holds the whole once it is exhausted.

        Parameters and errors as of :meth:`answer`; a wrong parameter leaves the stream before as it is.
        """
        if self._closed:
            raise UsageError("This model has been closed; load the bundle again.")
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise UsageError(f"sampling is of type {type(sampling).__name__}; expected a Sampling.")
        length = self.query_length(query_length)
        prompt = encode_prompt(self.tokenizer, self._template, history, question)
        self._check_length(prompt, length)
        picture = load_image(image, color)
        self._generation += 1
        return AnswerStream(self, picture, prompt, sampling, length)

    def conversation(self, image: ImageLike, color: Color = "rgb") -> Conversation:
        """A conversation about one image."""
        return Conversation(self, load_image(image, color))

    def query_length(self, wanted: int | None = None) -> int:
        """The wanted query length, or the bundle's first. Raises :class:`UsageError` for one that is not offered."""
        offered = self.manifest.query_lengths
        if wanted is not None and wanted not in offered:
            raise UsageError(
                f"Query length {wanted} is not offered; choose from {', '.join(map(str, offered))} "
                "(fusion-export --query-len decides which a bundle has)."
            )
        return offered[0] if wanted is None else wanted

    def _check_length(self, prompt: Prompt, query_length: int) -> None:
        """Refuse a prompt that leaves no room for an answer, before any graph runs."""
        image_tokens, capacity = self.manifest.image_side**2, self.max_context
        length = prompt.layout(image_tokens, query_length).length
        if length >= capacity:
            raise FusionError(
                f"The prompt takes {length} positions ({image_tokens} of them image tokens), the context holds "
                f"{capacity} with the answer; ask a shorter question or drop history, or export with fewer "
                "--image-tokens or a larger --max-context (of TensorRT's engines fusion-build decides)."
            )

    # The stages, in the order in which they run ------------------------------------------------------------------

    def see(self, crops: npt.NDArray[np.uint8]) -> SeenImage:
        """The image's own features: the four global crops are encoded unless the latest image had them."""
        if self._latest is None or not np.array_equal(self._latest.crops, crops):
            pixels = normalize(crops)
            nothing = np.zeros((GLOBAL_CROPS, 0, self.config.language.hidden_size), np.float32)
            self._latest = None  # its memory is free before the new image needs as much
            features = self.backend.encode(pixels[:GLOBAL_CROPS], nothing, np.zeros((GLOBAL_CROPS, 0), np.bool_))
            self._latest = SeenImage(crops, pixels[GLOBAL_CROPS:].copy(), features)
        return self._latest

    def forget(self) -> None:
        """Have the next image seen anew, even if it is the latest one."""
        self._latest = None

    def image_tokens(self, image: SeenImage, instruct_ids: npt.NDArray[np.int64]) -> Floats:
        """The local crop's features under the question's guidance: ``[P',D]``. Id 0 is masked (FUSION.md section 2)."""
        text = self.embed(instruct_ids)[None]
        features = self.backend.encode(image.local_pixels, text, (instruct_ids != 0)[None])
        return resize_grid(np.asarray(features)[0], self.manifest.image_side)

    def align(self, image: SeenImage, length: int) -> ImageAlignment:
        """Latents, keys and values for a query length, kept with the image."""
        if length not in image.alignments:
            size, cells = 2 * self.config.vision.grid, side(length)
            image.alignments.clear()  # one length at a time: keys and values are large
            image.alignments[length] = self.backend.align(
                image.global_features,
                pooling_cells(size, cells),
                pooling_cells(size, cells * self.config.alignment.window_size),
            )
        return image.alignments[length]

    def prefill(
        self, prompt: Prompt, image_tokens: Floats, aligned: ImageAlignment, new_tokens: int
    ) -> tuple[int, int, Floats]:
        """Positions taken, positions there are, and logits of the last one taken."""
        layout = prompt.layout(len(image_tokens), len(aligned.latents))
        rows = np.empty((layout.length, self.config.language.hidden_size), np.float32)
        rows[layout.text_positions] = self.embed(layout.text_ids)
        rows[layout.image_start : layout.image_start + len(image_tokens)] = image_tokens
        rows[layout.latent_positions] = aligned.latents
        capacity = min(self.max_context, layout.length + new_tokens)
        logits = self.backend.prefill(
            rows, aligned, layout.latent_positions, layout.instruct_positions, capacity
        )
        return layout.length, capacity, logits


class AnswerStream(Iterator[str]):
    """Pieces of an answer. ``answer`` is complete after the last piece.

    Asking the same :class:`Fusion` anything else ends it: the KV cache is one.
    """

    def __init__(
        self, fusion: Fusion, image: Image.Image, prompt: Prompt, sampling: Sampling, query_length: int
    ) -> None:
        self._fusion = fusion
        self._generation = fusion._generation
        self._timings = dict.fromkeys(STAGES, 0.0)
        self._answer: Answer | None = None
        self._pieces = self._generate(image, prompt, sampling, query_length)

    def __next__(self) -> str:
        if self._answer is None and self._generation != self._fusion._generation:
            raise FusionError(
                "This answer was given up when another question was asked or the model closed; finish one before that."
            )
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer. Raises :class:`UsageError` before the last piece has been taken."""
        if self._answer is None:
            raise UsageError("The answer is not complete; take every piece of the stream first.")
        return self._answer

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._timings[stage] += 1000 * (time.perf_counter() - start)

    def _generate(
        self, picture: Image.Image, prompt: Prompt, sampling: Sampling, query_length: int
    ) -> Iterator[str]:
        fusion = self._fusion
        with self._timed("preprocess"):
            crops = cut_crops(picture)
        with self._timed("vision"):
            image = fusion.see(crops)
            image_tokens = fusion.image_tokens(image, prompt.instruct_ids)
        with self._timed("alignment"):
            aligned = fusion.align(image, query_length)
        with self._timed("prefill"):
            positions, capacity, logits = fusion.prefill(
                prompt, image_tokens, aligned, sampling.max_new_tokens
            )
            sampler = Sampler(sampling)
            token = sampler(logits)
        limit = capacity - positions
        text = TextStream(fusion.tokenizer, sampling.stop)
        tokens: list[int] = []
        steps = 0
        while token not in fusion.config.eos_token_ids and len(tokens) < limit:
            tokens.append(token)
            if piece := text.push(token):
                yield piece
            if text.stopped or len(tokens) == limit:
                break
            with self._timed("decode"):
                token = sampler(fusion.backend.decode(fusion.embed(np.array([token]))[0]))
            steps += 1
        if rest := text.finish():
            yield rest
        finished = text.stopped or token in fusion.config.eos_token_ids
        self._answer = Answer(
            text=text.text.strip(),  # as the released code does before it prints or keeps a reply
            token_ids=tuple(tokens),
            prompt_tokens=positions,
            finish_reason="stop" if finished else "length",
            timings_ms=self._timings,
            tokens_per_second=1000 * steps / self._timings["decode"] if steps else 0.0,
        )


class Conversation:
    """Questions about one image, each with those before it as history."""

    def __init__(self, fusion: Fusion, image: Image.Image) -> None:
        self._fusion = fusion
        self._image = image
        self.history: list[Turn] = []

    def ask(
        self, question: str, *, sampling: Sampling | None = None, query_length: int | None = None
    ) -> Iterator[str]:
        """The answer piece by piece; it joins the history when it is complete."""
        stream = self._fusion.stream(
            self._image, question, history=self.history, sampling=sampling, query_length=query_length
        )
        yield from stream
        self.history.append(Turn(question, stream.answer.text))

    def answer(
        self, question: str, *, sampling: Sampling | None = None, query_length: int | None = None
    ) -> Answer:
        """The whole answer; it joins the history."""
        answer = self._fusion.answer(
            self._image, question, history=self.history, sampling=sampling, query_length=query_length
        )
        self.history.append(Turn(question, answer.text))
        return answer


def load(folder: str | os.PathLike[str], *, device: str = AUTO, threads: int | None = None) -> Fusion:
    """Load a bundle on a device: ``cuda``, ``cpu``, or ``auto`` for the best that the machine has for this bundle.

    ``Fusion.device`` tells which ``auto`` took, and why not the better ones; a device asked for by name is taken or
    refused. ``threads`` of None takes every processor that this process may use; more are refused. Raises
    :class:`UsageError` for an argument that is none of these, :class:`FusionError` for a device that the machine lacks,
    and for a bundle that is damaged, of a newer schema, or does not load on the device.
    """
    if threads is not None and not (isinstance(threads, int) and threads >= 1):
        raise UsageError(f"threads is {threads!r}; expected an integer from 1, or None.")
    if threads is not None:
        check_threads(threads)
    if not isinstance(folder, str | os.PathLike):
        raise UsageError(f"The bundle is of type {type(folder).__name__}; expected the path of a folder.")
    bundle = open_bundle(os.fspath(folder))
    taken, backend = open_device(bundle, device, threads)
    return Fusion(bundle.manifest, backend, _load_tokenizer(bundle), Embeddings(bundle), taken)


def _load_tokenizer(bundle: Bundle) -> Tokenizer:
    path = bundle.path(TOKENIZER)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise FusionError(
            f"{path} cannot be loaded by tokenizers {tokenizers.__version__} ({error}); install a newer one."
        ) from error
