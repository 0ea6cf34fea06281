"""Running a FUSION bundle: ``load``, ``Fusion`` and the types that they use."""

from fusion_edge.runtime.answers import Answer, AnswerStream
from fusion_edge.runtime.conversation import Conversation
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.fusion import Fusion, load
from fusion_edge.runtime.prompts import Turn
from fusion_edge.runtime.sampling import Sampling

__all__ = ["Answer", "AnswerStream", "Conversation", "Fusion", "FusionError", "Sampling", "Turn", "UsageError", "load"]
