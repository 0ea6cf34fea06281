"""Where a checkpoint comes from, a local folder or the Hugging Face hub, and how its files are opened."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from fusion_edge.runtime.errors import FusionError, UsageError

# "*" also matches "/" in these patterns; the second list keeps subfolders (optimizer states, copies) out.
_WANTED_FILES = ["*.json", "*.safetensors", "*.model"]
_UNWANTED_FILES = ["*/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_WEIGHT_SUFFIXES = {
    ".safetensors": "one safetensors file",
    ".gguf": "a GGUF file, which holds no FUSION checkpoint",
    ".onnx": "an ONNX graph, not a checkpoint",
    ".bin": "one pickle file",
    ".pt": "one pickle file",
    ".pth": "one pickle file",
    ".json": "one JSON file",
}
LARGEST_JSON = 1_500_000  # bytes: ten thousand names of tensors. Parsed, they take up to forty times as much memory
LONGEST_NAME = 500  # characters, of a tensor; the longest known has 130
_LFS = b"version https://git-lfs"
_WEB_PAGE = "a web page, perhaps one that tells why the download failed: download the file again"
_PICKLE = "a pickle, which can run code when loaded: save the model with safe_serialization=True"
_DISGUISES = {
    _LFS: "a Git LFS pointer, not the file that it stands for: fetch that with `git lfs pull`",
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"PK\x03\x04": "a zip archive, perhaps of torch.save: save the model with safe_serialization=True",
    b"\x80\x02\x8a": _PICKLE,
    b"\x80\x02}": _PICKLE,
    b"\x80\x04\x95": _PICKLE,
    b"GGUF": "a GGUF file, which holds no FUSION checkpoint: pass the one that it was made from",
}
"""What a file turns out to be, with the remedy, by how it begins (letters small)."""


def resolve_checkpoint(source: str, revision: str | None) -> Path:
    """The local folder of a checkpoint.

    Args:
        source: An existing folder, used as it is (of a repository in the hub's cache: its snapshot), or a hub id
            ``org/name``. The hub is asked through
            ``huggingface_hub``: its cache, login and ``HF_HUB_OFFLINE`` apply; only JSON, safetensors and
            SentencePiece files of the top level are fetched, never a pickle.
        revision: Branch, tag or commit on the hub; None is the default branch.

    Raises:
        UsageError: ``revision`` given with a local folder.
        FusionError: No such folder, a file in its place, or the hub cannot give the checkpoint.
    """
    path = Path(os.path.expanduser(source)) if source else None  # Path.expanduser raises for an unknown user
    if path and path.is_dir():
        if revision is not None:
            raise UsageError(
                f"--revision {revision} was given with the local folder {source}, which has no revisions: "
                "leave --revision out, or pass a hub id such as org/name."
            )
        return _snapshot(path)
    if path and path.exists():
        kind = _WEIGHT_SUFFIXES.get(path.suffix.lower(), "a file")
        raise FusionError(
            f"{source} is {kind}, but a checkpoint is a folder with config.json, tokenizer files and "
            "safetensors: pass the checkpoint's folder."
        )
    if re.match(r"https?://", source):
        raise FusionError(
            f"{source} is an address: pass the hub id in it, of the form org/name, or the folder of a checkpoint that "
            "you have downloaded."
        )
    if path is None or not _HUB_ID.fullmatch(source) or path.suffix.lower() in _WEIGHT_SUFFIXES:
        raise FusionError(
            f"There is no folder '{source}': pass an existing checkpoint folder, or a hub id of the form org/name."
        )
    return _download(source, revision)


def _snapshot(folder: Path) -> Path:
    """``folder``, or the snapshot of a repository in the hub's cache that ``main`` is, or the only one."""
    root = folder.parent if folder.name == "snapshots" else folder
    if (folder / "config.json").exists() or not (root / "snapshots").is_dir():
        return folder
    snapshots = sorted(path for path in (root / "snapshots").iterdir() if path.is_dir())
    main = root / "refs" / "main"
    name = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    chosen = [path for path in snapshots if path.name == name] or snapshots
    if len(chosen) == 1:
        return chosen[0]
    raise FusionError(
        f"{root} is a repository of the hub's cache with {len(snapshots)} snapshots, none of which is refs/main: pass "
        "the folder in snapshots/ that you want, or download the repository again."
    )


def open_regular(path: Path) -> int:
    """A descriptor to read a file with.

    Raises :class:`FusionError` for a folder, pipe or device in its place, and ``OSError``.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FusionError(f"{path} cannot be read: it is a folder, pipe or device; put the file itself there.")
    return descriptor


def read_file(path: Path, largest: int) -> bytes:
    """The content of a file of at most ``largest`` bytes.

    Raises :class:`FusionError` for a file that is missing, unreadable, larger, or a Git LFS pointer in place of one.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise FusionError(f"{path} is missing: pass a complete checkpoint folder, or download it again.") from None
    except OSError as error:
        raise FusionError(f"{path} cannot be read ({error.strerror}): check its permissions and the disk.") from error
    if len(content) > largest:
        raise FusionError(f"{path} has more than {largest} bytes, as no such file has: download it again.")
    if content.startswith(_LFS):
        raise FusionError(f"{path} is {_DISGUISES[_LFS]}.")
    return content


def disguise(start: bytes) -> str | None:
    """What a file that is not what its name says is instead, with the remedy, by its first bytes; None: unknown."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for sign, what in _DISGUISES.items() if start.startswith(sign.lower())), None)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, with or without a byte order mark.

    Raises ``FusionError`` as :func:`read_file` does, for more than :data:`LARGEST_JSON` bytes, and for what is no JSON,
    no object, or has a field twice.
    """
    raw = read_file(path, LARGEST_JSON)
    try:
        value = json.loads(raw, object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
        if what := disguise(raw):
            raise FusionError(f"{path} is {what}.") from None
        raise FusionError(f"{path} is not readable JSON ({error}): download the file again.") from error
    if not isinstance(value, dict):
        raise FusionError(f"{path} holds no JSON object but a {type(value).__name__}: download it again.")
    return value


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``: ``json`` alone keeps the last of two equal fields silently.

    Raises ``ValueError`` for two equal ones.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:LONGEST_NAME]!r} is in it twice")
    return values


def _download(hub_id: str, revision: str | None) -> Path:
    # Imported here: a local folder needs none of the hub client's import time.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES
        )
    # Exception, because the client lets its transport's own through, and changes transports between versions.
    except Exception as error:
        raise FusionError(_hub_message(hub_id, revision, error)) from error
    return Path(folder)


def _hub_message(hub_id: str, revision: str | None, error: Exception) -> str:
    """One sentence for whatever the hub client raised."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision}" if revision else ""
    # A gated repository is a subclass of one not found, so it is asked first.
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub_id} is a gated repository: accept its terms on its model page, log in with "
            "`hf auth login`, and run again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id} has no revision {revision}: pass an existing branch, tag or commit, or none."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub_id} is neither a local folder nor a repository that the hub shows you: check the "
            "spelling, or log in with `hf auth login` if it is private."
        )
    if isinstance(error, errors.HFValidationError):
        return f"{hub_id}{at} is not a valid hub id: pass org/name or an existing folder."
    if constants.HF_HUB_OFFLINE:
        return (
            f"{hub_id}{at} is not complete in the local cache and HF_HUB_OFFLINE forbids downloading: "
            "unset it, or pass a local folder."
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{hub_id}{at} could not be downloaded ({reason.rstrip('.')}): check the network and the free disk "
        "space and run again, or pass a local folder."
    )
