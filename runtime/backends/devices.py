"""The choice of a device for a bundle, with the reason against each better one."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

from fusion_edge.runtime.backends.base import Backend
from fusion_edge.runtime.backends.cuda import open_cuda
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.backends.onnxruntime.library import find_onnxruntime, is_installed, reinstall_command
from fusion_edge.runtime.backends.tensorrt.library import LIBRARIES, find_library
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import DeviceError, FusionError, UsageError

AUTO = "auto"


@dataclass(frozen=True)
class Device:
    """The device that runs a bundle."""

    name: str
    """One of :data:`NAMES`, or the name of a custom backend."""
    not_taken: Mapping[str, str] = field(default_factory=dict)
    """With ``auto``: the reason against each better device by its name, as a sentence."""
    remark: str | None = None
    """Reason why the device is slower than possible, as a sentence."""
    kernels: str | None = None
    """Tier of instructions of our CPU kernels, such as ``AMX``; None if they do not run."""


@dataclass(frozen=True)
class DeviceCandidate:
    """A kind of device."""

    name: str
    target: str
    """Bundle target that the device runs best."""
    reason: Callable[[Bundle], str | None]
    """Return the reason why the device cannot run a bundle, as a sentence with the remedy; None if it can."""
    open: Callable[[Bundle, int | None, bool], Backend]
    """Open the backend with a number of threads that spin or sleep when idle.

    Raises :class:`DeviceError` if the device does not start."""
    remark: Callable[[Bundle], str | None] = lambda _: None
    """Return :attr:`Device.remark`."""
    kernels: Callable[[Bundle], str | None] = lambda _: None
    """Return :attr:`Device.kernels`."""


def open_device(
    bundle: Bundle, name: str = AUTO, threads: int | None = None, spin: bool = False
) -> tuple[Device, Backend]:
    """Open the named device, or with ``auto`` the best one for the bundle, and return it with its backend.

    A device chosen by name is never replaced by another. Raises :class:`UsageError` for an unknown name, or ``spin`` on
    a device without CPU threads, :class:`FusionError` if the device, or with ``auto`` every device, cannot run the
    bundle.
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
                backend = candidate.open(bundle, threads, spin)
                return Device(candidate.name, not_taken, candidate.remark(bundle), candidate.kernels(bundle)), backend
            except DeviceError as error:
                reason = str(error)
        not_taken[candidate.name] = reason
    reasons = " ".join(f"{device}: {reason}" for device, reason in not_taken.items())
    if name == AUTO:
        raise FusionError(f"No device of this machine can run {bundle.folder}. {reasons}")
    raise FusionError(f"Cannot run {bundle.folder} on {reasons}")


def _cuda(bundle: Bundle) -> str | None:
    return (
        _wrong_target(bundle, "cuda") or _no_nvidia_gpu() or _not_found(find_onnxruntime, "cuda") or _no_cuda_provider()
    )


def _cpu(bundle: Bundle) -> str | None:
    return _wrong_target(bundle, "cpu", "cuda", "tensorrt") or _not_found(find_onnxruntime, "cpu")


def _cpu_remark(bundle: Bundle) -> str | None:
    reason = cpu_kernels.unsupported_reason(bundle.manifest)
    if reason == cpu_kernels.NOT_COMPILED:
        _warn_of_missing_kernels()
    return reason and f"MatMul and attention run on ONNX Runtime's kernels instead of faster ones. {reason}"


@cache
def _warn_of_missing_kernels() -> None:
    """Warn once in a process, at the call of :func:`load`."""
    warnings.warn(f"fusion-edge runs without its CPU kernels. {cpu_kernels.NOT_COMPILED}", RuntimeWarning, stacklevel=5)


def _cpu_tier(bundle: Bundle) -> str | None:
    return None if cpu_kernels.unsupported_reason(bundle.manifest) else cpu_kernels.tier()


def _tensorrt(library: str, bundle: Bundle) -> str | None:
    """Opening the device looks for engines, because they depend on the GPU."""
    return _wrong_target(bundle, "tensorrt") or _not_found(find_library, library) or _no_nvidia_gpu()


def _wrong_target(bundle: Bundle, *targets: str) -> str | None:
    """Return a sentence unless the bundle's target is one of ``targets``, the best first."""
    if bundle.manifest.target in targets:
        return None
    return (
        f"The bundle was exported for {bundle.manifest.target}; "
        f"fusion-export {bundle.manifest.source} -o FOLDER --target {targets[0]} exports one for this device."
    )


def _no_nvidia_gpu() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "No NVIDIA driver (libcuda.so.1) is installed; install it if the machine has an NVIDIA GPU."
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "The NVIDIA driver finds no working GPU; check nvidia-smi."
    return None


def _not_found(find: Callable[[str], object], name: str) -> str | None:
    """Return the reason why ``find(name)`` fails."""
    try:
        find(name)
    except DeviceError as error:
        return str(error)
    return None


def _no_cuda_provider() -> str | None:
    if "CUDAExecutionProvider" in find_onnxruntime("cuda").get_available_providers():
        return None
    is_hidden = is_installed("onnxruntime") and is_installed("onnxruntime-gpu")
    fault = "hides onnxruntime-gpu, whose files it has overwritten" if is_hidden else "has no CUDA provider"
    return f"The installed onnxruntime {fault}; {reinstall_command('cuda')}."


def _open_onnxruntime(device: str, bundle: Bundle, threads: int | None, spin: bool) -> Backend:
    # Imports onnxruntime, which takes 0.1 s.
    from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, device, threads, spin)


def _open_tensorrt(library: str, bundle: Bundle, threads: int | None, spin: bool) -> Backend:
    if spin:
        raise UsageError("spin is for ONNX Runtime's threads, and TensorRT has none; drop it, or choose device cpu.")
    from fusion_edge.runtime.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(bundle, find_library(library), open_cuda())


CANDIDATES = (
    *(DeviceCandidate(name, "tensorrt", partial(_tensorrt, name), partial(_open_tensorrt, name)) for name in LIBRARIES),
    DeviceCandidate("cuda", "cuda", _cuda, partial(_open_onnxruntime, "cuda")),
    DeviceCandidate("cpu", "cpu", _cpu, partial(_open_onnxruntime, "cpu"), _cpu_remark, _cpu_tier),
)
NAMES = tuple(candidate.name for candidate in CANDIDATES)
