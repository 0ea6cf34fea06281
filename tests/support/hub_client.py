"""The hub's client of this process, turned to a stand-in, an empty cache and a token."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fakes.fake_hub import FakeHub
from huggingface_hub import constants


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, cache: Path, token: str = "") -> None:
    """Turn the client, which has read its environment when it was imported, to a stand-in."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # as in commands
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setenv("HF_TOKEN", token)


def environment(hub: FakeHub, cache: Path, token: str = "") -> dict[str, str]:
    """Return the same settings as environment variables of a new process."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    }
