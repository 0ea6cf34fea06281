"""What pyproject.toml cannot express: the CPU kernels' library, and one wheel for every version of Python."""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CPU_KERNELS = "fusion_edge/kernels/cpu"
BENCHMARKS = "fusion_edge.benchmarks"
SHIPPED = ("__init__", "entry")
"""Modules of ``benchmarks/`` in a wheel, beside the folders ``evaluation/`` and ``latency/``."""


class BuildModules(build_py):
    """Leave out benchmarks that only run in a clone."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return (package, module, file) of every module that ships."""
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if package != BENCHMARKS or found[1] in SHIPPED]


class BuildKernels(build_ext):
    """Name the library without a version of Python: ONNX Runtime loads it, not Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path in the build folder."""
        return fullname.replace(".", "/") + ".so"


class BuildWheel(bdist_wheel):
    """Tag the wheel for its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


kernels = Extension(
    "fusion_edge.kernels.cpu_operators",
    sources=sorted(glob(f"{CPU_KERNELS}/**/*.cpp", recursive=True)),
    depends=sorted(glob(f"{CPU_KERNELS}/**/*.h", recursive=True)),
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-Wno-maybe-uninitialized",  # GCC 12's own headers
        "-Wno-uninitialized",
    ],
    extra_link_args=["-s"],
    optional=True,  # without a compiler the package installs all the same, and runs more slowly
)
setup(
    ext_modules=[kernels],
    cmdclass={"bdist_wheel": BuildWheel, "build_ext": BuildKernels, "build_py": BuildModules},
)
