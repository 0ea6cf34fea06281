"""Engines of a bundle: what TensorRT made of its graphs, for one version of it and one kind of GPU.

They lie in ``engines/<fingerprint>/`` of the bundle's folder beside an ``engines.json``, whose schema is defined here.
An engine holds code: none is given to TensorRT whose version, GPU, bundle and checksum are not those of its manifest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_edge.runtime.bundle.engine_values import check_engines
from fusion_edge.runtime.bundle.graphs import sized
from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.bundle.manifest import MANIFEST, Bundle, FileEntry, check_digest, check_file, digest
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.errors import DeviceError, FusionError

SCHEMA_VERSION = 1
FOLDER = "engines"
ENGINES = "engines.json"


@dataclass(frozen=True)
class Machine:
    """What an engine is tied to."""

    library: str
    """``tensorrt`` or ``tensorrt_rtx``: the name of the Python module."""
    version: str
    """Of the library."""
    compute_capability: str
    """Of the GPU, such as ``8.7``."""

    @property
    def architecture(self) -> str:
        """The compute capability as in ``sm_87``."""
        return self.compute_capability.replace(".", "")

    def __str__(self) -> str:
        return f"{self.library} {self.version} and compute capability {self.compute_capability}"


@dataclass(frozen=True)
class Engine:
    """One graph's engine."""

    file: FileEntry
    inputs: tuple[Mapping[str, Any], ...]
    """Each with its name, dtype and shape, in which symbolic dimensions vary."""
    outputs: tuple[Mapping[str, Any], ...]
    profiles: tuple[Mapping[str, tuple[int, ...]], ...]
    """Least, typical and largest size by symbolic dimension; an LLM's first is for prompts, its second for steps."""

    @property
    def tensors(self) -> tuple[Mapping[str, Any], ...]:
        """Inputs and outputs."""
        return *self.inputs, *self.outputs

    @property
    def largest_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name, over all profiles."""
        largest = {name: max(profile[name][2] for profile in self.profiles) for name in self.profiles[0]}
        return {tensor["name"]: sized(tensor["shape"], largest) for tensor in self.tensors}


@dataclass(frozen=True)
class Engines:
    """The content of ``engines.json``."""

    schema_version: int
    producer: str
    machine: Machine
    bundle: str
    """SHA-256 of the ``bundle.json`` that they were built from."""
    max_context: int
    """Positions of the KV cache."""
    workspace: int | None
    """Bytes of scratch memory that kernels were tried with; None is TensorRT's default."""
    parts: int
    """How many engines were asked for for the LLM."""
    operator: str
    """``plugin`` or ``function``: what computes the recursive alignment."""
    engines: Mapping[str, tuple[Engine, ...]]
    """By graph name; of an LLM that was built in parts, in the order in which they run."""

    @property
    def size(self) -> int:
        """Bytes of all engines, which is what their weights take on the device."""
        return sum(engine.file.size for parts in self.engines.values() for engine in parts)

    def to_text(self) -> str:
        """The text of ``engines.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def bundle_digest(bundle: Bundle) -> str:
    """SHA-256 of ``bundle.json``, which has that of every other file."""
    return digest(bundle.folder / MANIFEST)


def engines_folder(bundle: Bundle, machine: Machine) -> Path:
    """Where the engines of a bundle for a machine are, if they are built."""
    fingerprint = f"{machine.library}-{machine.version}-cc{machine.compute_capability}-{bundle_digest(bundle)[:16]}"
    return bundle.folder / FOLDER / fingerprint


def build_command(bundle: Bundle, machine: Machine) -> str:
    """What builds the engines for a machine."""
    library = machine.library.replace("_", "-")
    return f"fusion-build {bundle.folder} --library {library}"


def read_engines(folder: Path) -> Engines:
    """The manifest in a folder of engines. Raises ``ValueError`` for what is not one, :class:`OSError`."""
    manifest = from_json(Engines, read_json(folder / ENGINES))
    if manifest.schema_version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {str(manifest.schema_version)[:40]}, not {SCHEMA_VERSION}")
    check_engines(manifest)
    return manifest


def open_engines(bundle: Bundle, machine: Machine) -> tuple[Path, Engines]:
    """The engines of ``bundle`` for ``machine``, every file's checksum verified, and their folder.

    Raises with the command that builds them: :class:`DeviceError` if there are none, or only those of another machine
    or of the bundle as it was before; :class:`FusionError` if a file is missing, truncated or altered.
    """
    folder, build = engines_folder(bundle, machine), build_command(bundle, machine)
    if not folder.is_dir():
        raise DeviceError(f"{bundle.folder} has no engines for {machine}{_others(bundle)}; build them: {build}")
    try:
        engines = read_engines(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"{folder / ENGINES} cannot be read ({error}); build the engines again: {build}") from None
    if engines.machine != machine:
        raise FusionError(f"The engines in {folder} are for {engines.machine}, not {machine}; build them: {build}")
    if engines.bundle != bundle_digest(bundle):
        raise FusionError(f"The engines in {folder} are of another bundle; build those of this one: {build}")
    if missing := bundle.manifest.graphs.keys() ^ engines.engines.keys():
        raise FusionError(f"{folder / ENGINES} does not fit the bundle in {min(missing)}; build them again: {build}")
    for engine in (engine for parts in engines.engines.values() for engine in parts):
        check_file(folder, engine.file, ENGINES, f"Build the engines again: {build}")
        check_digest(folder, engine.file, ENGINES, f"Build the engines again: {build}")
    return folder, engines


def all_engines(bundle: Bundle) -> list[tuple[Engines, bool]]:
    """The manifests of all engines of a bundle, and whether they are of the bundle as it is."""
    found, current = [], bundle_digest(bundle)
    for folder in sorted((bundle.folder / FOLDER).glob("*/")):
        try:
            engines = read_engines(folder)
        except (OSError, ValueError, RecursionError):
            continue
        found.append((engines, engines.bundle == current))
    return found


def _others(bundle: Bundle) -> str:
    """Which engines there are instead."""
    machines = [
        f"{engines.machine}{'' if is_current else ', of the bundle as it was before'}"
        for engines, is_current in all_engines(bundle)
    ]
    return f" (only for {'; '.join(machines)})" if machines else ""
