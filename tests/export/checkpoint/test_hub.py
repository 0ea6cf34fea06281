"""Resolving a checkpoint: local folders, a hub cache, and every error of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from fusion_edge.export.checkpoint.hub import resolve_checkpoint
from fusion_edge.export.checkpoint.input_files import read_json_object
from fusion_edge.runtime.errors import FusionError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- Local folders --------------------------------------------------------------------------------


def test_folder_is_used_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_checkpoint(str(tmp_path), None) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("org/name", None) == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_checkpoint("~/org", None) == tmp_path / "org"


def test_revision_of_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--revision main does not apply to the local folder"):
        resolve_checkpoint(str(tmp_path), "main")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", "a safetensors file"),
        ("model.GGUF", "a GGUF file"),
        ("pytorch_model.bin", "a pickle file"),
        ("model.onnx", "an ONNX graph"),
        ("config.json", "a JSON file"),
        ("README", "a file"),
    ],
)
def test_file_as_checkpoint_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FusionError, match=f"{name} is {kind}.*Pass the checkpoint's folder"):
        resolve_checkpoint(str(tmp_path / name), None)


@pytest.mark.parametrize(
    "source", ["./org/name", "/org/name", "~/none", "../x", "name", "a/b/c", "org/name/", "", "org/x.gguf", "a b/c"]
)
def test_missing_path(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    forbid_the_hub(monkeypatch)
    with pytest.raises(FusionError, match=f"There is no folder '{source}': pass an existing checkpoint folder"):
        resolve_checkpoint(source, None)


@pytest.mark.parametrize("source", ["https://huggingface.co/org/name", "http://host/org/name/resolve/main/config.json"])
def test_url_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_the_hub(monkeypatch)
    with pytest.raises(FusionError, match="is a URL: pass its hub id, org/name"):
        resolve_checkpoint(source, None)


def forbid_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


# --- The hub --------------------------------------------------------------------------------------


def test_hub_download_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_checkpoint("org/FUSION-Phi3.5_3B", "v1") == tmp_path
    assert (asked["id"], asked["revision"]) == ("org/FUSION-Phi3.5_3B", "v1")

    hub_utilities: Any = huggingface_hub.utils  # every version has the filter, but not publicly
    wanted = list(
        hub_utilities.filter_repo_objects(
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "tokenizer.model",
                "tokenizer.json",
                "pytorch_model.bin",
                "README.md",
                "global_step1/model.safetensors",
                "modeling_fusion.py",
            ],
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    assert wanted == ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "tokenizer.json"]


def raised(kind: type[Exception], message: str = "") -> Exception:
    """Return an error of the hub client, without the HTTP response that some versions require."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def without_connection() -> Exception:
    """Return the error of the hub client for a repository that is not cached, without a network."""
    error = raised(errors.LocalEntryNotFoundError, "Got: ConnectError: refused\nPlease check your internet connection.")
    error.__cause__ = ConnectionError("refused")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (raised(errors.GatedRepoError), "org/name is a gated repository: .*hf auth login"),
        (raised(errors.RepositoryNotFoundError), "org/name is neither a local folder nor a repository"),
        (raised(errors.RevisionNotFoundError), "org/name has no revision v9: pass an existing branch"),
        (raised(errors.HFValidationError), "org/name at revision v9 is not a valid hub id"),
        (ConnectionError("no\nroute."), r"org/name at revision v9 could not be downloaded \(no route\): check"),
        (OSError("No space left"), r"org/name at revision v9 could not be downloaded \(No space left\)"),
        (RuntimeError(), r"org/name at revision v9 could not be downloaded \(RuntimeError\)"),
        (without_connection(), r"org/name at revision v9 could not be downloaded \(refused\): check the network"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FusionError, match=message) as caught:
        resolve_checkpoint("org/name", "v9")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def resolve_offline(cache: Path, source: str, revision: str | None) -> str:
    """Return what a new, offline process prints: the hub client reads its environment when it is imported."""
    program = (
        "import sys\n"
        "from fusion_edge.export.checkpoint.hub import resolve_checkpoint\n"
        "from fusion_edge.runtime.errors import FusionError\n"
        "try:\n"
        f"    print(resolve_checkpoint({source!r}, {revision!r}))\n"
        "except FusionError as error:\n"
        "    print(f'FusionError: {error}')\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=cache, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a hub cache with ``org/name`` at ``main``."""
    root = tmp_path_factory.mktemp("cache")
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return root


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_offline_with_complete_cache(cache: Path, revision: str | None) -> None:
    expected = cache / "models--org--name" / "snapshots" / COMMIT
    assert resolve_offline(cache, "org/name", revision) == str(expected)


@pytest.mark.parametrize(("source", "revision"), [("org/other", None), ("org/name", "v2")])
def test_offline_and_not_cached(cache: Path, source: str, revision: str | None) -> None:
    at = f" at revision {revision}" if revision else ""
    assert resolve_offline(cache, source, revision) == (
        f"FusionError: {source}{at} is not complete in the local cache, and HF_HUB_OFFLINE forbids downloading: "
        "unset it, or pass a local folder."
    )


# --- JSON -----------------------------------------------------------------------------------------


def test_json_object(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": "é"}', encoding="utf-8")
    assert read_json_object(file) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "holds a JSON list; expected an object"),
    ],
)
def test_invalid_json(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FusionError, match=rf"config\.json {message}.*again"):
        read_json_object(file)
