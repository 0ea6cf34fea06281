"""Run the steps of ``deploy/Dockerfile`` that build the image, without Docker: as root, in chroots made by debootstrap.

``debootstrap --variant=minbase bookworm BASE`` makes the base image; ``python3 deploy/rehearse.py FOLDER --base BASE``
builds the last stage in ``FOLDER/image``. ``--certificates FILE`` has the authorities that downloads need here. pip
downloads from where this machine's pip does.
"""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PASSED_ON = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""Variables of the environment that downloads may need."""
PIP_OPTIONS = ("cert", "default-timeout", "extra-index-url", "index-url", "proxy", "retries", "timeout", "trusted-host")
"""Settings of pip that say where it downloads from, and how. Others change what it installs, or name folders here."""
CERTIFICATES = ("etc/ssl/certs/ca-certificates.crt", "etc/ssl/pip.crt")
"""Where a stage has the certificates. The package ca-certificates overwrites the first; pip reads the second."""
PIP_SECTIONS = ("global", "install", ":env:")
"""Sections of pip's settings; a later one has precedence."""


@dataclass
class Stage:
    """One stage of the image, in a folder."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the Dockerfile, and pip's settings."""
    user: str = "0:0"

    def run(self, *command: str) -> None:
        """Run a command in the stage's file system."""
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | passed | self.environment
        subprocess.run(["chroot", f"--userspec={self.user}", self.folder, *command], env=environment, check=True)


def main() -> None:
    """Build the stages one after the other."""
    parser = argparse.ArgumentParser(description="Build deploy/Dockerfile in chroots.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--certificates", type=Path)
    arguments = parser.parse_args()
    settings = pip_settings()
    certificates = arguments.certificates or settings.get("PIP_CERT")
    if certificates:
        settings["PIP_CERT"] = f"/{CERTIFICATES[1]}"
    stages: dict[str, Stage] = {}
    stage = Stage(arguments.folder)
    for name, text in instructions(ROOT / "deploy/Dockerfile"):
        sys.stdout.write(f"{name} {text}\n")
        sys.stdout.flush()
        if name == "FROM":
            _, _, alias = text.partition(" AS ")
            stage = Stage(arguments.folder / (alias or "image"), dict(settings))
            stages[alias] = stage
            stage.folder.mkdir(parents=True)
            subprocess.run(["cp", "-a", f"{arguments.base}/.", stage.folder], check=True)
            for name in CERTIFICATES if certificates else ():
                (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(certificates, stage.folder / name)
        elif name == "RUN":
            stage.run("/bin/sh", "-c", text)
        elif name == "COPY":
            copy(text, stage, stages)
        elif name == "ENV":
            stage.environment |= dict(item.split("=", 1) for item in shlex.split(text))
        elif name == "USER":
            stage.user = text


def pip_settings() -> dict[str, str]:
    """Return settings of this machine's pip, from its files and the environment, as variables of the environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # no output without pip
    settings = {}
    for wanted in PIP_SECTIONS:
        for key, _, value in (line.partition("=") for line in listed.stdout.splitlines()):
            section, _, option = key.rpartition(".")
            if section == wanted and option in PIP_OPTIONS:
                settings[f"PIP_{option.upper().replace('-', '_')}"] = ast.literal_eval(value)
    return settings


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return name and text of every instruction of a Dockerfile without continued lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(name, text) for name, _, text in (line.partition(" ") for line in lines if line and line[0] != "#")]


def copy(text: str, stage: Stage, stages: dict[str, Stage]) -> None:
    """Copy files of the clone, or of an earlier stage."""
    *sources, target = shlex.split(text)
    origin, ignored = ROOT, shutil.ignore_patterns("__pycache__", "*.so")
    if sources[0].startswith("--from="):
        origin, ignored = stages[sources.pop(0).removeprefix("--from=")].folder, shutil.ignore_patterns()
    destination = stage.folder / target.lstrip("/")
    for source in sources:
        path = origin / source.lstrip("/")
        if path.is_dir():
            shutil.copytree(path, destination, symlinks=True, ignore=ignored)
        else:
            destination.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, destination)


if __name__ == "__main__":
    main()
