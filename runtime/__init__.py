"""The engine: load a bundle and ask questions about images. Public names are imported on first use."""

from __future__ import annotations

from fusion_edge.runtime.system.first_signals import leave_while_a_module_loads

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without the time to import typing
if TYPE_CHECKING:
    from fusion_edge.runtime.answer import Answer
    from fusion_edge.runtime.answer_stream import AnswerStream
    from fusion_edge.runtime.choices import Choice
    from fusion_edge.runtime.constraints.grammar import Grammar
    from fusion_edge.runtime.conversation import Conversation
    from fusion_edge.runtime.errors import Cancelled, DeadlineExceeded, FusionError, SceneEvicted, Stopped, UsageError
    from fusion_edge.runtime.fusion import Fusion
    from fusion_edge.runtime.loading import load
    from fusion_edge.runtime.loop.asker import Asker
    from fusion_edge.runtime.loop.latencies import Latencies, Percentiles
    from fusion_edge.runtime.loop.request import (
        ChoiceRequestOptions,
        QueueFull,
        QueueOptions,
        Request,
        RequestOptions,
        Superseded,
    )
    from fusion_edge.runtime.prompts.prompt import Turn
    from fusion_edge.runtime.requests import AnswerOptions, ChoiceOptions, QuestionOptions, SceneOptions
    from fusion_edge.runtime.sampling import Sampling
    from fusion_edge.runtime.scene import Scene

__all__ = [
    "Answer",
    "AnswerOptions",
    "AnswerStream",
    "Asker",
    "Cancelled",
    "Choice",
    "ChoiceOptions",
    "ChoiceRequestOptions",
    "Conversation",
    "DeadlineExceeded",
    "Fusion",
    "FusionError",
    "Grammar",
    "Latencies",
    "Percentiles",
    "QuestionOptions",
    "QueueFull",
    "QueueOptions",
    "Request",
    "RequestOptions",
    "Sampling",
    "Scene",
    "SceneEvicted",
    "SceneOptions",
    "Stopped",
    "Superseded",
    "Turn",
    "UsageError",
    "load",
]

_MODULES = {
    "Answer": "answer",
    "AnswerOptions": "requests",
    "AnswerStream": "answer_stream",
    "Asker": "loop.asker",
    "Cancelled": "errors",
    "Choice": "choices",
    "ChoiceOptions": "requests",
    "ChoiceRequestOptions": "loop.request",
    "Conversation": "conversation",
    "DeadlineExceeded": "errors",
    "Fusion": "fusion",
    "FusionError": "errors",
    "Grammar": "constraints.grammar",
    "Latencies": "loop.latencies",
    "Percentiles": "loop.latencies",
    "QuestionOptions": "requests",
    "QueueFull": "loop.request",
    "QueueOptions": "loop.request",
    "Request": "loop.request",
    "RequestOptions": "loop.request",
    "Sampling": "sampling",
    "Scene": "scene",
    "SceneEvicted": "errors",
    "SceneOptions": "requests",
    "Stopped": "errors",
    "Superseded": "loop.request",
    "Turn": "prompts.prompt",
    "UsageError": "errors",
    "load": "loading",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


leave_while_a_module_loads()
