"""Pictures of one folder: nothing outside of it is read."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.runtime.serve.images.errors import ImageError, Reason
from fusion_edge.runtime.serve.images.folder import read_file, relative_parts

LIMIT = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder beside a secret."""
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "picture").write_bytes(b"picture")
    (folder / "inner" / "ä b.png").write_bytes(b"inner")
    return folder


def read(folder: Path, url: str) -> bytes:
    return read_file(folder, relative_parts(url, folder), LIMIT)


def refused(folder: Path, url: str) -> Reason:
    with pytest.raises(ImageError) as caught:
        read(folder, url)
    assert str(folder) not in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.reason


def test_names_and_urls(folder: Path) -> None:
    assert read(folder, "picture") == b"picture"
    assert read(folder, "inner/ä b.png") == b"inner"
    assert read(folder, f"file://{folder}/picture") == b"picture"
    assert read(folder, f"FILE://{folder}/inner/{quote('ä b.png')}") == b"inner"


def test_a_folder_may_be_a_link_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert read(tmp_path / "link", "picture") == b"picture"


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", ".", "..", "../secret", "inner/../../secret", "inner/../picture", "./picture", "inner//ä b.png"),
        *("/etc/passwd", "picture/", "inner/", "picture\0", "\0", "picture\n", "../secret\0.png", "\ud800", "a/" * 40),
        *("x" * 5000, "file:", "file:picture", "file:/etc/passwd", "file://picture", "file://localhost/etc/passwd"),
        *("file:///picture?x", "file:///picture#x", "file:///%ff", "file:////etc/passwd"),
    ],
)
def test_other_forms_are_refused(folder: Path, name: str) -> None:
    assert refused(folder, name) in (Reason.INVALID_URL, Reason.NOT_ALLOWED)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "{folder}/../secret",
            "{folder}/%2e%2e/secret",
            "{folder}/%2e%2e%2fsecret",
            "{folder}/inner/..%2f..%2fsecret",
        ),
        *(
            "{folder}%00/picture",
            "{folder}/picture%00",
            "{folder}x/picture",
            "{folder}",
            "{folder}/",
            "{folder}//picture",
        ),
        *("/etc/passwd", "{parent}/secret", "/proc/self/environ"),
    ],
)
def test_other_urls_are_refused(folder: Path, path: str) -> None:
    url = "file://" + path.format(folder=folder, parent=folder.parent)
    assert refused(folder, url) in (Reason.INVALID_URL, Reason.NOT_ALLOWED)


def test_links_are_not_followed(folder: Path) -> None:
    (folder / "out").symlink_to(folder.parent / "secret")
    (folder / "up").symlink_to("..")
    (folder / "within").symlink_to("picture")
    (folder / "loop").symlink_to("loop")
    for name in ("out", "up/secret", "within", "loop"):
        assert refused(folder, name) is Reason.NOT_ALLOWED


def test_only_regular_files_are_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket"))
        for name in ("pipe", "socket", "inner", "missing", "picture/x"):
            assert refused(folder, name) is Reason.NOT_ALLOWED


def test_the_limit_is_exact(folder: Path) -> None:
    (folder / "full").write_bytes(bytes(LIMIT))
    assert len(read(folder, "full")) == LIMIT
    (folder / "large").write_bytes(bytes(LIMIT + 1))
    assert refused(folder, "large") is Reason.TOO_LARGE
    with open(folder / "sparse", "wb") as file:
        file.truncate(1 << 40)
    assert refused(folder, "sparse") is Reason.TOO_LARGE


def test_descriptors_are_closed(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in ("picture", "inner/ä b.png", "inner", "missing", "inner/missing", "missing/x", "picture/x"):
        with suppress(ImageError):
            read(folder, name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_exchanged_for_a_link_is_not_left(folder: Path) -> None:
    """A thread exchanges a folder for a link outside, again and again."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"secret")
    (folder / "real").mkdir()
    (folder / "real" / "file").write_bytes(b"inside")
    (folder / "evil").symlink_to(outside)
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            os.rename(folder / "real", folder / "path")
            os.rename(folder / "path", folder / "real")
            os.rename(folder / "evil", folder / "path")
            os.rename(folder / "path", folder / "evil")

    thread = threading.Thread(target=exchange)
    thread.start()
    found: set[bytes | None] = set()
    try:
        for _ in range(3000):
            try:
                found.add(read(folder, "path/file"))
            except ImageError:
                found.add(None)
    finally:
        stop.set()
        thread.join()
    assert b"secret" not in found
    assert None in found


@given(st.text(alphabet=st.sampled_from("abc./\\%2eEfF\0\n~:?#ä"), max_size=30), st.booleans())
def test_parts_never_leave_the_folder(text: str, url: bool) -> None:
    folder = Path("/folder")
    with suppress(ImageError):
        parts = relative_parts(f"file:///folder/{text}" if url else text, folder)
        assert not {"", ".", ".."} & set(parts)
        assert not any("/" in part or "\0" in part for part in parts)
        assert os.path.normpath(folder.joinpath(*parts)).startswith("/folder/")
