"""Draws the demo's scenes: sprites with shadows, in random light, on a photo-like background."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from fusion_edge.benchmarks.demo.arrangement import PICTURE_SIZE, Scene, Thing, distance
from fusion_edge.benchmarks.demo.atlas import CELL, image
from fusion_edge.benchmarks.demo.backgrounds import background

Pixels = npt.NDArray[np.uint8]

SHADOW = 0.38  # of the light
SHADOW_SHIFT = 5.0  # pixels
SHADOW_SOFTNESS = 4  # pixels
CUT_SHARE = 0.25  # of the things slip under the background
MAX_HIDDEN = 0.25  # of a thing
NOISE_BANK = 512  # pixels
NOISE_LEVELS = 6
_SHADES = [round(SHADOW * alpha) for alpha in range(256)]
_BLUR = {"train": 1.5, "held_out": 1.8}
"""Largest radius in pixels."""
_LIGHT = {"train": (0.86, 1.0), "held_out": (0.83, 1.04)}
"""Brightness of the whole picture."""


def render(scene: Scene, rng: np.random.Generator, split: str = "train") -> Pixels:
    """Draw the scene with the ranges of a split: ``[384, 384, 3]`` RGB."""
    canvas = background(scene.background, rng, split)
    light = rng.uniform(0, 2 * np.pi)
    shadow = round(SHADOW_SHIFT * np.cos(light)), round(SHADOW_SHIFT * np.sin(light))
    blur = rng.uniform(0, _BLUR[split])
    for index in rng.permutation(len(scene)):
        thing = scene.things[index]
        is_cut = rng.random() < CUT_SHARE and not _touches(thing, scene)
        _draw(canvas, thing, shadow, blur, is_cut, rng)
    return _expose(canvas, rng, split)


def _touches(thing: Thing, scene: Scene) -> bool:
    """Tell whether another thing may hide a part of this one."""
    return any(other is not thing and distance(thing, other) < np.sqrt(2) for other in scene)


def _draw(
    canvas: Image.Image,
    thing: Thing,
    shadow: tuple[int, int],
    blur: float,
    is_cut: bool,
    rng: np.random.Generator,
) -> None:
    """Paste a thing and its shadow onto the canvas."""
    colors = _colored(thing.kind, rng)
    sprite = _turn(colors if thing.radius > CELL / 3 else colors.reduce(2), thing)
    if blur > 0.4:
        sprite = sprite.filter(ImageFilter.BoxBlur(blur))
    sprite = sprite.convert("RGBA")
    if is_cut:
        sprite = _cut(sprite, thing, rng)
    coarse = sprite.getchannel("A").reduce(SHADOW_SOFTNESS).point(_SHADES)
    shade = coarse.resize(sprite.size, Image.Resampling.BILINEAR)  # enlarged, its edge is soft
    left, top = _corner(thing)
    canvas.paste((0, 0, 0), (left + shadow[0], top + shadow[1]), shade)
    canvas.paste(sprite, (left, top), sprite)


def _half(thing: Thing) -> int:
    """Return half the side of a turned image, with a margin for its blur and its soft shadow."""
    half = int(thing.radius * (np.cos(thing.angle) + abs(np.sin(thing.angle)))) + 6
    return half + half % 2  # the side is a multiple of SHADOW_SOFTNESS


def _corner(thing: Thing) -> tuple[int, int]:
    """Return where the top left pixel of a turned image is in the picture."""
    half = _half(thing)
    return round(thing.center[0]) - half, round(thing.center[1]) - half


def _turn(source: Image.Image, thing: Thing) -> Image.Image:
    """Return the image of a thing in its size, angle and direction, with a margin."""
    half, (left, top) = _half(thing), _corner(thing)
    # From pixels of the result to those of the source.
    scale = source.width / (2 * thing.radius)
    cosine, sine = scale * np.cos(thing.angle), scale * np.sin(thing.angle)
    flip = -1 if thing.mirrored else 1
    x, y = thing.center[0] - left, thing.center[1] - top
    middle = source.width / 2
    matrix = (
        *(flip * cosine, flip * sine, middle - flip * (cosine * x + sine * y)),
        *(-sine, cosine, middle + sine * x - cosine * y),
    )
    return source.transform((2 * half, 2 * half), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _cut(sprite: Image.Image, thing: Thing, rng: np.random.Generator) -> Image.Image:
    """Hide an edge of a thing, as if it were under the background, unless that hides more than ``MAX_HIDDEN``."""
    direction, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.8) * thing.radius
    along = np.arange(sprite.width, dtype=np.float32) - np.float32(sprite.width / 2)
    x, y = along * np.float32(np.cos(direction)), along[:, None] * np.float32(np.sin(direction))
    inside = np.float32(distance) - x - y
    pixels = np.array(sprite)
    alpha = pixels[..., 3] * np.clip(inside + np.float32(0.5), 0, 1)
    if alpha.sum() < (1 - MAX_HIDDEN) * pixels[..., 3].sum():
        return sprite
    pixels[..., 3] = alpha
    pixels[..., :3] = pixels[..., :3] * np.clip(0.55 + inside / 15, 0, 1)[..., None]  # shadow of the background
    return Image.fromarray(pixels)


def _colored(kind: str, rng: np.random.Generator) -> Image.Image:
    """Return the image of a kind in slightly other colors, premultiplied: turning it leaves no dark edge."""
    source = image(kind)
    colors = source.convert("RGB").convert("RGB", _color_shift(rng))
    colors.putalpha(source.getchannel("A"))
    return colors.convert("RGBa")


def _color_shift(rng: np.random.Generator) -> tuple[float, ...]:
    """Return a 3 x 4 matrix that turns hues a little and changes brightness and saturation."""
    hue, saturation, brightness = rng.uniform(-0.13, 0.13), rng.uniform(0.8, 1.12), rng.uniform(0.85, 1.1)
    # Rodrigues' rotation about the gray axis: entries of a circulant matrix.
    cosine, sine = saturation * np.cos(hue), saturation * np.sin(hue) / np.sqrt(3)
    even = (1 - cosine) / 3
    same, after, before = brightness * (cosine + even), brightness * (even - sine), brightness * (even + sine)
    offset = rng.uniform(-8, 8)
    return (same, after, before, offset, before, same, after, offset, after, before, same, offset)


def _expose(canvas: Image.Image, rng: np.random.Generator, split: str) -> Pixels:
    """Change brightness and tint of the whole picture, and add noise."""
    level = int(rng.integers(NOISE_LEVELS))
    noise = _noise(level)
    reach = int(noise.max())
    gains = rng.uniform(*_LIGHT[split]) * rng.uniform(0.985, 1.015, 3)
    # Colors keep away from 0 and 255 by what noise adds at most, so that sums of 8-bit numbers don't wrap.
    tables = np.clip(gains[:, None] * np.arange(256), reach, 255 - reach)
    pixels = np.array(canvas.point(tables.astype(int).ravel().tolist()))
    left, top = rng.integers(0, NOISE_BANK - PICTURE_SIZE, 2).tolist()
    pixels += noise[top : top + PICTURE_SIZE, left : left + PICTURE_SIZE].view(np.uint8)
    return pixels


@cache
def _noise(level: int) -> npt.NDArray[np.int8]:
    """Return gray noise whose standard deviation grows with ``level``: ``[512, 512, 3]``."""
    deviation = 0.8 + 0.8 * level
    noise = np.random.default_rng(level).normal(0, deviation, (NOISE_BANK, NOISE_BANK, 1))
    return np.round(np.clip(noise, -3 * deviation, 3 * deviation) + np.zeros(3)).astype(np.int8)
