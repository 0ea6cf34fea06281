"""Resolve a checkpoint: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fusion_edge.runtime.bundle.files import SNAPSHOTS
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.hub.client import error_message, is_hub_id

# "*" also matches "/" in these patterns; the second list excludes subfolders (optimizer states, copies).
_DOWNLOADED = ["*.json", "*.safetensors", "*.model"]
_NOT_DOWNLOADED = ["*/*"]
_FILE_KINDS = {
    ".safetensors": "a safetensors file",
    ".gguf": "a GGUF file, which holds no FUSION checkpoint",
    ".onnx": "an ONNX graph",
    ".bin": "a pickle file",
    ".pt": "a pickle file",
    ".pth": "a pickle file",
    ".json": "a JSON file",
}


def resolve_checkpoint(source: str, revision: str | None) -> Path:
    """Return the local folder of a checkpoint; download it first if ``source`` is a hub id.

    Args:
        source: A folder, used as it is; the folder of a repository in the hub's cache, resolved to its snapshot; or a
            hub id ``org/name``, downloaded by ``huggingface_hub`` with its cache, login and ``HF_HUB_OFFLINE``. Only
            JSON, safetensors and SentencePiece files of the top level are downloaded, never a pickle.
        revision: Branch, tag or commit on the hub. None is the default branch.

    Raises:
        UsageError: ``revision`` is given with a local folder.
        FusionError: The folder does not exist, is a file, or the hub cannot provide the checkpoint.
    """
    path = Path(os.path.expanduser(source)) if source else None  # Path.expanduser raises for an unknown user
    if path and path.is_dir():
        if revision is not None:
            raise UsageError(
                f"--revision {revision} does not apply to the local folder {source}: leave --revision out, or pass a "
                "hub id such as org/name."
            )
        return _snapshot(path)
    if path and path.exists():
        kind = _FILE_KINDS.get(path.suffix.lower(), "a file")
        raise FusionError(
            f"{source} is {kind}; expected a folder with config.json, tokenizer files and safetensors. Pass the "
            "checkpoint's folder."
        )
    if re.match(r"https?://", source):
        raise FusionError(f"{source} is a URL: pass its hub id, org/name, or the folder of a downloaded checkpoint.")
    if path is None or not is_hub_id(source) or path.suffix.lower() in _FILE_KINDS:
        raise FusionError(f"There is no folder '{source}': pass an existing checkpoint folder, or a hub id org/name.")
    return _download(source, revision)


def checkpoint_name(folder: Path) -> str:
    """Return ``org/name`` for a snapshot of the hub's cache, or the name of another folder."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == SNAPSHOTS and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)  # names contain no --
    return os.fsencode(folder.name).decode("utf-8", "replace")


def _snapshot(folder: Path) -> Path:
    """Return ``folder``, or for a repository in the hub's cache the snapshot of ``main`` or the only one."""
    root = folder.parent if folder.name == SNAPSHOTS else folder
    if (folder / "config.json").exists() or not (root / SNAPSHOTS).is_dir():
        return folder
    snapshots = sorted(path for path in (root / SNAPSHOTS).iterdir() if path.is_dir())
    main = root / "refs" / "main"
    name = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    chosen = [path for path in snapshots if path.name == name] or snapshots
    if len(chosen) == 1:
        return chosen[0]
    raise FusionError(
        f"{root} is a repository of the hub's cache with {len(snapshots)} snapshots, none of them refs/main: pass a "
        "folder of snapshots/, or download the repository again."
    )


def _download(hub_id: str, revision: str | None) -> Path:
    # Imported here: local folders do not need it.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED
        )
    # Exception: the client also lets errors of its transport through, which differ between its versions.
    except Exception as error:
        raise FusionError(error_message(hub_id, revision, error)) from error
    return Path(folder)
