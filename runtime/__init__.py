"""Running a FUSION bundle: ``load``, ``Fusion`` and the types that they use."""

from fusion_edge.commands import signals

signals.leave_while_a_module_loads()  # before what takes long to load

from fusion_edge.runtime.errors import FusionError, UsageError  # noqa: E402
from fusion_edge.runtime.fusion import Answer, AnswerStream, Conversation, Fusion, load  # noqa: E402
from fusion_edge.runtime.prompts import Turn  # noqa: E402
from fusion_edge.runtime.sampling import Sampling  # noqa: E402

__all__ = ["Answer", "AnswerStream", "Conversation", "Fusion", "FusionError", "Sampling", "Turn", "UsageError", "load"]
