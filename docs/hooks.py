"""MkDocs hook: write a page for every command from its parser, and bring linked files into the site."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fusion_edge.runtime.backends.devices import NAMES

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "fusion-export": (("fusion_edge.export.cli", "parser"),),
    "fusion-build": (("fusion_edge.export.engines.cli", "parser"),),
    "fusion-run": (("fusion_edge.runtime.cli.run", "parser"),),
    "fusion-info": (("fusion_edge.runtime.cli.info", "parser"),),
    "fusion-serve": (("fusion_edge.runtime.cli.serve", "parser"),),
    "fusion-bench": (
        ("fusion_edge.benchmarks.latency.cli", "parser"),
        ("fusion_edge.benchmarks.latency.cli", "compare_parser"),
    ),
    "fusion-eval": (("fusion_edge.benchmarks.evaluation.cli", "parser"),),
}
"""Module and function of every parser, by command."""
TITLES = {"positional arguments": "Arguments", "options": "Options"}
"""Headings of argparse's own groups."""
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)\)")
"""Link from a page to a file outside the documentation's folder."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for command, parsers in COMMANDS.items():
        sections = [
            command_page(getattr(import_module(module), name)(), level=1 if number == 0 else 2)
            for number, (module, name) in enumerate(parsers)
        ]
        files.append(File.generated(config, f"reference/cli/{command}.md", content="\n".join(sections)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Copy linked files outside the documentation's folder, such as results and examples, into ``files/`` of the site.

    Raises ``FileNotFoundError`` for a link to a missing file.
    """
    folder = (Path(config.docs_dir) / page.file.src_uri).parent
    up = "../" * page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(config.docs_dir):
            return match[0]
        if not target.is_file():
            raise FileNotFoundError(f"{page.file.src_uri} links to {match[2]}, which is no file.")
        name = f"files/{target.relative_to(ROOT).as_posix()}"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(target)))
        return f"[{match[1]}]({up}{name})"

    return OUTSIDE.sub(link, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Remove the roles of docstrings, as in ``:class:`Fusion```, which Markdown does not know."""
    return re.sub(r":(?:class|meth|func|data|attr|mod):(?=<code>)", "", html)


def command_page(parser: argparse.ArgumentParser, level: int) -> str:
    """Return a command as Markdown below a heading of a level: description, usage, arguments and options."""
    lines = [f"{'#' * level} {parser.prog}", "", str(parser.description), "", "```text", usage(parser), "```", ""]
    for group in parser._action_groups:
        title = TITLES.get(group.title or "", (group.title or "Options").capitalize())
        if group._group_actions:
            lines += [f"{'#' * (level + 1)} {title} {{ #{anchor(parser.prog, title)} }}", ""]
            lines += [line for action in group._group_actions for line in entry(parser, action)]
    if parser.epilog:
        lines += [parser.epilog, ""]
    return "\n".join(lines)


def usage(parser: argparse.ArgumentParser) -> str:
    """Return one line of usage: required arguments and options, then ``[OPTIONS]``."""
    required = [action for action in parser._actions if action.required]
    words = [f"{action.option_strings[-1]} {value(action)}" for action in required if action.option_strings]
    return " ".join([parser.prog, *(value(a) for a in required if not a.option_strings), *words, "[OPTIONS]"])


def entry(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    """Yield the lines of one argument or option: a term with an anchor, and its help."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    metavar = f"`{value(action)}`" if value(action) else ""
    term = " ".join(part for part in (names, metavar) if part)
    name = action.option_strings[-1] if action.option_strings else str(action.dest)
    yield f'<span id="{anchor(parser.prog, name)}"></span>{term}'
    help_text = parser._get_formatter()._expand_help(action) if action.help else ""
    yield f":   {sentence(escaped(help_text))}"
    yield ""


def value(action: argparse.Action) -> str:
    """Return the placeholder of an argument's value; empty for a flag."""
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        return str(action.metavar)
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.dest).upper()


def anchor(command: str, name: str) -> str:
    """Return the anchor of an option, as in ``fusion-export--group-size``."""
    return re.sub(r"[^a-z0-9-]+", "-", f"{command}{'' if name.startswith('-') else '-'}{name}".lower())


def sentence(text: str) -> str:
    """Return a help text as a sentence: capitalized, with a period."""
    word = re.match(r"[a-z-]+(?=[ ,])", text)
    is_word = word is not None and word[0] not in NAMES  # not a value such as int8 or a list of devices
    capital = text[:1].upper() + text[1:] if is_word else text
    return capital if capital.endswith(".") else f"{capital}."


def escaped(text: str) -> str:
    """Return a help text as Markdown: options, examples and objects as code, nothing read as markup."""
    text = re.sub(r"(?<![\w`-])(--?[a-z][\w-]*|<\|\w+\|>|\{[^}]*\}|'[^']+'(?=[,; )]|$))", r"`\1`", text)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", part) for part in parts)
