"""Hidden and replaced folders: what commands delete, and what they refuse to."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from faults import verified_precision

from fusion_edge.export import cli
from fusion_edge.export.bundle.atomic_folder import atomic_folder
from fusion_edge.export.bundle.folder_content import FolderContent, ForeignPathError, matches
from fusion_edge.export.bundle.folder_lock import locked_folder
from fusion_edge.export.calibration.work_folder import work_folder
from fusion_edge.runtime.bundle.files import digest
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.output_file import check_output_file, write_whole

Refuse = Callable[..., str]
HIDDEN = (".bundle.partial", ".bundle.replaced")
ALL_HIDDEN = (*HIDDEN, ".bundle.calibration")


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Hidden folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_HIDDEN)
@pytest.mark.parametrize("make", ["link", "dangling link", "link to a file", "file", "hard link", "pipe"])
def test_file_or_link_instead_of_hidden_folder(
    tiny_checkpoint: Path, output: Path, tmp_path: Path, name: str, make: str, refused: Refuse
) -> None:
    victim, hidden = tmp_path / "victim", output.with_name(name)
    victim.mkdir()
    (victim / "llm.data").write_text("precious")  # a name that bundles have
    if make == "file":
        hidden.write_text("precious")
    elif make == "hard link":
        hidden.hardlink_to(victim / "llm.data")
    elif make == "pipe":
        os.mkfifo(hidden)
    else:
        hidden.symlink_to({"link": victim, "dangling link": victim / "no", "link to a file": victim / "llm.data"}[make])
    message = refused(cli.main, tiny_checkpoint, "-o", output, "--force")
    kind = "not a folder" if make in ("file", "hard link", "pipe") else "a link"
    assert f"{hidden} is {kind}; expected nothing" in message
    assert (victim / "llm.data").read_text() == "precious"
    assert os.path.lexists(hidden)
    assert not output.exists()


@pytest.mark.parametrize("name", ALL_HIDDEN)
def test_hidden_folder_links_to_output(tiny_checkpoint: Path, replaceable: Path, name: str, refused: Refuse) -> None:
    replaceable.with_name(name).symlink_to("bundle")
    for options in ([], ["--force"]):
        message = refused(cli.main, tiny_checkpoint, "-o", replaceable, *options)
        assert f"{replaceable.with_name(name)} is a link" in message
    assert verified_precision(replaceable) == "int4"


def test_link_replaces_partial_folder_during_export(
    tiny_checkpoint: Path, replaceable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse
) -> None:
    """A link in place of the partial folder: its target is neither published nor changed."""
    partial, victim = replaceable.with_name(".bundle.partial"), tmp_path / "victim"
    shutil.copytree(replaceable, victim)
    before = {path.name: path.read_bytes() for path in victim.iterdir()}

    def late(*arguments: Any) -> str:
        if not partial.is_symlink():
            partial.rename(tmp_path / "away")
            partial.symlink_to(victim)
        return digest(*arguments)

    monkeypatch.setattr("fusion_edge.export.bundle.writer.digest", late)
    refused(cli.main, tiny_checkpoint, "-o", replaceable, "--int8", "--force")
    assert verified_precision(replaceable) == "int4"
    assert partial.is_symlink()
    for name, content in before.items():
        assert (victim / name).read_bytes() == content


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("inside", ["thesis.txt", "llm.data/", "old/llm.data", "engines/llm.engine.txt"])
def test_hidden_folder_with_foreign_files(
    tiny_checkpoint: Path, output: Path, name: str, inside: str, refused: Refuse
) -> None:
    hidden = output.with_name(name)
    path = hidden / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if inside.endswith("/") else path.write_text("dear")
    (hidden / "bundle.json").write_text("{}")
    message = refused(cli.main, tiny_checkpoint, "-o", output)
    assert f"{hidden}/" in message
    assert "was not written by fusion-edge" in message
    assert path.exists()
    assert (hidden / "bundle.json").exists()  # nothing is deleted then


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_folder_of_another_user(tiny_checkpoint: Path, output: Path, name: str, refused: Refuse) -> None:
    hidden = output.with_name(name)
    hidden.mkdir()
    (hidden / "llm.data").write_text("theirs")
    os.chown(hidden, 12345, 12345)
    assert f"{hidden} belongs to another user" in refused(cli.main, tiny_checkpoint, "-o", output)
    assert (hidden / "llm.data").exists()


def test_links_in_a_hidden_folder_are_not_followed(tiny_checkpoint: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("dear")
    partial = output.with_name(".bundle.partial")
    partial.mkdir()
    (partial / "llm.data").symlink_to(tmp_path / "precious")
    (partial / "llm.onnx").hardlink_to(tmp_path / "precious")
    assert cli.main([str(tiny_checkpoint), "-o", str(output)]) == 0
    assert verified_precision(output) == "int4"
    assert (tmp_path / "precious").read_text() == "dear"


def test_partial_folder_moved_during_export(output: Path) -> None:
    """Without locks, another export may take the folder. Its files are neither published nor removed."""
    partial = output.with_name(".bundle.partial")

    def write() -> None:
        with atomic_folder(output, FolderContent("write", ("*.txt",), "a.json")) as folder:
            folder.rename(output.with_name("away"))
            partial.mkdir()
            (partial / "theirs.txt").touch()

    with pytest.raises(FusionError, match="Another write"):
        write()
    assert (partial / "theirs.txt").exists()
    assert not output.exists()


@pytest.mark.parametrize("make", ["link", "file", "other"])
def test_invalid_calibration_folder(tmp_path: Path, make: str) -> None:
    folder, victim = tmp_path / ".b.calibration", tmp_path / "victim"
    victim.mkdir()
    (victim / "data.npy").write_text("dear")
    if make == "link":
        folder.symlink_to(victim)
    elif make == "file":
        folder.write_text("dear")
    else:
        shutil.copytree(victim, folder)
        (folder / "notes.txt").write_text("dear")
    with pytest.raises(FusionError, match=r"\.b\.calibration"), work_folder(tmp_path / "b", "command"):
        pass
    assert (victim / "data.npy").read_text() == "dear"
    assert make != "other" or tree(folder) == ["data.npy", "notes.txt"]


def test_patterns_match_per_path_component() -> None:
    assert matches("engines/x/llm.engine", "engines/*/*.engine")
    assert not matches("engines/x/y/llm.engine", "engines/*/*.engine")
    assert not matches("engines/x.onnx", "*.onnx")
    assert not matches("engines", "engines/")


# What --force replaces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["notes.txt", "extra.data", ".a", "sub/llm.data", "engines/README", "engines/a/x", "engines/a/b.engine"]
)
def test_foreign_files_are_kept(tiny_checkpoint: Path, replaceable: Path, name: str, refused: Refuse) -> None:
    path = replaceable / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("dear")
    before = tree(replaceable.parent)
    message = refused(cli.main, tiny_checkpoint, "-o", replaceable, "--int8", "--force")
    assert f"{replaceable / name.split('/')[0]}" in message
    assert "does not belong to the bundle" in message
    assert tree(replaceable.parent) == before


def test_foreign_file_added_during_export(
    tiny_checkpoint: Path, replaceable: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse
) -> None:
    def late(*arguments: Any) -> str:
        (replaceable / "notes.txt").write_text("dear")
        return digest(*arguments)

    monkeypatch.setattr("fusion_edge.export.bundle.writer.digest", late)
    assert "notes.txt" in refused(cli.main, tiny_checkpoint, "-o", replaceable, "--int8", "--force")
    assert (replaceable / "notes.txt").read_text() == "dear"
    assert [path.name for path in replaceable.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("listed", ["../../victim.data", "/etc/passwd", "notes.txt", "sub/llm.data", "", ".", 7, None])
def test_manifest_lists_foreign_file(
    tiny_checkpoint: Path, replaceable: Path, tmp_path: Path, listed: object, refused: Refuse
) -> None:
    (tmp_path / "victim.data").write_text("dear")
    (replaceable / "sub").mkdir()
    (replaceable / "sub/llm.data").write_text("dear")
    (replaceable / "notes.txt").write_text("dear")
    manifest = json.loads((replaceable / MANIFEST).read_text())
    manifest["files"].append({"path": listed})
    (replaceable / MANIFEST).write_text(json.dumps(manifest))
    refused(cli.main, tiny_checkpoint, "-o", replaceable, "--force")
    for path in (tmp_path / "victim.data", replaceable / "notes.txt", replaceable / "sub/llm.data"):
        assert path.read_text() == "dear"


@pytest.mark.parametrize("text", ["", "[]", "[" * 9999, '{"files": 1}', '{"files": [1]}', '{"files": [{"path": []}]}'])
def test_unreadable_manifest_of_replaced_folder(
    tiny_checkpoint: Path, replaceable: Path, text: str, refused: Refuse
) -> None:
    (replaceable / MANIFEST).write_text(text)
    before = tree(replaceable)
    assert "is not a bundle" in refused(cli.main, tiny_checkpoint, "-o", replaceable, "--force")
    assert tree(replaceable) == before


def test_engines_are_replaced_with_bundle(tiny_checkpoint: Path, replaceable: Path, refused: Refuse) -> None:
    engines = replaceable / "engines/tensorrt-10.9-cc8.7-0123456789abcdef"
    building = engines.with_name(f".{engines.name}.partial")
    for folder in (engines, building):
        folder.mkdir(parents=True)
        (folder / "llm.engine").touch()
    (building / ".engines.json.0a1b2c3d").touch()
    (engines / "engines.json").touch()
    (engines.parent / "tensorrt-10.9-cc8.7.timing").touch()
    with locked_folder(building, ""):
        assert "fusion-build" in refused(cli.main, tiny_checkpoint, "-o", replaceable, "--int8", "--force")
    assert cli.main([str(tiny_checkpoint), "-o", str(replaceable), "--int8", "--force"]) == 0
    assert verified_precision(replaceable) == "int8"


@pytest.mark.parametrize("number", ["EINVAL", "EXDEV"])
def test_replace_bundle_in_container_image_layer(
    tiny_checkpoint: Path, replaceable: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder can be neither swapped nor renamed. The error of the swap depends on the kernel."""
    rename = os.rename

    def guarded(source: Any, target: Any, **options: Any) -> None:
        if Path(source) == replaceable:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target, **options)

    def exchange(*_: Path) -> bool:
        if number == "EXDEV":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return False

    monkeypatch.setattr(os, "rename", guarded)
    monkeypatch.setattr("fusion_edge.export.bundle.atomic_folder.exchange", exchange)
    assert cli.main([str(tiny_checkpoint), "-o", str(replaceable), "--int8", "--force"]) == 0
    assert verified_precision(replaceable) == "int8"
    assert [path.name for path in replaceable.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("number", ["EINVAL", "ENOSYS", "EOPNOTSUPP", None])
def test_exchange_not_supported(
    tiny_checkpoint: Path, replaceable: Path, number: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system refuses the call, or the C library lacks it."""

    def renameat2(*_: object) -> int:
        ctypes.set_errno(getattr(errno, str(number)))
        return -1

    library = SimpleNamespace() if number is None else SimpleNamespace(renameat2=renameat2)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    assert cli.main([str(tiny_checkpoint), "-o", str(replaceable), "--int8", "--force"]) == 0
    assert verified_precision(replaceable) == "int8"
    assert [path.name for path in replaceable.parent.iterdir()] == ["bundle"]


def test_link_targets_of_replaced_bundle_stay(tiny_checkpoint: Path, replaceable: Path, tmp_path: Path) -> None:
    """Links, as in a hub cache, are deleted; their targets stay."""
    (replaceable / "llm.data").rename(tmp_path / "blob")
    (replaceable / "llm.data").symlink_to(tmp_path / "blob")
    assert cli.main([str(tiny_checkpoint), "-o", str(replaceable), "--int8", "--force"]) == 0
    assert (tmp_path / "blob").is_file()
    assert not (replaceable / "llm.data").is_symlink()


def test_dry_run_writes_nothing(tiny_checkpoint: Path, output: Path) -> None:
    assert cli.main([str(tiny_checkpoint), "-o", str(output), "--dry-run"]) == 0
    assert not list(output.parent.iterdir())


def test_foreign_path_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "x") in str(ForeignPathError(tmp_path / "x"))


# Files -------------------------------------------------------------------------------------------------------------


def test_write_whole_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report").write_text("old")
    (tmp_path / "report").chmod(0o600)
    (tmp_path / "link").symlink_to("report")
    with monkeypatch.context() as patch:

        def fail(*_: object) -> NoReturn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "write", fail)
        with pytest.raises(OSError, match="link"):
            write_whole(tmp_path / "link", "new")
    assert tree(tmp_path) == ["link", "report"]
    assert (tmp_path / "report").read_text() == "old"
    monkeypatch.setattr(os, "write", lambda file, data, write=os.write: write(file, data[:2]))
    write_whole(tmp_path / "link", "new")
    assert tree(tmp_path) == ["link", "report"]
    assert (tmp_path / "report").read_text() == "new"
    assert (tmp_path / "report").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("-", "not a file name"),
        ("/dev/null", "is not a regular file"),
        ("/", "is not a regular file"),
        ("missing/x", "is not a folder"),
    ],
)
def test_unwritable_output_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FusionError, match=said):
        check_output_file(Path(name))
    with pytest.raises(FusionError, match=said):
        write_whole(Path(name), "new")
    assert not tree(tmp_path)
