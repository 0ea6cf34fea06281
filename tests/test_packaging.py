"""The package as it is shipped: what a wheel holds, and what the runtime needs."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "onnx", "transformers", "huggingface_hub", "safetensors", "sentencepiece")


def test_the_runtime_needs_little(tmp_path: Path) -> None:
    """In an environment with the four packages that the runtime imports and no other."""
    venv.create(tmp_path / "clean", symlinks=True)
    python = tmp_path / "clean/bin/python"
    site = next((tmp_path / "clean/lib").glob("python*")) / "site-packages"
    installed = Path(pytest.__file__).parents[1]
    for package in ("numpy", "onnxruntime", "tokenizers", "PIL"):
        for path in (*installed.glob(package), *installed.glob(f"{package.lower()}*.libs")):
            (site / path.name).symlink_to(path)
    (site / "fusion_edge").mkdir()
    for package in "runtime":
        (site / "fusion_edge" / package).symlink_to(ROOT / package)
    program = (
        "import sys, time; start = time.perf_counter(); import fusion_edge.runtime as runtime; "
        "took = time.perf_counter() - start; runtime.load; "
        f"assert not set(sys.modules) & set({HEAVY!r}), 'too much'; print(took)"
    )
    runs = [subprocess.run([python, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.5


def test_heavy_packages_are_not_imported_at_all() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime").rglob("*.py"))
    for package in HEAVY:
        assert not re.search(rf"^\s*(import|from) {package}\b", source, re.MULTILINE)


def test_python_310_is_still_promised() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in text


def test_the_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", readme):
        assert (ROOT / link).is_file()
    for script in ("./demo", "./test"):
        assert script in readme
        assert (ROOT / script).stat().st_mode & 0o111
    assert "\n./test\n" in ci


def test_no_extra_brings_both_wheels_of_onnxruntime() -> None:
    """They overwrite each other's files; only who asks for cpu and cuda at once gets them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def wheels(requirements: list[str]) -> set[str]:
        found = set()
        for requirement in requirements:
            if own := re.fullmatch(r"fusion-edge\[(.+)\]", requirement):
                found |= set.union(*(wheels(extras[extra]) for extra in own[1].split(",")))
            elif name := re.match(r"onnxruntime[\w-]*", requirement):
                found.add(name[0])
        return found

    assert wheels(project["dependencies"]) == set()
    brought = {extra: wheels(requirements) for extra, requirements in extras.items()}
    assert brought["cpu"] == {"onnxruntime"}
    assert brought["cuda"] == {"onnxruntime-gpu"}
    assert all(len(names) < 2 for names in brought.values())


def test_messages_name_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    code = (path for folder in ("export", "runtime", "kernels") for path in (ROOT / folder).rglob("*.py"))
    named = {
        extra
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *code)
        for group in re.findall(r"(?:fusion-edge|'\.)\[([a-z,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert {"cpu", "cuda", "calibrate", "kernels", "tensorrt-rtx"} <= named <= set(extras)
