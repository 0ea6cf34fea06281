"""An export leaves a complete bundle or none, after any failure or kill, and with any existing output."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from faults import verified_precision

from fusion_edge.export import cli
from fusion_edge.export.bundle.data_writer import DataWriter
from fusion_edge.runtime.cli import info as cli_info

Refuse = Callable[..., str]
PRECISIONS = ("int8", "int4")  # of the bundle that is replaced, and of the one that replaces it


def siblings(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


# Existing outputs -------------------------------------------------------------------------------------------


def test_force_replaces_a_bundle(tiny_checkpoint: Path, output: Path, refused: Refuse) -> None:
    assert cli.main([str(tiny_checkpoint), "-o", str(output), "--int8"]) == 0
    assert f"{output} exists; choose another output or pass --force" in refused(
        cli.main, tiny_checkpoint, "-o", output, "--int4"
    )
    assert verified_precision(output) == "int8"
    assert cli.main([str(tiny_checkpoint), "-o", str(output), "--int4", "--force"]) == 0
    assert verified_precision(output) == "int4"
    assert siblings(output) == ["bundle"]


def test_force_replaces_link_target(tiny_checkpoint: Path, output: Path) -> None:
    output.symlink_to("elsewhere")
    for _ in range(2):
        assert cli.main([str(tiny_checkpoint), "-o", str(output), "--force"]) == 0
        assert output.is_symlink()
        assert verified_precision(output.with_name("elsewhere")) == "int4"
    assert siblings(output) == ["bundle", "elsewhere"]


def test_force_replaces_an_empty_folder(tiny_checkpoint: Path, output: Path, refused: Refuse) -> None:
    output.mkdir()
    assert f"{output} exists" in refused(cli.main, tiny_checkpoint, "-o", output)
    assert cli.main([str(tiny_checkpoint), "-o", str(output), "--force"]) == 0
    assert verified_precision(output) == "int4"


@pytest.mark.parametrize("make", ["file", "folder", "manifest in a subfolder"])
def test_force_replaces_nothing_else(tiny_checkpoint: Path, output: Path, make: str, refused: Refuse) -> None:
    files = {"file": output, "folder": output / "thesis.txt", "manifest in a subfolder": output / "old/bundle.json"}
    files[make].parent.mkdir(parents=True, exist_ok=True)
    files[make].write_text("dear", encoding="utf-8")
    for options in ([], ["--force"]):
        message = refused(cli.main, tiny_checkpoint, "-o", output, *options)
        assert f"{output} exists" in message
        assert ("is not a bundle, so --force does not replace it" in message) == bool(options)
        assert files[make].read_text(encoding="utf-8") == "dear"
    assert siblings(output) == ["bundle"]


def test_missing_output_option(tiny_checkpoint: Path, refused: Refuse) -> None:
    assert "No output given; add -o BUNDLE" in refused(cli.main, tiny_checkpoint, code=2)


@pytest.mark.parametrize("place", ["/", ".", "..", ""])
def test_existing_folder_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse, place: str
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert "exists; choose another output" in refused(cli.main, tiny_checkpoint, "-o", place)
    assert not list((tmp_path / "work").iterdir())


def test_output_without_parent_folder(tiny_checkpoint: Path, tmp_path: Path, refused: Refuse) -> None:
    (tmp_path / "file").touch()
    for parent in ("missing", "missing/below", "file"):
        message = refused(cli.main, tiny_checkpoint, "-o", tmp_path / parent / "bundle")
        assert f"{tmp_path / parent} is not a folder; create it first" in message
    assert "File name too long" in refused(cli.main, tiny_checkpoint, "-o", tmp_path / ("x" * 255))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_write_protected_folder(tiny_checkpoint: Path, output: Path, refused: Refuse) -> None:
    output.parent.chmod(0o555)
    assert f"Cannot write {output} (Permission denied); choose another output." in refused(
        cli.main, tiny_checkpoint, "-o", output
    )
    output.parent.chmod(0o755)
    assert not siblings(output)


def test_read_only_file_system(tiny_checkpoint: Path, refused: Refuse) -> None:
    message = refused(cli.main, tiny_checkpoint, "-o", "/proc/bundle")  # no user may make a folder here
    assert message.startswith("error: Cannot write /proc/bundle (")


# The disk ---------------------------------------------------------------------------------------------------


def test_small_disk_is_refused_before_writing(
    tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse
) -> None:
    def never(*_: object) -> NoReturn:
        raise AssertionError("written to a disk that is too small")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(Path, "write_bytes", never)
    message = refused(cli.main, tiny_checkpoint, "-o", output)
    assert f"The disk of {output.parent} has 1.00 MB free; the bundle needs 18.66 MB" in message
    assert not siblings(output)


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "mkdir"])
@pytest.mark.parametrize("replacing", [False, True])
def test_disk_becomes_full(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    output: Path,
    call: str,
    replacing: bool,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refuse,
) -> None:
    if replacing:
        shutil.copytree(tiny_bundle, output)

    def full(path: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(path, int) or output.parent in Path(path).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *arguments, **options)

    original = getattr(os, call)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        message = refused(cli.main, tiny_checkpoint, "-o", output, "--int8", "--force")
    assert message == f"error: The disk of {output.parent} is full; free some space and export again.\n"
    assert siblings(output) == ["bundle"] * replacing
    assert not replacing or verified_precision(output) == "int4"


def test_disk_error(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse) -> None:
    def broken(*_: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", broken)
    assert "bundle (Input/output error); choose another output." in refused(cli.main, tiny_checkpoint, "-o", output)
    assert not siblings(output)


def test_short_writes(tiny_checkpoint: Path, tiny_bundle: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:70_000], offset))
    assert cli.main([str(tiny_checkpoint), "-o", str(output)]) == 0
    for path in tiny_bundle.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_signal_during_export(
    tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(DataWriter, "write", interrupt)
    assert cli.main([str(tiny_checkpoint), "-o", str(output)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not siblings(output)


# Concurrent exports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_concurrent_export_is_refused(tiny_checkpoint: Path, output: Path, options: list[str], refused: Refuse) -> None:
    partial = output.with_name(".bundle.partial")
    partial.mkdir()
    (partial / "llm.data").write_bytes(b"half")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as the other export does
    message = refused(cli.main, tiny_checkpoint, "-o", output, *options)
    assert f"Another export is writing {output}; wait for it" in message
    assert (partial / "llm.data").read_bytes() == b"half"
    os.close(descriptor)
    assert cli.main([str(tiny_checkpoint), "-o", str(output)]) == 0
    assert verified_precision(output) == "int4"
    assert siblings(output) == ["bundle"]


@pytest.mark.parametrize("outcome", ["finished", "failed", "failed and a third began"])
def test_concurrent_export_ends_while_locking(
    tiny_checkpoint: Path, output: Path, outcome: str, monkeypatch: pytest.MonkeyPatch, refused: Refuse
) -> None:
    partial = output.with_name(".bundle.partial")

    def flock(_descriptor: int, _operation: int) -> None:  # succeeds, although the folder is gone
        if outcome == "finished":
            partial.rename(output)
        else:
            partial.rename(output.with_name("removed"))
        if outcome == "failed and a third began":
            partial.mkdir()
            (partial / "llm.data").touch()

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "Another export is writing" in refused(cli.main, tiny_checkpoint, "-o", output)
    assert (partial / "llm.data").exists() == (outcome == "failed and a third began")


# Kills ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from fusion_edge.export import cli
from fusion_edge.export.bundle import atomic_folder
name, calls = sys.argv[1], int(sys.argv[2])
original = getattr(os, name)
def counted(*arguments, **options):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(os, name, counted)
if name == "rename":  # as where folders cannot be exchanged
    atomic_folder.exchange = lambda *_: False
sys.exit(cli.main(sys.argv[3:]))
"""
MOMENTS = (  # after how many calls of which function
    ("pwrite", 0),  # only small files
    ("pwrite", 40),
    ("fsync", 0),  # all files, perhaps not on the disk
    ("rename", 0),  # before the first rename
    ("rename", 1),  # replacing: between the two; new: never
)


