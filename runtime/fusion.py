"""Asking questions about images: the graphs of a bundle stitched together.

with load("bundle") as fusion:
    for piece in fusion.ask("frame.jpg", "Is the path clear?"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer

from fusion_edge.runtime.answers import Answer, AnswerStream, Request
from fusion_edge.runtime.arguments import flag, integer, is_integer, shown
from fusion_edge.runtime.backends.base import Backend, Floats, ImageAlignment
from fusion_edge.runtime.backends.devices import AUTO, Device, open_device
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, FusionConfig
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.conversation import Conversation
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.images.grids import alignment_cells, resize_grid
from fusion_edge.runtime.images.preprocessing import load_image, normalize
from fusion_edge.runtime.prompts.prompt import ContextBudget, Prompt, PromptEncoder, Turn
from fusion_edge.runtime.prompts.templates import TEMPLATES
from fusion_edge.runtime.request_queue import RequestQueue
from fusion_edge.runtime.sampling import Sampling
from fusion_edge.runtime.system.resources import check_threads
from fusion_edge.runtime.tokenization.embeddings import Embeddings
from fusion_edge.runtime.tokenization.tokenizer import load_tokenizer

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]
Color = Literal["rgb", "bgr"]
Embed = Callable[[npt.NDArray[np.int64]], Floats]


@dataclass(eq=False)
class EncodedImage:
    """What is kept of the latest image: all that does not depend on a question."""

    crops: npt.NDArray[np.uint8]
    local_pixels: Floats
    global_features: npt.ArrayLike
    """In the backend's own form."""
    alignments: dict[int, ImageAlignment] = field(default_factory=dict)
    """By query length."""


