"""Download a bundle into the hub's cache: only what its manifest lists, checked before and after.

The cache keeps a repository as ``snapshots/COMMIT/NAME``, links to ``blobs/HASH``. The commit that a branch stands for
is written last (``refs/BRANCH``), so an interrupted update leaves the earlier bundle in use.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_edge.runtime.bundle.files import FileEntry, check_digest, leads_outside
from fusion_edge.runtime.bundle.json_file import LARGEST
from fusion_edge.runtime.bundle.manifest import MANIFEST, Manifest
from fusion_edge.runtime.bundle.reader import read_manifest
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.hub.client import (
    check_client,
    error_message,
    is_commit,
    is_offline,
    is_revision,
    is_unreachable,
    open_client,
    reason_of,
)
from fusion_edge.runtime.hub.progress_bar import progress_bar
from fusion_edge.runtime.system.output_file import write_whole
from fusion_edge.runtime.system.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

DAMAGED = "It is deleted. Run again; if that fails, too, the repository itself is damaged."


@dataclass(frozen=True)
class Snapshot:
    """A complete bundle in the hub's cache."""

    folder: Path
    commit: str
    unreachable: str = ""
    """Why a newer commit could not be looked up or downloaded; empty if it was, or need not be."""


def download_bundle(hub_id: str, revision: str | None) -> Snapshot:
    """Return a bundle of the hub, downloaded unless the cache holds it.

    A commit that is in the cache, and ``HF_HUB_OFFLINE``, need no network. If the hub does not answer, the commit that
    the cache knows for the branch is used.

    Raises:
        UsageError: The revision is not a name.
        FusionError: The hub cannot provide the bundle, or what it provides is no bundle, or damaged.
    """
    if revision is not None and not is_revision(revision):
        raise UsageError(f"The revision is {revision[:80]!r}; expected a branch, tag or commit.")
    check_client(f"There is no folder {hub_id}, and the hub")
    cached = _cached(hub_id, revision)
    if cached is not None and (is_commit(revision or "") or is_offline()):
        return cached
    try:
        return _Download(open_client(), hub_id, revision).run()
    except FusionError:
        raise
    # Exception: the client also lets errors of its transport through, which differ between its versions.
    except Exception as error:
        if cached is not None and is_unreachable(error):
            return Snapshot(cached.folder, cached.commit, reason_of(error))
        raise FusionError(error_message(hub_id, revision, error)) from error


