"""``fusion-bench`` on a GPU, with fakes of TensorRT, CUDA and NVIDIA's driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_nvidia import FakeNvml, gpu
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.on_fake_tensorrt import build, installed
from support.opset24 import needs_opset_24

from fusion_edge.benchmarks.latency import cli, peaks, roofline
from fusion_edge.benchmarks.latency.result import read_result
from fusion_edge.export import cli as export
from fusion_edge.runtime.backends import devices
from fusion_edge.runtime.bundle.reader import open_bundle

pytestmark = needs_opset_24  # which the fake TensorRT computes with


def test_result(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RooflineUse by a copy's bandwidth for all of the engines' cache, memory of the GPU, why a rate is not known."""
    assert export.main([str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--fp16", "--target", "tensorrt"]) == 0
    bundle, cuda = open_bundle(tmp_path / "b"), FakeCuda()
    trt = FakeTensorRT(*RTX, cuda)
    assert build(bundle, trt, "--max-context=128") == 0

    class Nvml(FakeNvml):
        """Reports CUDA's allocations and 7,000 bytes of another process."""

        def nvmlDeviceGetMemoryInfo(self, handle: object, info: object) -> int:
            self.answers["nvmlDeviceGetMemoryInfo"] = 7_000 + cuda.used
            return super().nvmlDeviceGetMemoryInfo(handle, info)

    monkeypatch.setattr(devices, "_no_nvidia_gpu", lambda: None)
    nvml = Nvml({"nvmlDeviceGetClockInfo(1)": 1980, "nvmlDeviceGetCurrentClocksThrottleReasons": 0x04})
    monkeypatch.setattr(cli, "find_gpu", lambda: gpu(nvml))
    monkeypatch.setattr(peaks, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(peaks, "WARM_UP", 0.0)
    capsys.readouterr()
    with installed(trt):
        assert cli.main([str(bundle.folder), "--seconds", "1", "--new-tokens", "3", "--threads", "1", "--json"]) == 0
    (tmp_path / "result.json").write_text(capsys.readouterr().out)
    result = read_result(tmp_path / "result.json")
    (measured,) = result.cases

    rooflines = result.peaks["tensorrt-rtx"]
    assert rooflines.bandwidth == pytest.approx(2 * cuda.copy_rate * 1e3)
    assert rooflines.compute is None
    assert list(rooflines.not_measured) == ["compute"]
    needed = roofline.weight_bytes(bundle.manifest) + roofline.cache_bytes(bundle.manifest, 128)
    assert measured.roofline.decode.work == needed
    assert measured.roofline.decode.roofline_seconds == pytest.approx(needed / 2e9)
    assert measured.roofline.prefill.work > 0
    assert measured.roofline.prefill.share is None

    memory = measured.device_memory
    assert memory is not None
    assert 0 < memory.loaded <= memory.load_peak
    assert memory.loaded <= memory.steady <= memory.peak < cuda._free
    assert measured.memory.loaded > memory.loaded
    assert result.machine.gpu == "NVIDIA RTX 4090"
    assert result.machine.clocks["gpu"] == (1.98e9,) * 3
    assert result.machine.throttled == "GPU at its power limit"
    cuda.check_all_freed()
