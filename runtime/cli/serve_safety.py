"""Options of ``fusion-serve`` that say who may ask, what, and how much."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fusion_edge.runtime.cli.options import byte_count, positive_integer
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.serve.api_keys import check_exposure, read_keys
from fusion_edge.runtime.serve.images.data_url import base64_length
from fusion_edge.runtime.serve.images.https_url import is_host_name
from fusion_edge.runtime.serve.images.limits import ImageLimits
from fusion_edge.runtime.serve.limits import RequestLimits
from fusion_edge.runtime.serve.safety import SafetySettings

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(?::[0-9]{1,5})?\Z")
_TEXT_BYTES = 1 << 20  # of a body, beside the picture


def add_safety_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`safety_settings` reads."""
    add = parser.add_argument_group("safety").add_argument
    images = ImageLimits()
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with one API key a line, which requests must have; every --host but the loopback needs it",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin ask, such as https://chat.example; may be repeated (default: none)",
    )
    add(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures of this host by HTTPS, from public addresses only; may be repeated (default: none)",
    )
    add(
        "--allow-image-folder",
        type=Path,
        metavar="FOLDER",
        help="read pictures of this folder, by name or file: URL, without following links (default: none)",
    )
    add(
        "--max-image-size",
        type=byte_count,
        default=images.max_bytes,
        metavar="SIZE",
        help="size of an encoded picture (default: 12MiB)",
    )
    add(
        "--max-image-pixels",
        type=positive_integer,
        default=images.max_pixels,
        metavar="N",
        help=f"pixels of a picture; decoding takes up to five bytes for each (default: {images.max_pixels})",
    )


def safety_settings(arguments: argparse.Namespace) -> SafetySettings:
    """Return the parsed options of :func:`add_safety_options`, checked together with ``arguments.host``.

    Raises:
        UsageError: A value is wrong, or the host is reachable from other machines and there is no key.
    """
    keys = None if arguments.api_key_file is None else read_keys(arguments.api_key_file)
    check_exposure(arguments.host, keys)
    images = ImageLimits(
        hosts=tuple(map(_image_host, arguments.allow_image_host)),
        folder=None if arguments.allow_image_folder is None else _folder(arguments.allow_image_folder),
        max_bytes=arguments.max_image_size,
        max_pixels=arguments.max_image_pixels,
    )
    if not images.max_bytes:
        raise UsageError("--max-image-size is 0, which no picture fits; expected a size such as 12MiB.")
    body_bytes = base64_length(images.max_bytes) + _TEXT_BYTES
    requests = RequestLimits(body_bytes=body_bytes, receiving_bytes=2 * body_bytes)
    return SafetySettings(keys, tuple(map(_origin, arguments.allow_origin)), requests, images)


def _image_host(text: str) -> str:
    host = text.lower()
    if not is_host_name(host):
        raise UsageError(f"--allow-image-host {text} is no full host name such as images.example.com.")
    return host


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UsageError(f"--allow-image-folder {path} is no folder; check the path.")
    return path.resolve()


def _origin(text: str) -> str:
    if not _ORIGIN.match(text):
        raise UsageError(f"--allow-origin {text} is no origin; expected scheme and host, such as https://chat.example.")
    return text
