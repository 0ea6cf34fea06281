"""Kinds of things of the demo, and their images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusion_edge.benchmarks.demo import atlas, make_atlas
from fusion_edge.benchmarks.demo.atlas import ATLAS, CATEGORIES, CELL, COLUMNS, KINDS
from fusion_edge.runtime.errors import UsageError


def test_names_are_plain_words_and_unique() -> None:
    words = [*KINDS, *(kind.plural for kind in KINDS.values() if kind.plural != kind.name)]
    words += [*CATEGORIES, *CATEGORIES.values(), "thing", "things", "nothing", "picture", "background"]
    assert len(set(words)) == len(words)
    assert all(word.isalpha() and word.islower() for word in words)
    assert len({kind.icon for kind in KINDS.values()}) == len(KINDS) == 96


def test_every_category_has_at_least_nine_kinds() -> None:
    counts = Counter(kind.category for kind in KINDS.values())
    assert counts.keys() == CATEGORIES.keys()
    assert min(counts.values()) >= 9


def test_articles() -> None:
    assert [KINDS[name].with_article for name in ("apple", "owl", "dog")] == ["an apple", "an owl", "a dog"]


def test_the_atlas_has_a_distinct_image_for_every_kind() -> None:
    with Image.open(ATLAS) as file:
        assert file.size == (COLUMNS * CELL, 2 * len(KINDS) // COLUMNS * CELL)  # colors, then alpha
    assert ATLAS.stat().st_size < 256 * 1024
    images = {name: np.asarray(atlas.image(name)) for name in KINDS}
    assert len({pixels.tobytes() for pixels in images.values()}) == len(KINDS)
    for name, pixels in images.items():
        alpha = pixels[..., 3]
        assert pixels.shape == (CELL, CELL, 4)
        assert np.mean(alpha > 200) > 0.12, name  # thin things, too, cover an eighth
        assert not any(edge.any() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])), name
        rows, columns = np.nonzero(alpha > 60)
        assert max(np.ptp(rows), np.ptp(columns)) >= 0.9 * CELL, name


def test_splitting_alpha_keeps_colors_and_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (100, 3), np.uint8)[rng.integers(0, 100, (2 * CELL, 3 * CELL))]
    alpha = rng.integers(0, 16, (2 * CELL, 3 * CELL, 1), np.uint8) * 17
    pixels = np.concatenate([colors, alpha], -1)
    make_atlas.split_alpha(Image.fromarray(pixels)).save(tmp_path / "atlas.png")
    monkeypatch.setattr(atlas, "ATLAS", tmp_path / "atlas.png")
    read = np.asarray(atlas._atlas.__wrapped__())
    np.testing.assert_array_equal(read[..., 3], pixels[..., 3])
    seen = pixels[..., 3] > 0
    assert np.abs(read[seen].astype(int) - pixels[seen]).max() <= 2  # of a palette's means


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "not a folder of @iconify-json/noto"), ({"icons.json": {"icons": {}}}, "no drawing named 'dog-face'")],
)
def test_a_wrong_package_is_refused(tmp_path: Path, files: dict[str, object], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        make_atlas.make_atlas(tmp_path)


def test_the_command_prints_one_line_for_a_wrong_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_atlas.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