def killed_export(moment: Sequence[object], checkpoint: Path, output: Path, *options: str) -> int:
    command = [sys.executable, "-c", KILLED, *map(str, moment), str(checkpoint), "-o", str(output), *options]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_export(moment: tuple[str, int], tiny_checkpoint: Path, output: Path) -> None:
    code = killed_export(moment, tiny_checkpoint, output, "--int8")
    completed = moment == ("rename", 1)
    assert code == (0 if completed else -signal.SIGKILL)
    assert output.exists() == completed
    assert not completed or verified_precision(output) == "int8"
    assert cli.main([str(tiny_checkpoint), "-o", str(output), "--int4", "--force"]) == 0
    assert verified_precision(output) == "int4"
    assert siblings(output) == ["bundle"]


@pytest.mark.parametrize("moment", [*MOMENTS, ("rename", 2)])
def test_killed_while_replacing(
    moment: tuple[str, int], tiny_checkpoint: Path, tiny_bundle: Path, output: Path, refused: Refuse
) -> None:
    shutil.copytree(tiny_bundle, output)
    code = killed_export(moment, tiny_checkpoint, output, "--int8", "--force")
    completed = moment == ("rename", 2)
    assert code == (0 if completed else -signal.SIGKILL)
    # Even a refused export recovers.
    assert f"{output} exists" in refused(cli.main, tiny_checkpoint, "-o", output)
    assert verified_precision(output) == ("int8" if completed else "int4")
    assert siblings(output) == ["bundle"]
    assert cli_info.main([str(output)]) == 0


@pytest.mark.parametrize("moment", [("unlink", 0), ("unlink", 5), ("rmdir", 0)])
def test_killed_while_the_replaced_bundle_is_removed(
    moment: tuple[str, int], tiny_checkpoint: Path, tiny_bundle: Path, output: Path, refused: Refuse
) -> None:
    """The bundles were swapped: there is a bundle at any time."""
    shutil.copytree(tiny_bundle, output)
    engine = output / "engines/tensorrt-10.9-cc8.7-0123456789abcdef/llm.engine"
    engine.parent.mkdir(parents=True)
    engine.touch()
    assert killed_export(moment, tiny_checkpoint, output, "--int8", "--force") == -signal.SIGKILL
    assert verified_precision(output) == "int8"
    assert siblings(output) == [".bundle.partial", "bundle"]
    assert f"{output} exists" in refused(cli.main, tiny_checkpoint, "-o", output)
    assert siblings(output) == ["bundle"]
