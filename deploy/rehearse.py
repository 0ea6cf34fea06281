"""Run the steps of ``deploy/Dockerfile`` that build the image, without Docker: as root, in chroots made by debootstrap.

``debootstrap --variant=minbase bookworm BASE`` makes the base image; ``python3 deploy/rehearse.py FOLDER --base BASE``
builds the last stage in ``FOLDER/image``. ``--certificates FILE`` adds authorities that downloads need here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PASSED_ON = ("HTTP_PROXY", "HTTPS_PROXY", "PIP_CERT", "PIP_INDEX_URL", "http_proxy", "https_proxy")
"""Variables of the environment that downloads may need."""


@dataclass
class Stage:
    """One stage of the image, in a folder."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
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
    stages: dict[str, Stage] = {}
    stage = Stage(arguments.folder)
    for name, text in instructions(ROOT / "deploy/Dockerfile"):
        sys.stdout.write(f"{name} {text}\n")
        sys.stdout.flush()
        if name == "FROM":
            _, _, alias = text.partition(" AS ")
            stage = Stage(arguments.folder / (alias or "image"))
            stages[alias] = stage
            subprocess.run(["cp", "-a", f"{arguments.base}/.", stage.folder], check=True)
            if arguments.certificates:
                target = stage.folder / "etc/ssl/certs/ca-certificates.crt"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(arguments.certificates, target)
        elif name == "RUN":
            stage.run("/bin/sh", "-c", text)
        elif name == "COPY":
            copy(text, stage, stages)
        elif name == "ENV":
            stage.environment |= dict(item.split("=", 1) for item in shlex.split(text))
        elif name == "USER":
            stage.user = text


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
