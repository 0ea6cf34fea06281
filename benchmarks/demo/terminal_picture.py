"""Show a picture in a terminal."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = 48  # of a picture
CHUNK = 4096  # largest payload of kitty's protocol, in characters


def terminal_picture(picture: Path, environment: Mapping[str, str]) -> str | None:
    """Return the characters that draw a PNG file in the terminal, or None if the terminal cannot.

    Terminals name themselves in environment variables. Kitty's protocol:
    https://sw.kovidgoyal.net/kitty/graphics-protocol; iTerm2's: https://iterm2.com/documentation-images.html. A
    terminal with 24-bit color draws two pixels in a character.
    """
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if terminal in ("xterm-kitty", "xterm-ghostty"):
        return _kitty(picture.read_bytes())
    if program in ("iTerm.app", "WezTerm"):
        return _iterm(picture.read_bytes())
    if environment.get("COLORTERM") in ("truecolor", "24bit") and "NO_COLOR" not in environment:
        return _half_blocks(picture)
    return None


def _kitty(png: bytes) -> str:
    payload = b64encode(png).decode()
    chunks = [payload[start : start + CHUNK] for start in range(0, len(payload), CHUNK)]
    keys = [f"a=T,f=100,q=2,c={COLUMNS},m=1", *["m=1"] * (len(chunks) - 1)]
    keys[-1] = keys[-1].replace("m=1", "m=0")
    return "".join(f"\x1b_G{key};{chunk}\x1b\\" for key, chunk in zip(keys, chunks, strict=True)) + "\n"


def _iterm(png: bytes) -> str:
    payload = b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={COLUMNS}:{payload}\x07\n"


def _half_blocks(picture: Path) -> str:
    with Image.open(picture) as image:
        rows = max(1, COLUMNS * image.height // image.width // 2)
        pixels = np.asarray(image.convert("RGB").resize((COLUMNS, 2 * rows), Image.Resampling.BOX))
    lines = [
        "".join(f"\x1b[38;2;{_color(top)};48;2;{_color(bottom)}m▀" for top, bottom in zip(*pair, strict=True))
        for pair in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True)
    ]
    return "".join(f"{line}\x1b[0m\n" for line in lines)


def _color(rgb: list[int]) -> str:
    return ";".join(map(str, rgb))
