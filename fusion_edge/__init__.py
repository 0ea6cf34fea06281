"""FUSION vision-language models on robots and desktops: export, quantize, run and measure.

The public names are those of :mod:`fusion_edge.runtime`. They are imported on first use, so ``import fusion_edge``
loads no library.
"""

from __future__ import annotations

import os

from fusion_edge.runtime.system.first_signals import leave_while_a_module_loads

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without the time to import typing
if TYPE_CHECKING:
    from fusion_edge.runtime import (
        Answer,
        AnswerOptions,
        AnswerStream,
        Asker,
        Cancelled,
        Choice,
        ChoiceOptions,
        ChoiceRequestOptions,
        Conversation,
        DeadlineExceeded,
        Fusion,
        FusionError,
        Grammar,
        Latencies,
        Percentiles,
        QuestionOptions,
        QueueFull,
        QueueOptions,
        Request,
        RequestOptions,
        Sampling,
        Scene,
        SceneEvicted,
        SceneOptions,
        Stopped,
        Superseded,
        Turn,
        UsageError,
        load,
    )

__version__ = "0.1.0"
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
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusion_edge import runtime

    return getattr(runtime, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


leave_while_a_module_loads()
# The Linux wheels of ONNX Runtime 1.29 and later record telemetry and send it, unless this is set before their library
# loads. https://github.com/microsoft/onnxruntime/pull/27379
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
