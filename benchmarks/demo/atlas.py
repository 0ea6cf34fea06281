"""The things of the demo's pictures: their names, categories and images.

``things.png`` holds one image for each kind, in the order of :data:`KINDS`: 12 columns of 96 x 96 pixels. Its upper
half holds the colors, its lower half alpha. ``make_atlas.py`` makes it from Noto Emoji (Google, Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

ATLAS = Path(__file__).with_name("things.png")
CELL = 96  # pixels
COLUMNS = 12

CATEGORIES = {
    "animal": "animals",
    "food": "foods",
    "vehicle": "vehicles",
    "tool": "tools",
    "clothing": "clothes",
    "plant": "plants",
    "instrument": "instruments",
    "device": "devices",
    "building": "buildings",
}
"""Singular and plural of each category."""


@dataclass(frozen=True)
class Kind:
    """What a thing is."""

    name: str
    plural: str
    category: str
    """A key of :data:`CATEGORIES`."""
    icon: str
    """Name of the image in the package ``@iconify-json/noto``."""

    @property
    def with_article(self) -> str:
        """``a dog``, ``an apple``."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


_TABLE: dict[str, dict[str, tuple[str, str]]] = {
    "animal": {
        "dog": ("dogs", "dog-face"),
        "cat": ("cats", "cat-face"),
        "pig": ("pigs", "pig-face"),
        "frog": ("frogs", "frog"),
        "elephant": ("elephants", "elephant"),
        "lion": ("lions", "lion"),
        "penguin": ("penguins", "penguin"),
        "fish": ("fish", "tropical-fish"),
        "turtle": ("turtles", "turtle"),
        "butterfly": ("butterflies", "butterfly"),
        "owl": ("owls", "owl"),
        "crab": ("crabs", "crab"),
    },
    "food": {
        "apple": ("apples", "red-apple"),
        "banana": ("bananas", "banana"),
        "carrot": ("carrots", "carrot"),
        "pizza": ("pizzas", "pizza"),
        "hamburger": ("hamburgers", "hamburger"),
        "strawberry": ("strawberries", "strawberry"),
        "cake": ("cakes", "birthday-cake"),
        "doughnut": ("doughnuts", "doughnut"),
        "pineapple": ("pineapples", "pineapple"),
        "lemon": ("lemons", "lemon"),
        "watermelon": ("watermelons", "watermelon"),
        "pretzel": ("pretzels", "pretzel"),
    },
    "vehicle": {
        "car": ("cars", "automobile"),
        "bus": ("buses", "bus"),
        "truck": ("trucks", "delivery-truck"),
        "train": ("trains", "locomotive"),
        "airplane": ("airplanes", "airplane"),
        "helicopter": ("helicopters", "helicopter"),
        "bicycle": ("bicycles", "bicycle"),
        "motorcycle": ("motorcycles", "motorcycle"),
        "boat": ("boats", "sailboat"),
        "rocket": ("rockets", "rocket"),
        "tractor": ("tractors", "tractor"),
        "scooter": ("scooters", "kick-scooter"),
    },
    "tool": {
        "hammer": ("hammers", "hammer"),
        "wrench": ("wrenches", "wrench"),
        "screwdriver": ("screwdrivers", "screwdriver"),
        "saw": ("saws", "carpentry-saw"),
        "axe": ("axes", "axe"),
        "ladder": ("ladders", "ladder"),
        "broom": ("brooms", "broom"),
        "brush": ("brushes", "paintbrush"),
        "magnet": ("magnets", "magnet"),
        "shovel": ("shovels", "shovel"),
        "bucket": ("buckets", "bucket"),
    },
    "clothing": {
        "shirt": ("shirts", "t-shirt"),
        "dress": ("dresses", "dress"),
        "hat": ("hats", "top-hat"),
        "shoe": ("shoes", "running-shoe"),
        "boot": ("boots", "womans-boot"),
        "scarf": ("scarves", "scarf"),
        "cap": ("caps", "billed-cap"),
        "coat": ("coats", "coat"),
        "helmet": ("helmets", "rescue-workers-helmet"),
        "crown": ("crowns", "crown"),
        "sandal": ("sandals", "thong-sandal"),
    },
    "plant": {
        "rose": ("roses", "rose"),
        "sunflower": ("sunflowers", "sunflower"),
        "tulip": ("tulips", "tulip"),
        "cactus": ("cactuses", "cactus"),
        "tree": ("trees", "deciduous-tree"),
        "clover": ("clovers", "four-leaf-clover"),
        "leaf": ("leaves", "maple-leaf"),
        "sprout": ("sprouts", "seedling"),
        "lotus": ("lotuses", "lotus"),
    },
    "instrument": {
        "guitar": ("guitars", "guitar"),
        "violin": ("violins", "violin"),
        "trumpet": ("trumpets", "trumpet"),
        "drum": ("drums", "drum"),
        "piano": ("pianos", "musical-keyboard"),
        "saxophone": ("saxophones", "saxophone"),
        "harp": ("harps", "harp"),
        "accordion": ("accordions", "accordion"),
        "flute": ("flutes", "flute"),
    },
    "device": {
        "phone": ("phones", "mobile-phone"),
        "laptop": ("laptops", "laptop"),
        "camera": ("cameras", "camera"),
        "television": ("televisions", "television"),
        "radio": ("radios", "radio"),
        "printer": ("printers", "printer"),
        "battery": ("batteries", "battery"),
        "microphone": ("microphones", "microphone"),
        "joystick": ("joysticks", "joystick"),
        "robot": ("robots", "robot"),
        "clock": ("clocks", "mantelpiece-clock"),
    },
    "building": {
        "house": ("houses", "house"),
        "castle": ("castles", "castle"),
        "church": ("churches", "church"),
        "lighthouse": ("lighthouses", "lighthouse"),
        "mosque": ("mosques", "mosque"),
        "factory": ("factories", "factory"),
        "hospital": ("hospitals", "hospital"),
        "stadium": ("stadiums", "stadium"),
        "tower": ("towers", "tokyo-tower"),
    },
}

KINDS = {
    name: Kind(name, plural, category, icon)
    for category, rows in _TABLE.items()
    for name, (plural, icon) in rows.items()
}
"""Every kind by its name."""


@cache
def image(name: str) -> Image.Image:
    """Return the image of a kind: ``[96, 96]`` RGBA. Callers must not change it."""
    row, column = divmod(list(KINDS).index(name), COLUMNS)
    return _atlas().crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))


@cache
def _atlas() -> Image.Image:
    with Image.open(ATLAS) as file:
        split = file.convert("RGB")
    width, height = split.width, split.height // 2
    atlas: Image.Image = split.crop((0, 0, width, height))
    atlas.putalpha(split.crop((0, height, width, 2 * height)).getchannel("R"))
    return atlas
