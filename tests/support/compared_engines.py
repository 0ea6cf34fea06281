"""``fusion-build`` with a comparison, on a fake TensorRT that computes with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.fake_tensorrt_runtime import IExecutionContext
from fakes.on_fake_tensorrt import installed

from fusion_edge.export.engines import cli as cli_build
from fusion_edge.runtime.bundle.engine_manifest import Engines
from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER, read_engines

STAGES = ["encode global crops", "encode local crop", "alignment", "prefill", "decode step", "prefill in a scene"]
Change = Callable[[np.ndarray[Any, Any]], object]


def fake(library: tuple[str, str] = RTX, **machine: Any) -> FakeTensorRT:
    return FakeTensorRT(*library, FakeCuda(**machine))


def build(trt: FakeTensorRT, bundle: Path, *options: str) -> int:
    """Run ``fusion-build``; afterwards all memory of the device is free."""
    with installed(trt):
        code = cli_build.main([str(bundle), f"--library={trt.__name__.replace('_', '-')}", "--parts=2", *options])
    trt.cuda.check_all_freed()
    return code


def folders(bundle: Path) -> list[Path]:
    """Return the folders of engines, hidden ones included."""
    return [path for path in (bundle / ENGINES_FOLDER).iterdir() if path.is_dir()]


def engines_of(bundle: Path) -> Engines:
    (folder,) = folders(bundle)
    return read_engines(folder)


def changed(monkeypatch: pytest.MonkeyPatch, output: str, change: Change, profile: int | None = None) -> None:
    """Let every run of the engine with an output change that output in place, or only runs of one profile."""
    compute = IExecutionContext._compute

    def wrong(self: IExecutionContext, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        compute(self, addresses, shapes)
        if output in self._engine.outputs and profile in (None, self._profile):
            value = self._engine.outputs[output]
            (memory,) = (one for at, one in self._cuda.allocations.items() if at == addresses[output])
            dtype = np.float16 if value.type.tensor_type.elem_type == 10 else np.float32
            change(memory.memory.view(dtype))

    monkeypatch.setattr(IExecutionContext, "_compute", wrong)


def half(values: np.ndarray[Any, Any]) -> None:
    values *= values.dtype.type(0.5)
