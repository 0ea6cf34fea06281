"""``fusion-serve``: answer OpenAI's API with a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli.bundle_argument import add_bundle, given_bundle
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.model_options import add_device_options, load_options
from fusion_edge.runtime.cli.options import port_number, positive_integer, positive_seconds
from fusion_edge.runtime.cli.serve_safety import add_safety_options, safety_settings
from fusion_edge.runtime.serve import logs
from fusion_edge.runtime.serve.app import make_app
from fusion_edge.runtime.serve.server import listen, serve
from fusion_edge.runtime.serve.settings import ServeSettings
from fusion_edge.runtime.system.malloc import return_large_blocks


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fusion-serve`` and return the exit code."""
    return run_command(_serve, parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """Return the command line parser of ``fusion-serve``."""
    parser = argparse.ArgumentParser(
        prog="fusion-serve", description="Serve a bundle over HTTP, for whatever speaks OpenAI's chat completions."
    )
    add, defaults = parser.add_argument, ServeSettings
    add_bundle(parser)
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)")
    add("--port", type=port_number, default=8000, metavar="N", help="port; 0 is any free one (default: %(default)s)")
    add("--model-name", metavar="NAME", help="id of the model in requests (default: the bundle's name)")
    add(
        "--queue",
        type=positive_integer,
        default=defaults.queue,
        metavar="N",
        help="requests that may wait; more are refused with status 429 (default: %(default)s)",
    )
    add(
        "--cached-images",
        type=positive_integer,
        default=defaults.cached_images,
        metavar="N",
        help="pictures whose features stay in memory; fusion-info gives their bytes (default: %(default)s)",
    )
    add(
        "--drain-seconds",
        type=positive_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time that requests have to finish after SIGTERM (default: %(default)g)",
    )
    add_device_options(parser)
    add_safety_options(parser)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    safety = safety_settings(arguments)
    source = given_bundle(arguments)
    folder = Path(source.folder)
    open_bundle(folder)  # a wrong folder is an error before anything listens
    name = arguments.model_name or source.hub_id or folder.resolve().name
    options = load_options(arguments)
    settings = ServeSettings(
        folder, name, queue=arguments.queue, cached_images=arguments.cached_images, safety=safety, **options
    )
    listener = listen(arguments.host, arguments.port)
    with listener:
        logs.configure()
        return_large_blocks()
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        _say(f"loading {source}")
        ready = f"serving {name} at http://{address}:{port}/v1"
        serve(make_app(settings), listener, safety.requests, arguments.drain_seconds, lambda: _say(ready))
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
