"""Limited file systems: mount points, no locks, folders that cannot be flushed, no fallocate."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from faults import verified_precision

from fusion_edge.export import cli
from fusion_edge.export.bundle import hidden_folders
from fusion_edge.export.calibration.work_folder import work_folder
from fusion_edge.runtime.bundle.reader import open_bundle

Refuse = Callable[..., str]


@pytest.fixture
def mounted(output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an output that is a mount point, with a ``lost+found``."""
    (output / "lost+found").mkdir(parents=True)
    ismount, rename = os.path.ismount, os.rename

    def guarded(source: Any, target: Any, **options: Any) -> None:
        if output in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target, **options)

    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output or ismount(path))
    monkeypatch.setattr(os, "rename", guarded)
    return output


def test_mount_point(tiny_checkpoint: Path, mounted: Path, refused: Refuse) -> None:
    for precision in ("int8", "int4"):
        assert cli.main([str(tiny_checkpoint), "-o", str(mounted), f"--{precision}", "--force"]) == 0
        (mounted / "lost+found").rmdir()
        assert verified_precision(mounted) == precision
        (mounted / "lost+found").mkdir()
    assert [path.name for path in mounted.parent.iterdir()] == ["bundle"]
    (mounted / "notes.txt").write_text("dear")
    assert "notes.txt" in refused(cli.main, tiny_checkpoint, "-o", mounted, "--int8", "--force")
    assert open_bundle(mounted).manifest.precision == "int4"


def test_calibration_folder_is_inside_mount_point(mounted: Path) -> None:
    with work_folder(mounted, "command") as folder:
        assert folder == mounted / ".bundle.calibration"


def test_mounts_of_the_same_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(f"36 35 98:0 /mnt1 {tmp_path}/a\\040b rw - ext3 /dev/root rw\n", encoding="utf-8")
    monkeypatch.setattr(hidden_folders, "_MOUNTS", tmp_path / "mounts")
    assert hidden_folders.is_mount_point(tmp_path / "a b")
    assert not hidden_folders.is_mount_point(tmp_path / "a")
    monkeypatch.setattr(hidden_folders, "_MOUNTS", tmp_path / "none")
    assert not hidden_folders.is_mount_point(tmp_path)


@pytest.mark.parametrize("call", ["rename", "mkdir"])
@pytest.mark.parametrize(
    ("number", "said"),
    [("EDQUOT", "quota"), ("EFBIG", "FAT32"), ("EBUSY", "mount point"), ("EROFS", "Read-only file system")],
)
def test_file_system_errors(
    tiny_checkpoint: Path,
    output: Path,
    call: str,
    number: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refuse,
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(os, call, fail)
    assert said in refused(cli.main, tiny_checkpoint, "-o", output)
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize("number", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EBADF", "EINVAL"])
def test_file_system_without_locks(
    tiny_checkpoint: Path,
    output: Path,
    number: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def flock(*_: object) -> NoReturn:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(fcntl, "flock", flock)
    output.with_name(".bundle.partial").mkdir()
    assert cli.main([str(tiny_checkpoint), "-o", str(output)]) == 0
    warning = f"warning: The file system of {output.parent} has no locks; do not run another command on it.\n"
    assert capsys.readouterr().err == warning
    assert verified_precision(output) == "int4"


@pytest.mark.parametrize("number", ["EINVAL", "EBADF", "EOPNOTSUPP", "EACCES"])
def test_flush_not_supported(
    tiny_checkpoint: Path, replaceable: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert cli.main([str(tiny_checkpoint), "-o", str(replaceable), "--int8", "--force"]) == 0
    assert verified_precision(replaceable) == "int8"


@pytest.mark.parametrize("number", ["EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_fallocate_not_supported(
    tiny_checkpoint: Path, tiny_bundle: Path, output: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert cli.main([str(tiny_checkpoint), "-o", str(output)]) == 0
    for path in tiny_bundle.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()