class Fusion:
    """A loaded model. Several threads may ask it: questions wait for each other, in the order in which they came.

    A question that is asked while an :class:`AnswerStream` has pieces left gives that answer up. A process that is
    forked after the load cannot use the model: all but :meth:`close`, which does nothing there, is a
    :class:`FusionError`.

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
        template = TEMPLATES[self.config.template]
        self._prompts = PromptEncoder(tokenizer, template)
        end_of_turn = tokenizer.token_to_id(template.answer_end)
        if end_of_turn is None:
            raise FusionError(
                f"The bundle's tokenizer has no {template.answer_end}, which ends an answer in the template "
                f"{self.config.template}; they do not belong together: export the bundle again."
            )
        self.end_ids = frozenset(self.config.eos_token_ids) | {end_of_turn}
        """Tokens that end an answer. The template's end of turn always does, whatever the checkpoint's settings say."""
        self._latest: EncodedImage | None = None
        self.queue = RequestQueue(backend)
        """Whose turn it is to compute."""

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
        """Free the backend's memory. Nothing can be asked afterwards; closing twice does no harm.

        A question that another thread waits for ends with a :class:`FusionError`. Returns when the memory is free.
        """
        self.queue.close()
        if not self.queue.is_inherited:
            self._latest = None

    def __del__(self) -> None:
        """In a forked process nothing is freed: ONNX Runtime would wait for threads that only its parent has."""
        questions = self.__dict__.get("questions")  # there is none if the load failed
        if questions is not None and questions.is_inherited:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.__dict__))

    def ask(
        self,
        image: ImageLike,
        question: str,
        *,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        query_length: int | None = None,
        color: Color = "rgb",
        control_tokens: bool = False,
    ) -> Iterator[str]:
        """The answer piece by piece, as it is generated. Parameters and errors as of :meth:`answer`."""
        request = self.request(image, question, history, sampling, query_length, control_tokens, color)
        return self.queue.run(lambda: AnswerStream(self, request))

    def answer(
        self,
        image: ImageLike,
        question: str,
        *,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        query_length: int | None = None,
        color: Color = "rgb",
        control_tokens: bool = False,
    ) -> Answer:
        """The whole answer to ``question`` about ``image``.

        ``image`` is a path, a PIL image, or pixels ``[height, width, 3]`` in ``color`` order; ``history`` the
        questions asked before about the same image with their answers; ``query_length`` one of the bundle's
        (default: its first). Spellings of control tokens and image markers in questions and answers are text;
        with ``control_tokens`` they are control tokens, and image markers are removed. Raises :class:`UsageError` for a
        value that is out of range, :class:`FusionError` for an image that cannot be read or a conversation that does
        not fit the context.
        """
        request = self.request(image, question, history, sampling, query_length, control_tokens, color)
        return self.queue.run(lambda: AnswerStream(self, request).complete())

    def stream(
        self,
        image: ImageLike,
        question: str,
        *,
        history: Sequence[Turn] = (),
        sampling: Sampling | None = None,
        query_length: int | None = None,
        color: Color = "rgb",
        control_tokens: bool = False,
    ) -> AnswerStream:
        """An iterator over the pieces of text whose ``answer`` holds the whole once it is exhausted.

        Parameters and errors as of :meth:`answer`; a wrong parameter leaves the stream before as it is.
        """
        request = self.request(image, question, history, sampling, query_length, control_tokens, color)
        return self.queue.run(lambda: AnswerStream(self, request))

    def request(
        self,
        image: ImageLike,
        question: str,
        history: Sequence[Turn],
        sampling: Sampling | None,
        query_length: int | None,
        control_tokens: bool,
        color: Color = "rgb",
    ) -> Request:
        """The parameters of :meth:`answer`, checked. Computes nothing of the model."""
        self.queue.check_open()
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise UsageError(f"sampling is of type {type(sampling).__name__}; expected a Sampling.")
        length = self.query_length(query_length)
        budget = ContextBudget(self.max_context, self.manifest.image_side**2, length)
        markup = flag("control_tokens", control_tokens)
        prompt = self._prompts.encode(history, question, control_tokens=markup, budget=budget)
        return Request(load_image(image, color), prompt, sampling, length)

    def conversation(self, image: ImageLike, color: Color = "rgb", *, control_tokens: bool = False) -> Conversation:
        """A conversation about one image. ``control_tokens`` as of :meth:`answer`, for all its questions."""
        self.queue.check_open()
        return Conversation(self, load_image(image, color), flag("control_tokens", control_tokens))

    def query_length(self, wanted: int | None = None) -> int:
        """The wanted query length, or the bundle's first. Raises :class:`UsageError` for one that is not offered."""
        offered = self.manifest.query_lengths
        if wanted is None:
            return offered[0]
        if not is_integer(wanted) or wanted not in offered:
            raise UsageError(
                f"Query length {shown(wanted)} is not offered; choose from {', '.join(map(str, offered))} "
                "(fusion-export --query-len decides which a bundle has)."
            )
        return int(wanted)

    # The stages, in the order in which they run ------------------------------------------------------------------

    def encode_image(self, crops: npt.NDArray[np.uint8]) -> EncodedImage:
        """The image's own features: the four global crops are encoded unless the latest image had them."""
        seen = self._latest
        if seen is None or not np.array_equal(seen.crops, crops):
            pixels = normalize(crops)
            nothing = np.zeros((GLOBAL_CROPS, 0, self.config.language.hidden_size), np.float32)
            seen = self._latest = None  # its memory is free before the new image needs as much
            features = self.backend.encode(pixels[:GLOBAL_CROPS], nothing, np.zeros((GLOBAL_CROPS, 0), np.bool_))
            seen = self._latest = EncodedImage(crops, pixels[GLOBAL_CROPS:].copy(), features)
        return seen

    def clear_image_cache(self) -> None:
        """Have the next image seen anew, even if it is the latest one."""
        self._latest = None

    def image_tokens(self, image: EncodedImage, instruct_ids: npt.NDArray[np.int64]) -> Floats:
        """Return the local crop's features ``[P',D]``, guided by the question.

        Id 0 is masked (docs/fusion-model.md section 2).
        """
        text = self.embed(instruct_ids)[None]
        features = self.backend.encode(image.local_pixels, text, (instruct_ids != 0)[None])
        return resize_grid(np.asarray(features)[0], self.manifest.image_side)

    def align(self, image: EncodedImage, length: int) -> ImageAlignment:
        """Latents, keys and values for a query length, kept with the image."""
        if length not in image.alignments:
            cells = alignment_cells(2 * self.config.vision.grid, length, self.config.alignment.window_size)
            image.alignments.clear()  # one length at a time: keys and values are large
            image.alignments[length] = self.backend.align(image.global_features, *cells)
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
        logits = self.backend.prefill(rows, aligned, layout.latent_positions, layout.instruct_positions, capacity)
        return layout.length, capacity, logits


def load(folder: str | os.PathLike[str], *, device: str = AUTO, threads: int | None = None) -> Fusion:
    """Load a bundle on a device: ``cuda``, ``cpu``, or ``auto`` for the best that the machine has for this bundle.

    ``Fusion.device`` tells which ``auto`` took, and why not the better ones; a device asked for by name is taken or
    refused. ``threads`` of None takes every processor that this process may use; more are refused. Raises
    :class:`UsageError` for an argument that is none of these, :class:`FusionError` for a device that the machine lacks,
    and for a bundle that is damaged, of a newer schema, or does not load on the device.
    """
    count = None if threads is None else integer("threads", threads, 1, "an integer from 1, or None")
    if count is not None:
        check_threads(count)
    bundle = open_bundle(_path(folder))
    taken, backend = open_device(bundle, device, count)
    return Fusion(bundle.manifest, backend, load_tokenizer(bundle), Embeddings(bundle), taken)


def _path(folder: object) -> str:
    path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(path, str):
        raise UsageError(f"The bundle is of type {type(folder).__name__}; expected the path of a folder.")
    if not path:  # an unset variable of a script, and to pathlib the present folder
        raise UsageError("The bundle's path is empty; expected the path of a folder.")
    return path
