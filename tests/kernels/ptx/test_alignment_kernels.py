"""The Triton kernels' PTX, launched as the plugins tell TensorRT, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.alignment_cases import Case, case
from support.alignment_kernels import NARROW, OTHERS, WIDE
from support.plugin_launches import launch

from fusion_edge.kernels.tensorrt_plugins import PLUGINS
from fusion_edge.kernels.triton.ahead_of_time import ARCHITECTURES

SHAPES = [(0, 4), (1, 0), (1, 1), (2, 3)]
"""Questions, latents of each."""
every_operator = pytest.mark.parametrize("operator", [plugin.operator for plugin in PLUGINS])


def check(one: Case, kernels: Path, architecture: str) -> None:
    """Run a kernel. Its result must be right."""
    launch(one, kernels, architecture).run()
    assert one.is_right(), one.error().max()


@every_operator
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [NARROW, WIDE[0]])
def test_every_architecture(operator: str, architecture: str, width: int, kernels: Path) -> None:
    for questions, latents in SHAPES:
        check(case(operator, "fp16", questions, latents, width), kernels, architecture)


@every_operator
@pytest.mark.parametrize(("dtype", "architecture", "width"), OTHERS)
def test_other_types_and_widths(operator: str, dtype: str, architecture: str, width: int, kernels: Path) -> None:
    check(case(operator, dtype, 2, 3, width), kernels, architecture)


@every_operator
def test_many_rows(operator: str, kernels: Path) -> None:
    check(case(operator, "fp16", 3, 11, NARROW), kernels, "87")


@every_operator
def test_large_values(operator: str, kernels: Path) -> None:
    """The greatest score is subtracted from all, or their exponentials overflow."""
    check(case(operator, "fp16", 2, 3, NARROW, scale=30), kernels, "87")
