"""Commands and programs in the documents work: options exist, Python compiles, extras are defined."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from fusion_edge.benchmarks.acceptance import cli as acceptance
from fusion_edge.benchmarks.evaluation import cli as evaluation
from fusion_edge.benchmarks.latency import cli as bench
from fusion_edge.export import cli as export
from fusion_edge.export.engines import cli as build
from fusion_edge.runtime.cli import info, run, serve

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "fusion-export": export.parser,
    "fusion-build": build.parser,
    "fusion-run": run.parser,
    "fusion-info": info.parser,
    "fusion-serve": serve.parser,
    "fusion-bench": bench.parser,
    "fusion-bench compare": bench.compare_parser,
    "fusion-eval": evaluation.parser,
    "acceptance": acceptance.parser,
}


def blocks(language: str) -> list[tuple[str, str]]:
    """Return page and text of every code block in a language."""
    pattern = re.compile(rf"^```{language}$(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in PAGES for block in pattern.findall(page.read_text(encoding="utf-8").strip())]


def commands() -> list[str]:
    """Return every command line of fusion-edge's own commands, without what follows a pipe or redirection."""
    text = "\n".join(block.replace("\\\n", " ") for _, block in blocks("sh"))
    text = text.replace("python -m fusion_edge.acceptance", "acceptance")
    lines = re.findall(
        r"^(?:/usr/bin/time -v )?(?:taskset -c \d+ )?((?:fusion-\w+|acceptance) .+)$", text, re.MULTILINE
    )
    return [re.split(r" [|>] | # |\s+#", line)[0] for line in lines]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_options_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = shlex.split(line)
    if arguments[:1] == ["compare"]:
        name, arguments = "fusion-bench compare", arguments[1:]
    try:
        PARSERS[name]().parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{line}: {capsys.readouterr().err}")


def test_there_are_commands_to_test() -> None:
    assert {shlex.split(line)[0] for line in commands()} == {name.split()[0] for name in PARSERS}


@pytest.mark.parametrize(("page", "program"), blocks("python"))
def test_programs_compile(page: str, program: str) -> None:
    compile(program, page, "exec")
