"""The source archive and the wheel: their files, their tags, and the commands in an environment with nothing else."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from support.demo_model import ANSWER, PICTURE, QUESTION
from support.paths import DEMO_CHECKPOINT, ROOT

from fusion_edge import __version__
from fusion_edge.export import cli

RUNTIME_LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "PIL", "pillow")
"""Import names of what the extra ``[cpu]`` installs and the runtime imports, and of folders with their libraries."""
FOLDERS = (
    "export",
    "kernels",
    "quant",
    "runtime",
    "benchmarks/acceptance",
    "benchmarks/evaluation",
    "benchmarks/latency",
)
"""Folders that ship."""
HEAVY = ("torch", "onnx", "transformers", "huggingface_hub", "safetensors", "sentencepiece")
"""Libraries that the runtime must not import; ``import-linter`` checks the same in the source."""
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels are built for x86-64"),
    pytest.mark.xdist_group("wheel"),  # one process builds and installs it
]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the source archive of a copy of the files in git, and the wheel that is built from it."""
    copy, folder = tmp_path_factory.mktemp("clone") / "fusion-edge", tmp_path_factory.mktemp("dist")
    untracked = shutil.ignore_patterns(".*", "*.egg-info", "*.so", "__pycache__", "build", "dist", "tests", "results")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=untracked)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def robot(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin/`` of an environment with the wheel and what the runtime imports, linked from this environment."""
    environment = tmp_path_factory.mktemp("robot")
    venv.create(environment, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True)
    (site,) = environment.glob("lib/python*/site-packages")
    for name in RUNTIME_LIBRARIES:
        for path in (*installed().glob(name), *installed().glob(f"{name}.libs")):
            (site / path.name).symlink_to(path)
    return environment / "bin"


def installed() -> Path:
    """Folder of this environment's packages."""
    return Path(pytest.__file__).parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in INT4."""
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(folder), "--int4"]) == 0
    return folder


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command outside the clone."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    text = [str(argument) for argument in arguments]
    return subprocess.run(text, capture_output=True, text=True, cwd="/", env=variables, check=False)


def test_the_wheel_is_for_every_python(wheel: Path) -> None:
    assert wheel.name == f"fusion_edge-{__version__}-py3-none-linux_x86_64.whl"


def test_the_wheel_holds_what_ships_and_nothing_else(wheel: Path) -> None:
    modules = {path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    modules |= {Path("benchmarks/__init__.py"), Path("benchmarks/entry.py"), Path("__init__.py"), Path("acceptance.py")}
    expected = {f"fusion_edge/{path.as_posix()}" for path in modules}
    expected |= {"fusion_edge/py.typed", "fusion_edge/kernels/cpu_operators.so"}
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == expected


def test_no_archive_holds_a_link(distributions: Path, wheel: Path) -> None:
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    kernels = ROOT / "kernels/cpu"
    sources = {path.relative_to(kernels).as_posix() for path in kernels.rglob("*.*")}
    held = {member.name.split("/kernels/cpu/")[-1] for member in members if member.isfile()}
    assert {"simd/neon.h", "tiers/avx2.cpp"} <= sources <= held
    assert all(info.external_attr >> 28 in (0, 0o10) for info in zipfile.ZipFile(wheel).infolist())  # regular files


def test_the_library_of_kernels_is_stripped(wheel: Path) -> None:
    library = zipfile.ZipFile(wheel).read("fusion_edge/kernels/cpu_operators.so")
    assert b".debug_info" not in library
    assert len(library) < 2_000_000


def test_the_wheel_runs_with_glibc_228(wheel: Path) -> None:
    pytest.importorskip("auditwheel")
    shown = command(sys.executable, "-m", "auditwheel", "show", "--json", wheel)
    assert json.loads(shown.stdout)["overall_tag"] <= "manylinux_2_28_x86_64"


def test_a_robot_asks_the_demo_model(robot: Path, bundle: Path) -> None:
    asked = command(
        robot / "fusion-run",
        bundle,
        "--image",
        PICTURE,
        "--ask",
        QUESTION,
    )
    assert (asked.returncode, asked.stdout.strip()) == (0, ANSWER), asked.stderr


def test_a_robot_inspects_a_bundle(robot: Path, bundle: Path) -> None:
    shown = command(robot / "fusion-info", bundle, "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["precision"] == "int4"


def test_a_robot_measures_a_bundle(robot: Path, bundle: Path) -> None:
    measured = command(robot / "fusion-bench", bundle, "--seconds", "1", "--new-tokens", "2", "--json")
    assert measured.returncode == 0, measured.stderr
    peaks = json.loads(measured.stdout)["peaks"].values()
    assert peaks
    assert not any(device["not_measured"] for device in peaks)


def test_a_robot_evaluates_a_bundle(robot: Path, bundle: Path, tmp_path: Path) -> None:
    sample = {"image": str(PICTURE), "question": QUESTION, "answer": ANSWER}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample))
    command_line = (robot / "fusion-eval", bundle, tmp_path, "--min-accuracy", "100", "--html", tmp_path / "page.html")
    evaluated = command(*command_line, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["accuracy"]["exact"]["count"] == 1
    assert "Every answer is right." in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["fusion-export", "fusion-build"])
def test_a_missing_extra_is_one_line(robot: Path, name: str) -> None:
    refused = command(robot / name, "checkpoint")
    remedy = "run pip install '.[export]' in a clone of fusion-edge."
    assert refused.stderr == f"error: onnx and huggingface_hub are not installed; {remedy}\n"
    assert (refused.returncode, refused.stdout) == (1, "")


def test_the_acceptance_ships(robot: Path) -> None:
    refused = command(robot / "python", "-m", "fusion_edge.acceptance")
    assert refused.stderr == "error: onnx is not installed; run pip install '.[export]' in a clone of fusion-edge.\n"
    assert refused.returncode == 1


def test_the_acceptance_runs_from_a_wheel(robot: Path, tmp_path: Path) -> None:
    """Steps that need the demo checkpoint are skipped."""
    names = ("onnx", "ml_dtypes", "google", "huggingface_hub", "typing_extensions.py")
    packages = (path for name in names for path in installed().glob(name))
    environment = tmp_path / "packages"
    environment.mkdir()
    for path in packages:
        (environment / path.name).symlink_to(path)
    parts = [f"--only={part}" for part in ("environment", "demo", "full-size")]
    ended = subprocess.run(
        [robot / "python", "-m", "fusion_edge.acceptance", *parts],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(environment)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "not part of a wheel; run the command in a clone of fusion-edge, or pass --bundle." in ended.stdout
    assert "full-size-export" in ended.stdout


def test_the_runtime_imports_little(robot: Path) -> None:
    """In an environment with the packages that it imports and no other."""
    program = (
        "import sys, time; start = time.perf_counter(); import fusion_edge.runtime as runtime; "
        "took = time.perf_counter() - start; runtime.load; "
        f"assert not set(sys.modules) & set({HEAVY!r}), 'too much'; print(took)"
    )
    runs = [command(robot / "python", "-c", program) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert min(float(run.stdout) for run in runs) < 0.5
