"""What `deploy/` says to systemd and Docker."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "deploy/fusion-serve.service"
MOST_EXPOSURE = 15
"""In tenths of systemd's points, of 100."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


@needs_systemd
def test_the_unit_is_valid(tmp_path: Path) -> None:
    text = UNIT.read_text()
    program = "ExecStart=/opt/fusion-edge/bin/fusion-serve "
    assert program in text
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace(program, "ExecStart=/bin/true "))  # it must exist
    result = analyze("verify", str(copy))
    assert (result.returncode, result.stderr) == (0, "")
    copy.write_text(copy.read_text() + "\n[Service]\nNoNewPrivilege=yes\n")
    assert "NoNewPrivilege" in analyze("verify", str(copy)).stderr


@needs_systemd
def test_the_unit_is_hardened() -> None:
    result = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSURE}", "--no-pager", str(UNIT))
    if "unrecognized option" in result.stderr:
        pytest.skip("systemd-analyze is older than 250")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.jetson"])
def test_images_copy_what_exists_and_run_without_privileges(name: str) -> None:
    lines = [line.partition(" ") for line in (ROOT / "deploy" / name).read_text().splitlines()]
    steps = [(step, text) for step, _, text in lines if step and step != "#"]
    assert {step for step, _ in steps} == {"FROM", "RUN", "COPY", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    allowed = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    for step, text in steps:
        if step == "COPY" and not text.startswith("--from"):
            for source in shlex.split(text)[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in allowed
    last = dict(steps[max(index for index, (step, _) in enumerate(steps) if step == "FROM") :])
    assert re.fullmatch(r"[1-9]\d{4}:\d+", last["USER"])
    entry = json.loads(last["ENTRYPOINT"])
    assert entry[0] == "fusion-serve"
    assert "--api-key-file" in entry
    assert "g++" not in last.get("RUN", "")
    _, _, probe = last["HEALTHCHECK"].partition("CMD ")
    compile(json.loads(probe)[2], "probe", "exec")


def test_the_rehearsal_downloads_as_pip_does_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://files.example/simple\ntrusted-host =\n    files.example\n    more.example\n"
        "constraint = /constraints.txt\nretries = 9\n[install]\nretries = 3\n[download]\nretries = 4\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "7")
    monkeypatch.setenv("PIP_CERT", "/authorities.crt")
    settings = runpy.run_path(str(ROOT / "deploy/rehearse.py"))["pip_settings"]()
    assert settings.pop("PIP_TRUSTED_HOST").split() == ["files.example", "more.example"]
    expected = {"PIP_CERT": "/authorities.crt", "PIP_DEFAULT_TIMEOUT": "7", "PIP_RETRIES": "3"}
    assert expected.items() <= settings.items()
    assert settings["PIP_INDEX_URL"] == "https://files.example/simple"
    assert not {"PIP_CONSTRAINT", "PIP_FIND_LINKS"} & settings.keys()
