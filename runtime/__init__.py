"""Running a FUSION bundle: ``load``, ``Fusion`` and the types that they use."""

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.fusion import Answer, AnswerStream, Conversation, Fusion, load
from fusion_edge.runtime.prompts import Turn
from fusion_edge.runtime.sampling import Sampling

__all__ = ["Answer", "AnswerStream", "Conversation", "Fusion", "FusionError", "Sampling", "Turn", "UsageError", "load"]
