"""Options of a question, and a question whose arguments have been checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.runtime.image_cache import CacheEntry
from fusion_edge.runtime.images.preprocessing import Color as Color
from fusion_edge.runtime.prompts.prompt import Prompt, Turn
from fusion_edge.runtime.sampling import Sampling

if TYPE_CHECKING:
    from fusion_edge.runtime.constraints.compiler import Constraint

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]
"""A path of an image file, a Pillow image, or an array ``[H,W,3]``, ``[H,W,1]`` or ``[H,W]``."""


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments that concern the answer alone."""

    sampling: Sampling | None
    """Length limit and sampling parameters. Default: greedy, at most 512 tokens."""
    regex: str | None
    """Regular expression that matches the whole answer, as in :meth:`Grammar.regex`. Default: any answer."""
    choices: Iterable[str] | None
    """Texts of which the answer is one, as in :meth:`Grammar.choices`. Default: any answer."""


class LatentOptions(TypedDict, total=False):
    """Keyword arguments that concern the latents."""

    query_length: int | None
    """Number of latents, one of the bundle's query lengths. Default: the first."""


class PromptOptions(TypedDict, total=False):
    """Keyword arguments that concern the prompt."""

    history: Sequence[Turn]
    """Earlier questions about the same image or scene, with their answers. Default: none."""
    control_tokens: bool
    """Whether questions and answers may spell control tokens such as ``<|end|>``. Default: such spellings are text."""


class ImageOptions(TypedDict, total=False):
    """Keyword arguments that concern the image."""

    color: Color
    """Layout of an array: ``rgb`` (default), ``bgr``, ``nv12``, ``i420`` or ``yuyv``. Files and Pillow images define
    their own."""


class AnswerOptions(SamplingOptions, LatentOptions, total=False):
    """Keyword arguments of :meth:`Conversation.ask` and :meth:`Conversation.answer`."""


class QuestionOptions(AnswerOptions, PromptOptions, ImageOptions, total=False):
    """Keyword arguments of :meth:`Fusion.ask`, :meth:`Fusion.answer` and :meth:`Fusion.stream`."""


class ChoiceOptions(LatentOptions, PromptOptions, ImageOptions, total=False):
    """Keyword arguments of :meth:`Fusion.choose`."""


class SceneOptions(SamplingOptions, PromptOptions, total=False):
    """Keyword arguments of :meth:`Scene.ask`, :meth:`Scene.answer` and :meth:`Scene.stream`."""


@dataclass(frozen=True, eq=False)
class Crops:
    """A picture that has been decoded and cut."""

    pixels: npt.NDArray[np.uint8]
    """``[5,S,S,3]``, of :func:`.preprocessing.cut_crops`."""


@dataclass(frozen=True, eq=False)
class PreparedQuestion:
    """A question whose arguments have been checked."""

    subject: Image.Image | Crops | CacheEntry
    """An RGB picture, its crops, or a scene."""
    prompt: Prompt
    sampling: Sampling
    query_length: int
    constraint: Constraint | None = None
    """Constraint of one answer, of ``sampling.grammar``."""


@dataclass(frozen=True, eq=False)
class PreparedLook:
    """A look at an image whose arguments have been checked."""

    picture: Image.Image | Crops
    """RGB."""
    start: Prompt | None
    """Start of every prompt, with the guide's tokens; None without a guide."""
    query_length: int
