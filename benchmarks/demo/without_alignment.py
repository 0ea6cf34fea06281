"""The model without its interaction layers."""

from __future__ import annotations

from torch import Tensor

from fusion_edge.export.model.architecture import Alignment
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime.backends.base import Floats


class WithoutAlignment(EagerBackend):
    """Eager interpreter without interaction layers."""

    def hidden(self, embeddings: Floats, alignment: Alignment[Tensor] | None) -> Tensor:
        return super().hidden(embeddings, None)
