"""Options of ``fusion-export`` that publish a bundle."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fusion_edge.export.publishing.push import Destination
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.errors import UsageError

HUB = "hub"
"""Group of the options in ``--help``."""
_USED = ("checkpoint", "push_to_hub", "private", "hub_branch", "json")


def add_hub_options(group: argparse._ArgumentGroup) -> None:
    """Add the options to their group."""
    add = group.add_argument
    add(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="publish the complete bundle, with a model card, in this repository; with a bundle in place of the "
        "checkpoint, publish that",
    )
    add("--private", action="store_true", help="create the repository as a private one, and refuse a public one")
    add("--hub-branch", metavar="BRANCH", help="branch to publish in, created if need be (default: main)")


def given_destination(arguments: argparse.Namespace) -> Destination | None:
    """Return where to publish, or None. Raise :class:`UsageError` for options that do not fit together."""
    if arguments.push_to_hub is None:
        if arguments.private or arguments.hub_branch is not None:
            flag = "--private" if arguments.private else "--hub-branch"
            raise UsageError(f"{flag} only works with --push-to-hub ORG/NAME; add it.")
        return None
    if arguments.dry_run:
        raise UsageError("--dry-run writes nothing, and --push-to-hub publishes; drop one.")
    return Destination(arguments.push_to_hub, arguments.hub_branch, arguments.private)


def existing_bundle(arguments: argparse.Namespace) -> Path | None:
    """Return the folder if a bundle is given in place of a checkpoint. Raise :class:`UsageError` for other options."""
    folder = Path(os.path.expanduser(arguments.checkpoint))
    if not arguments.checkpoint or not (folder / MANIFEST).is_file():
        return None
    values: dict[str, Any] = vars(arguments)
    if any(value not in (None, False, []) for name, value in values.items() if name not in _USED):
        raise UsageError(f"{folder} is a bundle, which is published as it is; drop the options of an export.")
    return folder