def _cached(hub_id: str, revision: str | None) -> Snapshot | None:
    """Return the bundle that the cache holds for a revision, if it is complete."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(hub_id, MANIFEST, revision=revision)
    except HFValidationError as error:
        raise FusionError(error_message(hub_id, revision, error)) from error
    if not isinstance(path, str):
        return None
    folder = Path(path).parent
    try:
        manifest = read_manifest(folder)
    except FusionError:  # damaged; a download replaces it
        return None
    return Snapshot(folder, folder.name) if not _missing(folder, manifest.files) else None


class _Download:
    def __init__(self, api: HfApi, hub_id: str, revision: str | None) -> None:
        self.api = api
        self.hub_id = hub_id
        self.revision = revision
        self.commit = ""

    def run(self) -> Snapshot:
        from huggingface_hub import constants

        info = self.api.model_info(
            self.hub_id, revision=self.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        if not is_commit(info.sha or ""):
            raise ValueError(f"the hub gave {str(info.sha)[:80]!r} for a commit")
        self.commit = str(info.sha)
        offered = {file.rfilename: file for file in info.siblings or ()}
        folder = self._manifest_folder(offered)
        manifest = read_manifest(folder)
        self._check_offered(manifest, offered)
        missing = _missing(folder, manifest.files)
        if missing:
            self._check_disk(folder, missing)
            self._fetch_and_verify(folder, missing)
        if not is_commit(self.revision or ""):
            _remember(folder, self.revision or constants.DEFAULT_REVISION)
        return Snapshot(folder, self.commit)

    def _manifest_folder(self, offered: Mapping[str, RepoSibling]) -> Path:
        """Download the manifest and return its folder."""
        if MANIFEST not in offered:
            if "config.json" in offered:
                raise FusionError(
                    f"{self.hub_id} is a checkpoint, not a bundle: run fusion-export {self.hub_id} -o BUNDLE and pass "
                    "that folder."
                )
            raise FusionError(
                f"{self.hub_id} is not a bundle: it has no {MANIFEST}. Pass a repository that "
                "fusion-export --push-to-hub wrote."
            )
        size = offered[MANIFEST].size
        if size is None or size > LARGEST:
            raise FusionError(f"{self.hub_id} has a {MANIFEST} of {size} bytes; expected at most {LARGEST}.")
        path = self._fetch(MANIFEST)
        if path.stat().st_size != size:  # a file of the cache that was cut by a power failure
            _discard(path)
            path = self._fetch(MANIFEST)
        return path.parent

    def _check_offered(self, manifest: Manifest, offered: Mapping[str, RepoSibling]) -> None:
        """Raise :class:`FusionError` unless the hub has every listed file, inside the folder and with its size."""
        for entry in manifest.files:
            where = f"{MANIFEST} of {self.hub_id} lists {entry.path!r}"
            if leads_outside(entry.path):
                raise FusionError(f"{where}, which leads outside its folder; do not use it.")
            file = offered.get(entry.path)
            if file is None:
                raise FusionError(f"{where}, which the repository lacks; its owner must push the bundle again.")
            if file.size != entry.size or (file.lfs is not None and file.lfs.sha256 != entry.sha256):
                raise FusionError(
                    f"{where}, but the repository holds another file of that name; its owner must push the bundle "
                    "again."
                )

    def _check_disk(self, folder: Path, missing: list[FileEntry]) -> None:
        needed, free = sum(entry.size for entry in missing), shutil.disk_usage(folder).free
        if free < needed:
            raise FusionError(
                f"The disk of {folder} has {format_bytes(free)} free; {self.hub_id} needs {format_bytes(needed)}. Free "
                "some space, or set HF_HUB_CACHE to a folder of another disk."
            )

    def _fetch_and_verify(self, folder: Path, missing: list[FileEntry]) -> None:
        """Download files and check their SHA-256. A file that is not verified does not stay in the snapshot."""
        total = sum(entry.size for entry in missing)
        unverified = []
        try:
            with Progress(f"Downloading {self.hub_id}", total) as progress:
                for entry in missing:
                    path = folder / entry.path
                    if path.is_file() and path.stat().st_size != entry.size:  # not: another process has just got it
                        _discard(path)
                    unverified.append(entry)
                    before = progress.done
                    self._fetch(entry.path, progress)
                    progress.advance(before + entry.size - progress.done)  # none is counted for a blob of the cache
            with Progress("Verifying", total) as progress:
                for entry in tuple(unverified):
                    try:
                        check_digest(folder, entry, MANIFEST, DAMAGED, progress.advance)
                    except FusionError:
                        _discard(folder / entry.path)
                        raise
                    unverified.remove(entry)
        finally:
            for entry in unverified:
                (folder / entry.path).unlink(missing_ok=True)  # its blob stays: no second download

    def _fetch(self, name: str, progress: Progress | None = None) -> Path:
        from huggingface_hub import hf_hub_download

        bar = progress_bar(progress)
        return Path(
            hf_hub_download(
                self.hub_id,
                name,
                revision=self.commit,
                library_name="fusion-edge",
                tqdm_class=bar,
            )
        )


def _missing(folder: Path, entries: tuple[FileEntry, ...]) -> list[FileEntry]:
    """Return the files that a snapshot lacks, or has with another size."""
    return [
        entry for entry in entries if not (path := folder / entry.path).is_file() or path.stat().st_size != entry.size
    ]


def _discard(path: Path) -> None:
    """Delete a file of a snapshot and the blob that it links to, so that the client downloads it again."""
    if path.is_symlink():
        (path.parent / path.readlink()).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _remember(folder: Path, revision: str) -> None:
    """Note in the cache that the folder's commit is that of a branch or tag."""
    reference = folder.parent.parent / "refs" / revision
    with suppress(OSError, FusionError):  # a cache that is only readable
        if not reference.is_file() or reference.read_text(encoding="utf-8", errors="replace") != folder.name:
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_whole(reference, folder.name)
