"""The documentation builds without a warning, names only paths that exist, and loads nothing from other hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusion_edge

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FOLDERS = ("benchmarks", "docs", "examples", "export", "fusion_edge", "kernels", "quant", "runtime", "tests", ".ci")


def ids(path: Path) -> str:
    """Return a page's name for pytest."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_paths_exist(page: Path) -> None:
    """Code spans such as `export/cli.py`, and modules such as ``fusion_edge.benchmarks.peers``."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)`", text)
    missing = {path for path in paths if not (ROOT / path).exists()}
    for module in re.findall(r"python -m ((?:fusion_edge|tests)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            missing.add(module)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in link and not is_generated(page.parent / link):
            assert (page.parent / link).exists(), link


def test_documents_named_in_code_exist() -> None:
    code = (path for folder in FOLDERS for kind in ("py", "h", "cpp") for path in (ROOT / folder).rglob(f"*.{kind}"))
    named = {name for path in code for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8"))}
    assert "docs/fusion-model.md" in named
    assert not {name for name in named if not (ROOT / name).exists()} - {"docs/Versioning.md"}  # of ONNX


def test_every_public_name_has_its_place_on_the_api_page() -> None:
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: fusion_edge\.(\w+)$", page, re.MULTILINE)) == sorted(
        set(fusion_edge.__all__) - {"__version__"}
    )


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert text.index("./demo") < text.index("./test") < text.index("import fusion_edge") < text.index("## ")


def is_generated(target: Path) -> bool:
    """Whether a link leads to a page that the site's hook writes."""
    return target.resolve().parent == ROOT / "docs/reference/cli" and target.name.startswith("fusion-")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", text)
        assert not [tag for tag in tags if re.search(r"(?:src|href)=\"?https?://", tag)], page


def test_every_option_is_on_its_page(site: Path) -> None:
    from fusion_edge.export import cli

    page = (site / "reference/cli/fusion-export/index.html").read_text(encoding="utf-8")
    for action in cli.parser()._actions:
        for option in action.option_strings:
            assert f"<code>{option}</code>" in page
