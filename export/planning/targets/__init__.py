"""Targets of an export. To add one: a file with a :class:`Target` here, listed in :data:`TARGETS`."""

from __future__ import annotations

from fusion_edge.export.planning.targets.cpu import CPU
from fusion_edge.export.planning.targets.cuda import CUDA
from fusion_edge.export.planning.targets.target import Target
from fusion_edge.export.planning.targets.tensorrt import TENSORRT

TARGETS: dict[str, Target] = {target.name: target for target in (CPU, CUDA, TENSORRT)}
"""By name, the default first."""
