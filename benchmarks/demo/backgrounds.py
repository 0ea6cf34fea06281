"""Photo-like backgrounds of the demo's pictures: a color, a texture, blotches, a gradient and a vignette."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.benchmarks.demo.arrangement import PICTURE_SIZE

Floats = npt.NDArray[np.float32]

COLORS = {
    "red": (176, 44, 42),
    "green": (62, 132, 62),
    "blue": (52, 92, 176),
    "yellow": (240, 204, 62),
    "purple": (124, 66, 156),
    "white": (244, 242, 238),
    "gray": (130, 130, 130),
    "brown": (112, 74, 44),
}
"""Name of each dominant color, and its mean."""
BANK = 768  # pixels; pictures show random parts of textures of this size
TEXTURES = {
    "train": ("plain", "grain", "fabric", "wood", "paper", "tiles"),
    "held_out": ("plain", "grain", "fabric", "wood", "paper", "tiles", "stripes", "checks"),
}
"""Textures of each split; training never shows the last two."""


def background(color: str, rng: np.random.Generator, split: str) -> Image.Image:
    """Return an RGB image whose dominant color is ``color``."""
    texture = TEXTURES[split][rng.integers(len(TEXTURES[split]))]
    left, top = rng.integers(0, BANK - PICTURE_SIZE, 2).tolist()
    patch = _texture(texture, bool(rng.random() < 0.5))[top : top + PICTURE_SIZE, left : left + PICTURE_SIZE]
    brightness = patch * np.float32(rng.uniform(0.5, 1.2))
    brightness += _light(rng)
    np.clip(brightness, 0, 255, out=brightness)
    levels = Image.fromarray(brightness.astype(np.uint8))
    mean = np.array(COLORS[color]) + rng.uniform(-8, 8) + rng.uniform(-3, 3, 3)
    # Brightness 140 is the color itself; 0 is 45 % and 255 is 145 % of it.
    scale = 0.45 + np.arange(256) / 255
    tables = np.clip(mean[:, None] * scale, 0, 255).astype(np.uint8)
    return Image.merge("RGB", [levels.point(table.tolist()) for table in tables])


def _light(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a gradient, blotches and a vignette around a brightness of 128: ``[384, 384]``."""
    side = 24
    along = np.linspace(-1, 1, side)
    x, y = along, along[:, None]
    slope = rng.uniform(-18, 18, 2)
    blotches = Image.fromarray(rng.normal(0, 10, (6, 6)).astype(np.float32))
    field = 128 + np.asarray(blotches.resize((side, side), Image.Resampling.BICUBIC))
    field = field + slope[0] * x + slope[1] * y - rng.uniform(0, 22) * (x * x + y * y - 0.6)
    coarse = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))
    return np.asarray(coarse.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BILINEAR))


@cache
def _texture(name: str, upright: bool) -> Floats:
    """Return a texture in steps of brightness, with mean 0: ``[768, 768]``."""
    if not upright:
        return np.ascontiguousarray(_texture(name, True).T)
    rng = np.random.default_rng(list(name.encode()))
    y, x = np.mgrid[:BANK, :BANK].astype(np.float32)
    if name == "plain":
        texture = _noise(rng, 40) * 3
    elif name == "grain":
        texture = _noise(rng, 2) * 7 + _noise(rng, 9) * 4
    elif name == "fabric":
        texture = 9 * np.sin(x * 1.05 + _noise(rng, 30)) * np.sin(y * 1.05 + _noise(rng, 30)) + _noise(rng, 3) * 4
    elif name == "wood":
        rings = np.sin(x / 7 + 2.2 * _noise(rng, 160, 40) + 0.8 * _noise(rng, 60, 10))
        planks = np.abs((x % 128) - 64) > 62
        texture = 9 * rings + _noise(rng, 24, 2) * 6 - 30 * planks
    elif name == "paper":
        texture = _noise(rng, 16) * 6 + _noise(rng, 5) * 4 + _noise(rng, 1) * 2
    elif name == "tiles":
        seams = (np.abs((x % 96) - 48) > 46) | (np.abs((y % 96) - 48) > 46)
        tones = np.kron(rng.normal(0, 6, (8, 8)), np.ones((96, 96)))
        texture = tones - 22 * seams + _noise(rng, 3) * 3
    elif name == "stripes":
        texture = 14 * np.sign(np.sin(x / 9)) + _noise(rng, 3) * 3
    else:
        texture = 9 * np.sign(np.sin(x / 14)) + 9 * np.sign(np.sin(y / 14)) + _noise(rng, 3) * 3
    centered: Floats = (texture - texture.mean()).astype(np.float32)
    return centered


def _noise(rng: np.random.Generator, height: int, width: int | None = None) -> Floats:
    """Return smooth noise with blotches of that size in pixels and standard deviation 1: ``[768, 768]``."""
    rows, columns = BANK // height + 2, BANK // (width or height) + 2
    coarse = Image.fromarray(rng.normal(0, 1, (rows, columns)).astype(np.float32))
    smooth: Floats = np.array(coarse.resize((BANK, BANK), Image.Resampling.BICUBIC))
    smooth /= smooth.std()
    return smooth
