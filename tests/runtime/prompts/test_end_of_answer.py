"""Tokens that end an answer: always the template's, and those of the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.demo_model import OTHER_ANSWER, OTHER_QUESTION, PICTURE
from support.paths import DEMO_CHECKPOINT, GOLDEN

from fusion_edge.export import cli
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.runtime import load

END = 1204  # <|end|>


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy to change."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "FUSION-changed")


def end_tokens(folder: Path) -> tuple[int, ...]:
    with Checkpoint(folder) as opened:
        return plan_export(opened, ExportOptions(precision="fp16")).config.eos_token_ids


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [1201, END, 1200]}, (1201, END, 1200)),
        ({"eos_token_id": END}, (END,)),
        ({"eos_token_id": 2}, (2, END)),
        ({"eos_token_id": [2, 1200]}, (2, 1200, END)),
        ({"eos_token_id": None}, (END,)),
        ({"eos_token_id": []}, (END,)),
        ({}, (END,)),
        (None, (2, END)),  # without the file, config.json counts
    ],
)
def test_end_tokens_include_the_templates_end_of_turn(
    checkpoint: Path, generation: dict[str, object] | None, expected: tuple[int, ...]
) -> None:
    path = checkpoint / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps(generation), encoding="utf-8")
    assert end_tokens(checkpoint) == expected


@pytest.mark.parametrize(("folder", "end"), [("FUSION-tiny-Phi", END), ("FUSION-X-tiny-LLaMA", 1004)])
def test_lists_with_the_end_of_turn_are_unchanged(folder: str, end: int) -> None:
    stored = json.loads((GOLDEN / folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert end in stored
    assert end_tokens(GOLDEN / folder) == tuple(stored)


def test_a_tokenizer_without_the_end_of_turn(checkpoint: Path, refused: Callable[..., str]) -> None:
    config = checkpoint / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("<|end|>", "<|over|>"), encoding="utf-8")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    assert end_tokens(checkpoint) == (7,)
    (checkpoint / "generation_config.json").write_text("{}", encoding="utf-8")
    message = refused(cli.main, checkpoint, "--dry-run")
    assert "has no <|end|>, which ends an answer, and no eos_token_id is given" in message


@pytest.mark.parametrize("value", [-1, 1208, 10**9, True, "1"])
def test_bos_outside_the_vocabulary(checkpoint: Path, refused: Callable[..., str], value: object) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"bos_token_id": value}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert f"config.json: bos_token_id is {value!r}; expected" in refused(cli.main, checkpoint, "--dry-run")


def test_an_answer_ends_at_the_end_of_turn(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(DEMO_CHECKPOINT, tmp_path / "demo")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 2}', encoding="utf-8")
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle")]) == 0
    with load(tmp_path / "bundle") as fusion:
        answer = fusion.answer(PICTURE, OTHER_QUESTION)
    assert (answer.text, answer.finish_reason) == (OTHER_ANSWER, "stop")


def test_the_sliding_window_limits_the_context(checkpoint: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"sliding_window": 100}), encoding="utf-8")
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle")]) == 0
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    assert (manifest["max_context"], manifest["model"]["max_length"]) == (100, 100)
    assert "choose 64 to 100" in refused(cli.main, checkpoint, "--dry-run", "--max-context", 101, code=2)
    path.write_text(json.dumps(config | {"sliding_window": 64, "query_len": "64"}), encoding="utf-8")
    assert "sliding_window of config.json) has no room" in refused(cli.main, checkpoint, "--dry-run", code=2)
