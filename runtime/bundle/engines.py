"""Engines of a bundle: folders, and the checks before TensorRT loads one.

They lie in ``engines/<fingerprint>/`` of the bundle's folder, each folder with an ``engines.json``. Those of a bundle
in the hub's cache lie in the user's cache folder: nothing is written to a snapshot, and no engine comes from the hub.
An engine holds code. TensorRT receives only engines whose version, GPU, bundle and checksum match their manifest.
"""

from __future__ import annotations

from pathlib import Path

from fusion_edge.runtime.bundle.engine_manifest import ENGINES_MANIFEST, SCHEMA_VERSION, EnginePlatform, Engines
from fusion_edge.runtime.bundle.engine_validation import check_engines
from fusion_edge.runtime.bundle.files import check_digest, check_file, digest, is_snapshot
from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.user_cache import cache_folder

ENGINES_FOLDER = "engines"


def bundle_digest(bundle: Bundle) -> str:
    """Return the SHA-256 of ``bundle.json``, which lists those of all other files."""
    return digest(bundle.folder / MANIFEST)


def engines_folder(bundle: Bundle, platform: EnginePlatform) -> Path:
    """Return the folder of a bundle's engines for a platform."""
    fingerprint = f"{platform.library}-{platform.version}-cc{platform.compute_capability}-{_short_digest(bundle)}"
    return _engines_root(bundle) / fingerprint


def _engines_root(bundle: Bundle) -> Path:
    return (cache_folder() if is_snapshot(bundle.folder) else bundle.folder) / ENGINES_FOLDER


def _short_digest(bundle: Bundle) -> str:
    return bundle_digest(bundle)[:16]


def build_command(bundle: Bundle, platform: EnginePlatform) -> str:
    """Return the command that builds the engines for a platform."""
    library = platform.library.replace("_", "-")
    return f"fusion-build {bundle.folder} --library {library}"


def read_engines(folder: Path) -> Engines:
    """Read the manifest in a folder of engines. Raise ``ValueError`` for an invalid one, :class:`OSError`."""
    manifest = from_json(Engines, read_json(folder / ENGINES_MANIFEST))
    if manifest.schema_version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {str(manifest.schema_version)[:40]}, not {SCHEMA_VERSION}")
    check_engines(manifest)
    return manifest


def open_engines(bundle: Bundle, platform: EnginePlatform) -> tuple[Path, Engines]:
    """Verify the engines for ``platform``, with every checksum, and return their folder and manifest.

    Errors name the command that builds the engines. Raises :class:`DeviceError` if the bundle has no current engines
    for the platform, :class:`FusionError` if a file is missing, truncated or altered.
    """
    folder, build = engines_folder(bundle, platform), build_command(bundle, platform)
    if not folder.is_dir():
        raise DeviceError(f"{bundle.folder} has no engines for {platform}{_others(bundle)}; build them: {build}")
    try:
        engines = read_engines(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(
            f"{folder / ENGINES_MANIFEST} cannot be read ({error}); build the engines again: {build}"
        ) from None
    if engines.machine != platform:
        raise FusionError(f"The engines in {folder} are for {engines.machine}, not {platform}; build them: {build}")
    if engines.bundle != bundle_digest(bundle):
        raise FusionError(f"The engines in {folder} belong to another bundle; build them: {build}")
    if missing := bundle.manifest.graphs.keys() ^ engines.engines.keys():
        raise FusionError(
            f"{folder / ENGINES_MANIFEST} does not fit the bundle in {min(missing)}; build them again: {build}"
        )
    for engine in (engine for parts in engines.engines.values() for engine in parts):
        check_file(folder, engine.file, ENGINES_MANIFEST, f"Build the engines again: {build}")
        check_digest(folder, engine.file, ENGINES_MANIFEST, f"Build the engines again: {build}")
    return folder, engines


def all_engines(bundle: Bundle) -> list[tuple[Engines, bool]]:
    """Return the manifests of all engines, each with whether it was built from the bundle's present state."""
    engines_of, current = [], bundle_digest(bundle)
    own = f"*-{_short_digest(bundle)}/" if is_snapshot(bundle.folder) else "*/"  # the cache has engines of all bundles
    for folder in sorted(_engines_root(bundle).glob(own)):
        try:
            engines = read_engines(folder)
        except (OSError, ValueError, RecursionError):
            continue
        engines_of.append((engines, engines.bundle == current))
    return engines_of


def _others(bundle: Bundle) -> str:
    """Describe the other engines of the bundle."""
    platforms = [f"{engines.machine}{'' if is_current else ', stale'}" for engines, is_current in all_engines(bundle)]
    return f" (only for {'; '.join(platforms)})" if platforms else ""
