"""Running a FUSION bundle: ``load``, ``Fusion`` and the types that they use, each imported when it is asked for."""

from __future__ import annotations

from fusion_edge.runtime.system.first_signals import leave_while_a_module_loads

TYPE_CHECKING = False  # as type checkers read it; the module typing takes long to import
if TYPE_CHECKING:
    from fusion_edge.runtime.answers import Answer, AnswerStream
    from fusion_edge.runtime.conversation import Conversation
    from fusion_edge.runtime.errors import FusionError, UsageError
    from fusion_edge.runtime.fusion import Fusion, load
    from fusion_edge.runtime.prompts.prompt import Turn
    from fusion_edge.runtime.sampling import Sampling

__all__ = ["Answer", "AnswerStream", "Conversation", "Fusion", "FusionError", "Sampling", "Turn", "UsageError", "load"]

_MODULES = {
    "Answer": "answers",
    "AnswerStream": "answers",
    "Conversation": "conversation",
    "Fusion": "fusion",
    "FusionError": "errors",
    "Sampling": "sampling",
    "Turn": "prompts.prompt",
    "UsageError": "errors",
    "load": "fusion",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


leave_while_a_module_loads()
