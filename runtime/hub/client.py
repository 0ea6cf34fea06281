"""The hub's client, imported on first use, and one sentence for each of its errors."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fusion_edge.runtime.errors import FusionError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OLDEST_CLIENT = (1, 8)
"""Oldest version of ``huggingface_hub``, the one of the extra ``hub``."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_REVISION = re.compile(r"[\w-][\w.+-]*(/[\w-][\w.+-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form ``org/name``."""
    return _HUB_ID.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """Return whether a text may name a branch, a tag or a commit. No part of it is ``..``: it also names a file."""
    return _REVISION.fullmatch(text) is not None


def is_commit(text: str) -> bool:
    """Return whether a text is the id of a commit, which never changes its files."""
    return _COMMIT.fullmatch(text) is not None


def check_client(needed_by: str) -> None:
    """Raise :class:`FusionError` if ``huggingface_hub`` is not installed, or too old, which other packages allow.

    ``needed_by`` begins the message.
    """
    if find_spec("huggingface_hub") is not None:
        installed = version("huggingface_hub")
        if tuple(map(int, installed.split(".")[:2])) >= OLDEST_CLIENT:
            return
        found = f", not {installed}"
    else:
        found = ""
    oldest = ".".join(map(str, OLDEST_CLIENT))
    raise FusionError(
        f"{needed_by} needs huggingface_hub {oldest} or newer{found}: run pip install '.[hub]' in a clone of "
        "fusion-edge."
    )


def open_client() -> HfApi:
    """Return a client with the user's endpoint, cache and login."""
    from huggingface_hub import HfApi

    return HfApi(library_name="fusion-edge")


def is_offline() -> bool:
    """Return whether ``HF_HUB_OFFLINE`` forbids the client every connection."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def is_unreachable(error: Exception) -> bool:
    """Return whether an error of the client is no answer of the hub: no network, a proxy's page, an outage."""
    from huggingface_hub import errors

    error = _cause_of(error)
    answers = (
        errors.BadRequestError,
        errors.DisabledRepoError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    )
    is_forbidden = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
    return not (is_forbidden or isinstance(error, answers))


def reason_of(error: Exception) -> str:
    """Return an error of the client in one line, without its advice."""
    error = _cause_of(error)
    text = " ".join(str(error).split()).partition(" For more information check: ")[0]  # a page about HTTP
    return text.rstrip(".") or type(error).__name__


def _cause_of(error: Exception) -> Exception:
    """Return what made the client look for a file in its cache, in vain; or the error itself."""
    from huggingface_hub import errors

    cause = error.__cause__
    return cause if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception) else error


def error_message(hub_id: str, revision: str | None, error: Exception) -> str:
    """Return one sentence for an error of a download."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    # First, because it is a subclass of RepositoryNotFoundError.
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub_id} is a gated repository: accept its terms on its model page, log in with `hf auth login`, and run "
            "again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id} has no revision {revision}: pass an existing branch, tag or commit, or none."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub_id} is neither a local folder nor a repository that you can access: check the spelling, or log in "
            "with `hf auth login` if it is private."
        )
    if isinstance(error, errors.HFValidationError):
        return f"{hub_id}{at} is not a valid hub id: pass org/name or an existing folder."
    if is_offline():
        return (
            f"{hub_id}{at} is not complete in the local cache, and HF_HUB_OFFLINE forbids downloading: unset it, or "
            "pass a local folder."
        )
    return (
        f"{hub_id}{at} could not be downloaded ({reason_of(error)}): check the network and the free disk space and "
        "run again, or pass a local folder."
    )
