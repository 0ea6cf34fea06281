"""The argument of every command that takes a bundle: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys

from fusion_edge.runtime.hub.bundle_source import BundleSource, find_bundle


def add_bundle(parser: argparse.ArgumentParser, text: str = "folder that fusion-export wrote") -> None:
    """Add the bundle and ``--revision`` to a command. ``text`` describes the folder."""
    parser.add_argument("bundle", help=f"{text}, or a hub id such as org/name; a folder of that name wins")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)")


def given_bundle(arguments: argparse.Namespace) -> BundleSource:
    """Return the given bundle, downloaded if it is a hub id. A note says if the hub could not be asked for updates.

    Raises :class:`UsageError` or :class:`FusionError` as :func:`find_bundle`.
    """
    source = find_bundle(arguments.bundle, arguments.revision)
    if source.unreachable:
        sys.stderr.write(f"note: no update from the hub ({source.unreachable}): using {source}\n")
    return source
