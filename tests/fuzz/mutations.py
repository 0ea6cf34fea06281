"""Helpers of all kinds: damage values, JSON trees and bytes with a seeded generator.

Every function draws from ``random.Random`` alone, so a seed reproduces its mutant.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

NUMBERS: tuple[float, ...] = (
    0, -0.0, 1, -1, 2, 3, 4, 7, 8, 16, 63, 64, 127, 128, 255, 256, 511, 1023, 65535, 65536,
    2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400,
    0.5, 1.5, 1e-45, 1e-300, 1e38, 1e39, 1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
TEXTS = (
    "", " ", "x", "0", "1", "-1", "1e9", "nan", "null", "true", "../secret", "/etc/hostname", "a\0b", "\ud800",
    "<|end|>", "<image>", "<latent_image>", "<vision_start>", "</s>", "é", "e\u0301", "\u200b", "\u202eabc", "😀",
    "\ufeff", "x" * 300, "float16", "bfloat16", "int8", "{}", "[]", "%s", "'", '"', "\\", "\n", "model.safetensors",
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"

Json = Any


def value(draw: Random) -> Json:
    """Return a value of any JSON type, mostly an unexpected one."""
    make: Callable[[], Json] = draw.choice(
        [
            lambda: draw.choice(NUMBERS),
            lambda: draw.choice(NUMBERS),
            lambda: draw.choice(TEXTS),
            lambda: draw.choice([None, True, False]),
            lambda: draw.choice([[], {}, [None], [[]], {"": None}, {"content": 1}]),
            lambda: nested(draw.choice([3, 50, 900])),
            lambda: [draw.choice(NUMBERS) for _ in range(draw.randrange(20))],
            lambda: draw.randrange(-(2**40), 2**40),
            lambda: draw.gauss(0, 100),
        ]
    )
    return make()


def nested(depth: int) -> Json:
    """Return lists nested ``depth`` times."""
    tree: Json = []
    for _ in range(depth):
        tree = [tree]
    return tree


def near(draw: Random, number: float) -> float:
    """Return a number near the right one."""
    changed = [number + 1, number - 1, -number, number * 2, number * 1000]
    changed += [number // 2, number | 1 << draw.randrange(40)] if isinstance(number, int) else [number / 2]
    return draw.choice(changed)


def mutate_json(draw: Random, tree: Json, name: str = "") -> tuple[Json, str]:
    """Return a copy of a JSON tree with one value changed, removed, added or swapped, and a description."""
    tree = copy.deepcopy(tree)
    places = _places(tree)
    if not places:
        return value(draw), f"{name} replaced"
    parent, key, path = draw.choice(places)
    old = parent[key]
    what = draw.randrange(8)
    path = f"{name}{path}"
    if what == 0:
        del parent[key]
        return tree, f"{path} removed"
    if what == 1:
        if isinstance(parent, dict):
            added = draw.choice(["", "unknown", "__class__", f"{key}_", str(key).upper(), *TEXTS[:8]])
            parent[added] = copy.deepcopy(old)
            return tree, f"{path} also as {added!r}"
        parent.insert(draw.randrange(len(parent) + 1), copy.deepcopy(old))
        return tree, f"{path} twice"
    if what == 2:
        other_parent, other, other_path = draw.choice(places)
        parent[key] = copy.deepcopy(other_parent[other])
        return tree, f"{path} = {name}{other_path}"
    if what == 3 and isinstance(old, list | dict) and old:
        parent[key] = old * draw.choice([0, 2, 50]) if isinstance(old, list) else dict(list(old.items())[1:])
        return tree, f"{path} of another length"
    if what <= 5 and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = near(draw, old)
    elif what <= 5 and isinstance(old, str):
        parent[key] = mutate_text(draw, old)
    else:
        parent[key] = value(draw)
    return tree, f"{path} = {repr(parent[key])[:60]}"


def _places(tree: Json, path: str = "") -> list[tuple[Any, Any, str]]:
    """Return the places in a tree: container, key and path. Of long lists, only a few."""
    found: list[tuple[Any, Any, str]] = []
    keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if len(keys) > 40:
        keys = keys[:20] + keys[:: len(keys) // 20]
    for key in keys:
        here = f"{path}.{key}"
        found.append((tree, key, here))
        found += _places(tree[key], here)
    return found


def mutate_text(draw: Random, text: str) -> str:
    """Return a string with something inserted, removed or swapped."""
    at = draw.randrange(len(text) + 1)
    return draw.choice(
        [
            text[:at] + draw.choice(TEXTS) + text[at:],
            text[:at] + text[at + draw.randrange(1, 5) :],
            text[::-1],
            text.upper(),
            text * 2,
            draw.choice(TEXTS),
        ]
    )


def to_json_bytes(draw: Random, tree: Json) -> tuple[bytes, str]:
    """Return the text of a JSON tree, sometimes written in an unexpected way."""
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.8)
    content = text.encode("utf-8", "surrogatepass")
    what = draw.randrange(30)
    if what == 0:
        return b"\xef\xbb\xbf" + content, ", byte order mark"
    if what == 1:
        return text.encode("utf-16", "surrogatepass"), ", UTF-16"
    if what == 2:
        depth = draw.choice([100, 100_000])
        return content[:-1] + b',"deep":' + b"[" * depth + b"]" * depth + content[-1:], f", nested {depth} deep"
    if what == 3:
        return content + draw.choice([b"\0", b"{}", b" ", b"\xff"]), ", trailing bytes"
    if what == 4:
        return content[:-1] + b',"model_type":1,"files":[]' + content[-1:], ", a key twice"
    if what == 5:
        digits = draw.choice([400, 5000])
        return content[:-1] + b',"long":' + b"9" * digits + content[-1:], f", a number of {digits} digits"
    return content, ""


def mutate_bytes(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Return bytes with some changed, removed or inserted, and a description."""
    data = bytearray(content)
    size = len(data)
    at = draw.randrange(size) if size else 0
    if draw.random() < 0.3:
        at = min(at, draw.randrange(64))
    length = min(draw.choice([1, 2, 4, 8, 64, 1000]), size - at)
    what = draw.randrange(10)
    if what <= 2 and size:
        for _ in range(draw.choice([1, 1, 2, 8, 64])):
            data[draw.randrange(size)] ^= 1 << draw.randrange(8)
        return bytes(data), "bits flipped"
    if what == 3:
        return bytes(data[:at]), f"cut at {at}"
    if what == 4:
        number = draw.choice([0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63, 2**64 - 1])
        width = draw.choice([1, 2, 4, 8])
        data[at : at + width] = (number & (256**width - 1)).to_bytes(width, draw.choice(["little", "big"]))
        return bytes(data), f"{number:#x} in {width} bytes at {at}"
    if what == 5:
        data[at : at + length] = draw.choice([b"\0", b"\xff", b"\x80"]) * length
        return bytes(data), f"{length} bytes overwritten at {at}"
    if what == 6:
        del data[at : at + length]
        return bytes(data), f"{length} bytes removed at {at}"
    if what == 7:
        data[at:at] = draw.randbytes(draw.choice([1, 4, 100]))
        return bytes(data), f"bytes inserted at {at}"
    if what == 8:
        data[at:at] = data[at : at + length] * draw.choice([1, 2, 20])
        return bytes(data), f"{length} bytes repeated at {at}"
    return draw.choice([b"", LFS_POINTER, b"\0" * min(size, 4096), b"<html></html>"]), "content replaced"


def tried(change: Callable[..., str], draw: Random, *arguments: Any) -> str:
    """Apply a change and return its description, or "nothing" if an earlier change made it impossible."""
    try:
        return change(draw, *arguments)
    except (OSError, ValueError, RecursionError):
        return "nothing"


def read(path: Path) -> bytes:
    """Return a file's content. Raises ``OSError`` for other things, such as a link to an endless device."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_bytes()


def replace(path: Path, content: bytes) -> None:
    """Replace a file, which may be a hard link to the unchanged input's."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
