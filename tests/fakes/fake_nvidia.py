"""Fakes of libcuda and NVML. As in the libraries, functions fill buffers and return error codes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

from fusion_edge.benchmarks.latency.machine.nvidia import Gpu, describe

NOT_SUPPORTED = 3
ADDRESS = b"00000000:41:00.0"


@dataclass
class FakeCuda:
    gpus: int = 1
    is_integrated: bool = False

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return 0 if index < self.gpus else 101

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"Orin" if self.is_integrated else b"NVIDIA RTX 4090"
        return 0

    def cuDeviceGetPCIBusId(self, address: Any, size: int, device: Any) -> int:
        address.value = ADDRESS
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12060
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self.is_integrated and attribute == 18
        return 0


@dataclass
class FakeNvml:
    """Returns ``answers`` by function name. Other functions are not supported, as on a Jetson."""

    answers: dict[str, int] = field(default_factory=dict)

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, address: Any, handle: Any) -> int:
        assert address.value == ADDRESS
        handle._obj.value = 7
        return 0

    def nvmlSystemGetDriverVersion(self, version: Any, size: int) -> int:
        version.value = b"560.35.03"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, info: Any) -> int:
        if "nvmlDeviceGetMemoryInfo" not in self.answers:
            return NOT_SUPPORTED
        info._obj.used = self.answers["nvmlDeviceGetMemoryInfo"]
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        return self._answer("nvmlDeviceGetTotalEnergyConsumption", handle, value)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any, value: Any) -> int:
        return self._answer("nvmlDeviceGetEnforcedPowerLimit", handle, value)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, value: Any) -> int:
        return self._answer("nvmlDeviceGetCurrentClocksThrottleReasons", handle, value)

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, value: Any) -> int:
        return self._answer(f"nvmlDeviceGetClockInfo({kind})", handle, value)

    def _answer(self, name: str, handle: ctypes.c_void_p, value: Any) -> int:
        assert handle.value == 7
        if name not in self.answers:
            return NOT_SUPPORTED
        value._obj.value = self.answers[name]
        return 0


def gpu(nvml: FakeNvml | None = None, is_integrated: bool = False, **answers: int) -> Gpu:
    """Return the GPU that the two fakes describe."""
    found = describe(FakeCuda(is_integrated=is_integrated), nvml or FakeNvml(answers))
    assert found is not None
    return found
