"""The hub's client of this process, turned to a stand-in, an empty cache and a token."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fakes.fake_hub import FakeHub
from huggingface_hub import constants

AGENT_HARNESSES = ".agent_harnesses.json"
"""The client reads this list of programs that may have started it, and asks the hub for it once a day."""


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, cache: Path, token: str = "") -> None:
    """Turn the client, which has read its environment when it was imported, to a stand-in."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # as in commands
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(_home(cache) / AGENT_HARNESSES))
    monkeypatch.setenv("HF_TOKEN", token)


def environment(hub: FakeHub, cache: Path, token: str = "") -> dict[str, str]:
    """Return the same settings as environment variables of a new process."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(_home(cache)),
        "HF_HUB_OFFLINE": "",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    }


def _home(cache: Path) -> Path:
    """Return a folder for the client's own files, with an empty list: the stand-in counts requests."""
    home = cache.with_name(f"{cache.name}-home")
    home.mkdir(parents=True, exist_ok=True)
    (home / AGENT_HARNESSES).write_text('{"standardEnvVars": [], "harnesses": {}}')
    return home
