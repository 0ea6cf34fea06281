"""Push a bundle to the hub: access is checked before the export, and one commit publishes all files or none."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_edge.export.bundle.writer import listed_files
from fusion_edge.export.publishing.model_card import MARK, checkpoint_license, model_card
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.hub.client import check_client, is_hub_id, is_offline, is_revision, open_client, reason_of
from fusion_edge.runtime.system.interruptible import interruptible

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

CARD = "README.md"


@dataclass(frozen=True)
class Destination:
    """A repository of the hub to publish in."""

    hub_id: str
    branch: str | None = None
    """None is the default branch."""
    private: bool = False

    def __post_init__(self) -> None:
        if not is_hub_id(self.hub_id):
            raise UsageError(f"--push-to-hub {self.hub_id} is not a hub id; expected org/name.")
        if self.branch is not None and not is_revision(self.branch):
            raise UsageError(f"--hub-branch {self.branch} is not the name of a branch.")


@dataclass(frozen=True)
class Published:
    """A published bundle."""

    url: str
    commit: str


def prepare_destination(destination: Destination) -> None:
    """Create the repository and its branch unless they exist, and check that the user may write there.

    Raises :class:`FusionError` without a token, without the right to write, or if a repository that must be private is
    public.
    """
    check_client("--push-to-hub")
    api = open_client()
    if is_offline():
        raise FusionError("HF_HUB_OFFLINE forbids --push-to-hub; unset it, or leave --push-to-hub out.")
    with _access_errors(destination.hub_id):
        api.whoami()
        api.create_repo(destination.hub_id, private=destination.private or None, exist_ok=True)
        if destination.private and not api.model_info(destination.hub_id).private:
            raise FusionError(
                f"{destination.hub_id} exists and is public: make it private in its settings, choose another "
                "repository, or drop --private."
            )
        api.auth_check(destination.hub_id, write=True)
        if destination.branch is not None:
            api.create_branch(destination.hub_id, branch=destination.branch, exist_ok=True)


def push_bundle(folder: Path, destination: Destination, checkpoint: Path | None = None) -> Published:
    """Publish a complete bundle with its model card in one commit.

    A card that the user has written, or taken over by deleting its mark, is kept. Files of an earlier bundle that this
    one lacks are deleted. Call :func:`prepare_destination` first.

    Args:
        folder: The bundle. Nothing is written there.
        destination: Where to publish it.
        checkpoint: Folder of the checkpoint, whose card may name a license.

    Raises:
        FusionError: The bundle is damaged, or the upload fails. Then nothing is published.
    """
    bundle = open_bundle(folder)
    api = open_client()
    names = [entry.path for entry in bundle.manifest.files] + [MANIFEST]
    with _upload_errors(folder, destination):
        earlier, has_own_card = _earlier(api, destination)
        operations = _operations(folder, names, earlier)
        if not has_own_card:
            license_fields = checkpoint_license(checkpoint, bundle.manifest.source)
            card = model_card(bundle, destination.hub_id, license_fields)
            operations.append(_addition(CARD, card.encode()))
        message = f"{bundle.manifest.source}: {bundle.manifest.precision}, {bundle.manifest.target}"
        with _progress_bars():
            commit = interruptible(
                lambda: api.create_commit(
                    destination.hub_id, operations, commit_message=message, revision=destination.branch
                ),
                lambda: None,  # what is uploaded without a commit is published nowhere
            )
    return Published(f"{api.endpoint}/{destination.hub_id}", commit.oid)


def _earlier(api: HfApi, destination: Destination) -> tuple[set[str], bool]:
    """Return the files of the branch's earlier bundle, and whether the branch has a card of the user's own."""
    info = api.model_info(destination.hub_id, revision=destination.branch)
    names = {file.rfilename for file in info.siblings or ()}

    def read(name: str) -> Path:
        return Path(api.hf_hub_download(destination.hub_id, name, revision=info.sha))

    listed = names.intersection(listed_files(read(MANIFEST)) if MANIFEST in names else ())
    return listed, CARD in names and MARK not in read(CARD).read_text(encoding="utf-8", errors="replace")


def _operations(
    folder: Path, names: list[str], earlier: Collection[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    from huggingface_hub import CommitOperationDelete

    return [
        *(_addition(name, str(folder / name)) for name in names),
        *(CommitOperationDelete(path_in_repo=name) for name in sorted(earlier) if name not in (*names, CARD)),
    ]


def _addition(name: str, content: str | bytes) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)


@contextmanager
def _progress_bars() -> Iterator[None]:
    """Let the client show its progress bars on a terminal, and nowhere else."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# Errors ------------------------------------------------------------------------------------------------------


@contextmanager
def _access_errors(hub_id: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except FusionError:
        raise
    except errors.LocalTokenNotFoundError:
        raise FusionError(
            f"Pushing to {hub_id} needs a login: run `hf auth login` with a token that may write, or set HF_TOKEN."
        ) from None
    # Exception: the client also lets errors of its transport through, which differ between its versions.
    except Exception as error:
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if status == 401:
            raise FusionError(
                f"Pushing to {hub_id} needs a valid token: run `hf auth login` again, or set HF_TOKEN."
            ) from error
        if status in (403, 404):
            raise FusionError(
                f"You may not write to {hub_id}: check its spelling, and that your token may write there."
            ) from error
        raise FusionError(
            f"{hub_id} cannot be prepared for a push ({reason_of(error)}): check the name and the network, or leave "
            "--push-to-hub out."
        ) from error


@contextmanager
def _upload_errors(folder: Path, destination: Destination) -> Iterator[None]:
    options = f"--push-to-hub {destination.hub_id}"
    if destination.branch is not None:
        options += f" --hub-branch {destination.branch}"
    try:
        yield
    except FusionError:
        raise
    # Exception: the client also lets errors of its transport through, which differ between its versions.
    except Exception as error:
        raise FusionError(
            f"{folder} is complete but not published ({reason_of(error)}); publish it: fusion-export {folder} {options}"
        ) from error
