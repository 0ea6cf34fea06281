"""Make ``things.png``, the images of the demo's things, from Noto Emoji.

The npm package ``@iconify-json/noto`` carries the drawings (Google, Apache-2.0); the PyPI package ``resvg-py`` draws
them. Only this script needs either::

    npm pack @iconify-json/noto@1.2.9 && tar xzf iconify-json-noto-1.2.9.tgz
    python -m fusion_edge.benchmarks.demo.make_atlas package
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.demo.atlas import ATLAS, CELL, COLUMNS, KINDS
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError, UsageError

BORDER = 1  # transparent pixels around each image, so that rotated ones have soft edges
DRAWN = 512  # pixels, before reduction
COLORS, ALPHAS = 240, 16  # in the palette: colors, then levels of alpha
FAINT = 24  # alpha of parts that don't count as the thing's outline


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("package", type=Path, help="unpacked folder of the npm package @iconify-json/noto")
    parser.add_argument("--output", type=Path, default=ATLAS, help="file to write (default: %(default)s)")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    split_alpha(make_atlas(options.package)).save(options.output, optimize=True)
    return 0


def make_atlas(package: Path) -> Image.Image:
    """Draw every kind: RGBA. Raises :class:`UsageError` if the folder lacks a drawing."""
    try:
        icons = json.loads((package / "icons.json").read_text())["icons"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{package} is not a folder of @iconify-json/noto: {error}") from error
    atlas = Image.new("RGBA", (COLUMNS * CELL, -(-len(KINDS) // COLUMNS) * CELL))
    for number, kind in enumerate(KINDS.values()):
        if kind.icon not in icons:
            raise UsageError(f"{package} has no drawing named {kind.icon!r}.")
        row, column = divmod(number, COLUMNS)
        atlas.paste(_draw(icons[kind.icon]), (column * CELL, row * CELL))
    return atlas


def _draw(icon: dict[str, Any]) -> Image.Image:
    """Return a drawing, trimmed and centered: ``[96, 96]`` RGBA."""
    try:
        resvg: Any = importlib.import_module("resvg_py")
    except ImportError as error:
        raise FusionError("Drawing the atlas needs resvg-py: pip install resvg-py.") from error

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 128 128">'
        f"{icon['body']}</svg>"
    )
    drawn = bytes(resvg.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN))
    large = Image.open(io.BytesIO(drawn)).convert("RGBA")
    outline = large.getchannel("A").point([255 * (alpha > FAINT) for alpha in range(256)])
    trimmed = large.crop(outline.getbbox())
    scale = (CELL - 2 * BORDER) / max(trimmed.size)
    width, height = (max(1, round(side * scale)) for side in trimmed.size)
    cell = Image.new("RGBA", (CELL, CELL))
    small = trimmed.resize((width, height), Image.Resampling.LANCZOS)
    cell.paste(small, ((CELL - width) // 2, (CELL - height) // 2))
    return cell


def split_alpha(atlas: Image.Image) -> Image.Image:
    """Return a palette image with the colors in its upper half and alpha, as grays, in its lower half.

    A palette of RGBA would spend most of its colors on the edges.
    """
    pixels = np.asarray(atlas)
    seen = pixels[..., 3] > 0
    strip = Image.fromarray(pixels[seen][None, :, :3])
    quantized = strip.quantize(COLORS, Image.Quantize.MEDIANCUT, kmeans=8, dither=Image.Dither.NONE)
    colors = np.zeros(seen.shape, np.uint8)
    colors[seen] = np.asarray(quantized)[0]
    steps = 255 // (ALPHAS - 1)
    alphas = COLORS + np.round(pixels[..., 3] / steps).astype(np.uint8)
    split = Image.fromarray(np.concatenate([colors, alphas]), "P")
    palette = [*(quantized.getpalette() or []), *[0] * (3 * COLORS)][: 3 * COLORS]
    split.putpalette(palette + [level * steps for level in range(ALPHAS) for _ in range(3)])
    return split


if __name__ == "__main__":
    sys.exit(main())
