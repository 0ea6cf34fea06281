"""GPU facts from NVIDIA's driver, through libcuda and NVML, without another package or process.

Nothing here creates a CUDA context, so no GPU memory is used.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

TEXT_LENGTH = 96
INTEGRATED = 18  # CU_DEVICE_ATTRIBUTE_INTEGRATED
CLOCKS = {"gpu": 1, "gpu memory": 2}  # NVML_CLOCK_SM, NVML_CLOCK_MEM
THROTTLE_REASONS = {
    # nvmlClocksEventReason*: reasons for reduced clocks under load.
    0x04: "GPU at its power limit",
    0x08: "GPU slowed by hardware",
    0x20: "GPU too warm",
    0x40: "GPU too hot: slowed by hardware",
    0x80: "GPU slowed by its power supply",
}


class _MemoryInfo(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True)
class Gpu:
    """First GPU in CUDA's order. Methods return None for values that the driver does not report."""

    name: str
    cuda_version: str
    """Newest CUDA version that the driver supports."""
    is_integrated: bool
    """Whether the GPU shares the host's memory, as on a Jetson."""
    nvml: Any = None
    """NVML's library; None if NVML does not know the GPU."""
    handle: Any = None
    """NVML's device handle."""

    def joules(self) -> float | None:
        """Return the board's energy since the driver was loaded, in joules."""
        value = ctypes.c_ulonglong()
        return value.value / 1e3 if self._ask("nvmlDeviceGetTotalEnergyConsumption", value) else None

    def used_memory(self) -> int | None:
        """Return the bytes in use by all processes."""
        info = _MemoryInfo()
        return int(info.used) if self._ask("nvmlDeviceGetMemoryInfo", info) else None

    def power_limit(self) -> float | None:
        """Return the enforced power limit in watts."""
        value = ctypes.c_uint()
        return value.value / 1e3 if self._ask("nvmlDeviceGetEnforcedPowerLimit", value) else None

    def throttle_reasons(self) -> set[str]:
        """Return the reasons for reduced clocks at this moment."""
        value = ctypes.c_ulonglong()
        if not self._ask("nvmlDeviceGetCurrentClocksEventReasons", value):
            self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", value)  # the name before driver 535
        return {reason for bit, reason in THROTTLE_REASONS.items() if value.value & bit}

    def clocks(self) -> dict[str, float]:
        """Return the present clocks of ``gpu`` and ``gpu memory`` in Hz, as far as the driver reports them."""
        found, value = {}, ctypes.c_uint()
        for name, kind in CLOCKS.items():
            if self._ask("nvmlDeviceGetClockInfo", value, kind):
                found[name] = 1e6 * value.value
        return found

    def driver_version(self) -> str | None:
        """Return the driver's version, such as ``580.95.05``."""
        written = ctypes.create_string_buffer(TEXT_LENGTH)
        if self.nvml is None or self.nvml.nvmlSystemGetDriverVersion(written, TEXT_LENGTH):
            return None
        return written.value.decode()

    def _ask(self, function: str, answer: ctypes._SimpleCData[int] | ctypes.Structure, *arguments: int) -> bool:
        """Call an NVML function that fills ``answer``; return whether it succeeded."""
        ask = getattr(self.nvml, function, None)  # older drivers have fewer functions
        return ask is not None and ask(self.handle, *arguments, ctypes.byref(answer)) == 0


def find_gpu() -> Gpu | None:
    """Return the first GPU; None without a driver or a working GPU."""
    cuda, nvml = _library("libcuda.so.1"), _library("libnvidia-ml.so.1")
    return None if cuda is None else describe(cuda, nvml)


def describe(cuda: Any, nvml: Any | None) -> Gpu | None:
    """Return CUDA's first GPU. NVML counts in another order, so the bus address identifies it there."""
    device = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name, address = ctypes.create_string_buffer(TEXT_LENGTH), ctypes.create_string_buffer(TEXT_LENGTH)
    version, integrated, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    cuda.cuDeviceGetName(name, TEXT_LENGTH, device)
    cuda.cuDeviceGetPCIBusId(address, TEXT_LENGTH, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetAttribute(ctypes.byref(integrated), INTEGRATED, device)
    is_known = nvml is not None and not (
        nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(handle))
    )
    return Gpu(
        name=name.value.decode(),
        cuda_version=f"{version.value // 1000}.{version.value % 1000 // 10}",
        is_integrated=bool(integrated.value),
        nvml=nvml if is_known else None,
        handle=handle if is_known else None,
    )


def _library(name: str) -> Any | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
