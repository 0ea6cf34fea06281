"""Invalid options: ``fusion-export`` refuses them and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fusion_edge.export import cli

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tiny_checkpoint: Path, tmp_path: Path, refused: Refuse) -> Refuse:
    """Return ``refuse(*options, code=1)``: it returns the error and checks that nothing is left."""
    output = tmp_path / "output"
    output.mkdir()

    def run(*options: object, code: int = 1) -> str:
        message = refused(cli.main, tiny_checkpoint, "-o", output / "bundle", *options, code=code)
        assert not list(output.iterdir())
        return message

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query-len", "9"], "Query length 9 is not offered by this checkpoint; choose from 4, 16"),
        (["--query-len", "4,144"], "Query length 144 is not offered"),
        (["--image-tokens", "10"], "10 image tokens do not form a square grid of at most 16"),
        (["--image-tokens", "25"], "choose one of 1, 4, 9, 16"),
        (["--max-context", "63"], "A context of 63 tokens is out of range"),
        (["--max-context", "513"], "choose 64 to 512"),
        (["--rule", "llm.*=int3"], "Unknown weight format 'int3'"),
        (["--rule", "llm.*=int4:100"], "Unknown weight format 'int4:100'"),
        (["--rule", "llm.*=fp16:32"], "Unknown weight format 'fp16:32'"),
        (["--rule", "llm.*"], "Cannot read rule 'llm.*'"),
        (["--rule", "=int4"], "Cannot read rule '=int4'"),
        (["--rule", "lm.*=int4"], "Rule 'lm.*' matches no weight; names look like"),
        (["--rule", "llm.embed_tokens=int4"], "llm.embed_tokens cannot be int4"),
    ],
)
def test_option_contradicts_checkpoint(refuse: Refuse, options: list[str], message: str) -> None:
    assert message in refuse(*options, code=2)


@pytest.mark.parametrize(
    "options",
    [
        ["--query-len", "0"],
        ["--query-len", "4,,16"],
        ["--max-context", "-1"],
        ["--image-tokens", "1.5"],
        ["--group-size", "16"],
        ["--target", "tpu"],
        ["--accuracy-level", "3"],
        ["--int4", "--int8"],
        ["--fit", "8 apples"],
        ["--fit", "9" * 400],
    ],
)
def test_wrong_usage(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(tiny_checkpoint), *options])
    assert stopped.value.code == 2
    *usage, message = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: fusion-export")
    assert message.startswith("fusion-export: error: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[rules", "Cannot read the rules in"),
        ("[" * 50_000, "Cannot read the rules in"),
        ("a = " + "[" * 50_000, "Cannot read the rules in"),
        ("", "contains nothing; expected a table [rules]"),
        ("rules = 3", "contains rules; expected a table [rules]"),
        ("[rules]\nx = 3\n[more]", "contains rules, more; expected"),
        ("[rules]\nllm.lm_head = 'int8'", "Rule 'llm' in"),
        ("[rules]\n'llm.lm_head' = 'int9'", "Unknown weight format 'int9'"),
        ("[rules]\n'lm_head' = 'int8'", "Rule 'lm_head' matches no weight"),
    ],
)
def test_invalid_rules_file(refuse: Refuse, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rules.toml").write_text(content, encoding="utf-8")
    code = 2 if "Unknown" in message or "matches" in message else 1
    assert message in refuse("--rules", tmp_path / "rules.toml", code=code)


def test_unreadable_rules_file(refuse: Refuse, tmp_path: Path) -> None:
    assert "No such file" in refuse("--rules", tmp_path / "missing.toml")
    assert "Is a directory" in refuse("--rules", tmp_path)
    (tmp_path / "rules.toml").write_bytes(b"\xff")
    assert "Cannot read the rules" in refuse("--rules", tmp_path / "rules.toml")
