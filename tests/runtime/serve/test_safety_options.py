"""Options that say who may ask, what, and how much."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest

from fusion_edge.runtime.cli.serve_safety import add_safety_options, safety_settings
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.serve.safety import SafetySettings


def settings(*options: str) -> SafetySettings:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    add_safety_options(parser)
    return safety_settings(parser.parse_args(options))


def error(*options: str) -> str:
    with pytest.raises(UsageError) as caught:
        settings(*options)
    return str(caught.value)


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    return str(path)


def test_without_options_everything_is_as_the_defaults_say() -> None:
    assert settings() == SafetySettings()


def test_all_options(key_file: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    given = settings(
        *("--host", "0.0.0.0", "--api-key-file", key_file, "--allow-origin", "https://chat.example:8443"),
        *("--allow-origin", "app://obsidian.md", "--allow-image-host", "Images.Example.com"),
        *("--allow-image-host", "cdn.example.net", "--allow-image-folder", str(tmp_path / "link")),
        *("--max-image-size", "3MiB", "--max-image-pixels", "1000"),
    )
    assert given.keys is not None
    assert given.keys.allows(b"0123456789abcdef")
    assert given.origins == ("https://chat.example:8443", "app://obsidian.md")
    assert given.images.hosts == ("images.example.com", "cdn.example.net")
    assert (given.images.folder, given.images.max_bytes, given.images.max_pixels) == (tmp_path, 3 << 20, 1000)
    assert (given.requests.body_bytes, given.requests.receiving_bytes) == (5 << 20, 10 << 20)
    assert pickle.loads(pickle.dumps(given)) == given


def test_another_host_needs_keys(key_file: str) -> None:
    assert "add --api-key-file FILE" in error("--host", "0.0.0.0")
    assert settings("--host", "0.0.0.0", "--api-key-file", key_file).keys is not None


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "localhost", "*.example.com", "https://a.example.com", "0x7f.1", "[::1]", ""]
)
def test_wrong_hosts_of_pictures(host: str) -> None:
    assert "is no full host name" in error("--allow-image-host", host)


@pytest.mark.parametrize("origin", ["*", "null", "chat.example", "https://chat.example/", "https://a.example:x", ""])
def test_wrong_origins(origin: str) -> None:
    assert "is no origin" in error("--allow-origin", origin)


def test_wrong_folders(tmp_path: Path) -> None:
    assert "is no folder" in error("--allow-image-folder", str(tmp_path / "missing"))


def test_a_size_that_no_picture_fits() -> None:
    assert "--max-image-size is 0" in error("--max-image-size", "0")
