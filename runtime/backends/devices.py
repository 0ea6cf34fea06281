"""Devices that may run a bundle, the best first, and why one cannot be taken."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from fusion_edge.runtime.backends.base import Backend
from fusion_edge.runtime.backends.cuda import open_cuda
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.backends.onnxruntime.library import find_onnxruntime, install_anew, is_installed
from fusion_edge.runtime.backends.tensorrt.library import LIBRARIES, find_library
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import DeviceError, FusionError, UsageError

AUTO = "auto"


@dataclass(frozen=True)
class Device:
    """What runs a bundle."""

    name: str
    """One of :data:`NAMES`; a backend of your own has its own."""
    not_taken: Mapping[str, str] = field(default_factory=dict)
    """With ``auto``, every better device and a sentence that says why it was not taken."""
    remark: str | None = None
    """Why it is slower than such a device may be, a sentence."""


@dataclass(frozen=True)
class DeviceCandidate:
    """A device that fusion-edge knows."""

    name: str
    target: str
    """Of the bundles that it runs best."""
    reason: Callable[[Bundle], str | None]
    """Why it cannot be taken for a bundle, a sentence with the remedy; None if nothing is known against it."""
    open: Callable[[Bundle, int | None], Backend]
    """The backend, for a number of threads. Raises :class:`DeviceError` if the device does not start after all."""
    remark: Callable[[Bundle], str | None] = lambda _: None
    """As :class:`Device` has it."""


def open_device(bundle: Bundle, name: str = AUTO, threads: int | None = None) -> tuple[Device, Backend]:
    """The named device, or with ``auto`` the best there is for the bundle, and its backend.

    A device that is asked for by name is never replaced by another. Raises :class:`UsageError` for an unknown name,
    :class:`FusionError` if the device, or with ``auto`` every device, cannot be taken, or the bundle does not load.
    """
    if not isinstance(name, str) or name not in (AUTO, *NAMES):
        raise UsageError(f"Unknown device {name!r}; expected {', '.join((AUTO, *NAMES[:-1]))} or {NAMES[-1]}.")
    not_taken: dict[str, str] = {}
    for candidate in CANDIDATES:
        if name not in (AUTO, candidate.name):
            continue
        reason = candidate.reason(bundle)
        if reason is None:
            try:
                backend = candidate.open(bundle, threads)
                return Device(candidate.name, not_taken, candidate.remark(bundle)), backend
            except DeviceError as error:
                reason = str(error)
        not_taken[candidate.name] = reason
    reasons = " ".join(f"{device}: {reason}" for device, reason in not_taken.items())
    if name == AUTO:
        raise FusionError(f"No device here can run {bundle.folder}. {reasons}")
    raise FusionError(f"Cannot run {bundle.folder} on {reasons}")


def _cuda(bundle: Bundle) -> str | None:
    return _wrong_target(bundle, "cuda") or _no_nvidia_gpu() or _no_onnxruntime("cuda") or _no_cuda_provider()


def _cpu(bundle: Bundle) -> str | None:
    return _wrong_target(bundle, "cpu", "cuda", "tensorrt") or _no_onnxruntime("cpu")


def _without_own_kernels(bundle: Bundle) -> str | None:
    reason = cpu_kernels.unsupported_reason(bundle.manifest)
    return reason and f"Products and attention are ONNX Runtime's own instead of faster ones. {reason}"


def _tensorrt(library: str, bundle: Bundle) -> str | None:
    """Nothing but the GPU decides whether there are engines for it, so they are looked for when it is opened."""
    return _wrong_target(bundle, "tensorrt") or _no_library(library) or _no_nvidia_gpu()


def _no_library(name: str) -> str | None:
    try:
        find_library(name)
    except DeviceError as error:
        return str(error)
    return None


def _wrong_target(bundle: Bundle, *targets: str) -> str | None:
    """``targets``: what a device runs, what it runs best first."""
    if bundle.manifest.target in targets:
        return None
    return (
        f"The bundle was exported for {bundle.manifest.target}; "
        f"fusion-export {bundle.manifest.source} -o FOLDER --target {targets[0]} makes one for it."
    )


def _no_nvidia_gpu() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "There is no NVIDIA driver (libcuda.so.1); install it if there is an NVIDIA GPU."
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "The NVIDIA driver finds no GPU that works; see what nvidia-smi says."
    return None


def _no_onnxruntime(extra: str) -> str | None:
    try:
        find_onnxruntime(extra)
    except DeviceError as error:
        return str(error)
    return None


def _no_cuda_provider() -> str | None:
    if "CUDAExecutionProvider" in find_onnxruntime("cuda").get_available_providers():
        return None
    is_hidden = is_installed("onnxruntime") and is_installed("onnxruntime-gpu")
    fault = "hides onnxruntime-gpu, whose files it replaced" if is_hidden else "has no CUDA provider"
    return f"The onnxruntime that is installed {fault}; {install_anew('cuda')}."


def _open_onnxruntime(device: str, bundle: Bundle, threads: int | None) -> Backend:
    from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend  # imports onnxruntime: 0.1 s

    return OnnxRuntimeBackend(bundle, device, threads)


def _open_tensorrt(library: str, bundle: Bundle, threads: int | None) -> Backend:
    from fusion_edge.runtime.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(bundle, find_library(library), open_cuda())


CANDIDATES = (
    *(DeviceCandidate(name, "tensorrt", partial(_tensorrt, name), partial(_open_tensorrt, name)) for name in LIBRARIES),
    DeviceCandidate("cuda", "cuda", _cuda, partial(_open_onnxruntime, "cuda")),
    DeviceCandidate("cpu", "cpu", _cpu, partial(_open_onnxruntime, "cpu"), _without_own_kernels),
)
NAMES = tuple(candidate.name for candidate in CANDIDATES)
