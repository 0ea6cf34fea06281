"""The package folder, what imports cost, extras, and the remedies that messages and documents name."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

import fusion_edge
from fusion_edge import runtime

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDERS = ("benchmarks", "export", "kernels", "quant", "runtime")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_package_folder_links_to_the_top_level_folders() -> None:
    package = ROOT / "fusion_edge"
    assert {path.name: str(path.readlink()) for path in package.iterdir() if path.is_symlink()} == {
        folder: f"../{folder}" for folder in FOLDERS
    }
    assert Path(fusion_edge.__file__) == package / "__init__.py"


def test_an_editable_install_is_a_plain_path() -> None:
    """Type checkers and editors do not run import hooks."""
    installed = importlib.metadata.distributions(name="fusion-edge")
    paths = [file for distribution in installed for file in distribution.files or () if file.suffix == ".pth"]
    if not paths:
        pytest.skip("fusion-edge is not installed for editing")
    assert [file.read_text().strip() for file in paths] == [str(ROOT)]


def test_the_version_is_the_package_version() -> None:
    assert fusion_edge.__version__ == importlib.metadata.version("fusion-edge")


def test_public_names_are_found_when_they_are_used() -> None:
    assert set(fusion_edge.__all__) == {*runtime.__all__, "__version__"}
    assert all(getattr(fusion_edge, name) is not None for name in fusion_edge.__all__)
    assert set(fusion_edge.__all__) <= set(dir(fusion_edge))


def test_importing_the_package_takes_less_than_50_ms() -> None:
    program = "import time; start = time.process_time(); import fusion_edge; print(time.process_time() - start)"
    command = [sys.executable, "-I", "-c", program]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.05


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports for type checking and imports in functions count."""
    grimp = pytest.importorskip("grimp", reason="grimp needs Python 3.11")
    graph = grimp.build_graph("fusion_edge")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    importers = {module: graph.find_modules_that_directly_import(module) for module in graph.modules}
    on_circles = graph.modules
    while ends := {m for m in on_circles if not (imports[m] & on_circles and importers[m] & on_circles)}:
        on_circles = on_circles - ends
    assert not on_circles


def test_python_310_is_still_promised() -> None:
    assert PROJECT["requires-python"] == ">=3.10"


def test_the_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", readme):
        assert (ROOT / link.partition("#")[0]).exists()
    for script in ("./demo", "./test"):
        assert script in readme
        assert (ROOT / script).stat().st_mode & 0o111
    assert "\n./test\n" in ci


def test_no_extra_brings_both_wheels_of_onnxruntime() -> None:
    """They overwrite each other's files; only who asks for cpu and cuda at once gets them."""

    def wheels(requirements: list[str]) -> set[str]:
        found = set()
        for requirement in requirements:
            if own := re.fullmatch(r"fusion-edge\[(.+)\]", requirement):
                found |= set.union(*(wheels(EXTRAS[extra]) for extra in own[1].split(",")))
            elif name := re.match(r"onnxruntime[\w-]*", requirement):
                found.add(name[0])
        return found

    assert wheels(PROJECT["dependencies"]) == set()
    brought = {extra: wheels(requirements) for extra, requirements in EXTRAS.items()}
    assert brought["cpu"] == {"onnxruntime"}
    assert brought["cuda"] == {"onnxruntime-gpu"}
    assert all(len(names) < 2 for names in brought.values())


def test_remedies_work_in_a_clone() -> None:
    """The package is on no index: messages and documents install ``'.[EXTRA]'`` or ``'./fusion-edge[EXTRA]'``."""
    code = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = set()
    for path in (*code, *pages):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![./])fusion-edge\[|pip install (--upgrade )?'?fusion-edge", text), path
        for group in re.findall(r"'\.(?:/fusion-edge)?\[([a-z,-]+)\]'", text):
            named |= set(group.split(","))
    assert {"cpu", "cuda", "export", "calibrate", "kernels", "tensorrt-rtx"} <= named <= set(EXTRAS)


def test_hooks_before_a_commit_are_what_ci_runs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    checks = (ROOT / ".ci/lint").read_text(encoding="utf-8").splitlines()
    run = re.findall(r"entry: \.venv/bin/(\w[\w-]*(?: -p \w+| check| format| build| tests)?)", hooks)
    assert len(run) == 7
    assert all(any(line.startswith(command) for line in checks) for command in run)
