"""Commands on unusual machines: odd paths, no home, read-only file systems, broken installations of ONNX Runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.demo_model import OTHER_ANSWER, OTHER_QUESTION, PICTURE
from support.paths import DEMO_CHECKPOINT, ROOT

from fusion_edge.export import cli as export_cli
from fusion_edge.runtime.backends.onnxruntime.library import OLDEST, find_onnxruntime
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.errors import DeviceError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN = "import sys; from fusion_edge.runtime.cli.entry import run; sys.exit(run())"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    assert export_cli.main([str(DEMO_CHECKPOINT), "-o", str(folder)]) == 0
    return folder


def ask(bundle: Path, *before: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    command = [*before, sys.executable, "-c", RUN, str(bundle), "--image", str(PICTURE), "--threads=1"]
    command += ["--ask", OTHER_QUESTION]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, **more)  # type: ignore[call-overload,no-any-return]


def answers(done: subprocess.CompletedProcess[bytes]) -> bool:
    return (done.returncode, done.stdout.strip(), done.stderr) == (0, OTHER_ANSWER.encode(), b"")


@pytest.mark.parametrize(
    "name", [b"with spaces ", "Gr\u00fc\u00dfe \u4e2d\u6587".encode(), b"a#b%20c?d&e", b"-", b"'\"$(x)", b"n\nl"]
)
def test_unusual_bundle_names(demo: Path, tmp_path: Path, name: bytes) -> None:
    folder = shutil.copytree(demo, tmp_path / os.fsdecode(name))
    assert answers(ask(folder))
    assert cli_info.main([str(folder)]) == 0


def test_a_path_that_is_not_utf_8(demo: Path, tmp_path: Path) -> None:
    done = ask(shutil.copytree(demo, tmp_path / os.fsdecode(b"not\xffutf-8\xfe")))
    assert done.returncode == 1
    assert b"is not UTF-8" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_very_long_path(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["d" * 200] * 12)
    folder.parent.mkdir(parents=True)
    shutil.copytree(demo, folder)
    assert answers(ask(folder))


def test_an_empty_environment(demo: Path, tmp_path: Path) -> None:
    """No home, locale or path, and a deleted current folder."""
    (tmp_path / "gone").mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    done = ask(demo, "sh", "-c", script, str(tmp_path / "gone"), env={"LC_ALL": "C"})
    assert answers(done)


def test_a_read_only_file_system(demo: Path) -> None:
    """A read-only file system without temporary folder and ``/sys``."""
    script = (
        "for m in $(awk '{print $2}' /proc/self/mounts); do mount -o remount,bind,ro $m; done 2> /dev/null; "
        'mount -t tmpfs -o ro none /sys && touch /tmp/x 2> /dev/null && exit 9; exec "$@"'
    )
    unshare = ["unshare", "-rm", "--propagation=private", "sh", "-c"]
    if subprocess.run([*unshare, "mount -t tmpfs none /sys"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces are not available")
    done = ask(demo, *unshare, script, "sh")
    if done.returncode == 9:
        pytest.skip("mounts cannot be made read-only")
    assert answers(done)


# ONNX Runtime -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.22.1", "1.23.0", "1.23.1", "1.9", "unknown", ""])
def test_an_older_onnxruntime(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    module = ModuleType("onnxruntime")
    module.__dict__.update(InferenceSession=object, __version__=version)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(DeviceError) as refusal:
        find_onnxruntime("cuda")
    assert str(refusal.value) == (
        f"ONNX Runtime {version} is too old, 1.23.2 or newer is needed; "
        "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install '.[cuda]' in a clone of fusion-edge."
    )


@pytest.mark.parametrize("version", ["1.23.2", "1.24.0", "1.31.1", "2.0", "1.32.0.dev20260101"])
def test_a_newer_onnxruntime(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    module = ModuleType("onnxruntime")
    severities: list[int] = []
    module.__dict__.update(InferenceSession=object, __version__=version, set_default_logger_severity=severities.append)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    assert find_onnxruntime() is module
    assert severities == [4]


def test_pyproject_requires_the_oldest_onnxruntime() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in ("cpu", "cuda"):
        assert project["optional-dependencies"][extra][0].endswith(f">={'.'.join(map(str, OLDEST))}")


BROKEN = {
    "raise SystemError('bad')": "ONNX Runtime cannot be imported (bad);",
    "import nothing_like_it": "ONNX Runtime cannot be imported (No module named 'nothing_like_it');",
    "raise ImportError('a.so: failed to map segment from shared object')": "not enough memory to load ONNX Runtime (",
    "x = 1": "ONNX Runtime cannot be imported (cannot import name 'InferenceSession'",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_onnxruntime(demo: Path, tmp_path: Path, code: str) -> None:
    """Output of ONNX Runtime during the load is dropped; other output is kept."""
    (tmp_path / "onnxruntime.py").write_text(
        "import os\nos.write(2, b'onnxruntime cpuid_info warning: Unknown CPU vendor\\nother\\n')\n" + code,
        encoding="utf-8",
    )
    done = ask(demo, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    other, error = done.stderr.decode().splitlines()
    assert other == "other"
    assert error.startswith("error: ")
    assert BROKEN[code] in error
