"""Rules: presets, the order of rules, the embedding table, and rules from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion_edge.export.planning.rules import EMBEDDING, Rule, assign, precision_rules, read_rules
from fusion_edge.quant.formats import CODEBOOKS, PER_CHANNEL, WeightFormat
from fusion_edge.runtime.bundle.manifest import PRECISIONS
from fusion_edge.runtime.errors import FusionError, UsageError

NAMES = [EMBEDDING, "llm.lm_head", "llm.layers.0.mlp.down", "alignment.layers.0.query", "vision.projector.up"]


def test_presets_quantize_everything() -> None:
    for precision in PRECISIONS:
        formats = assign(NAMES, [], precision_rules(precision, 64, "int8-weights"))
        assert set(formats) == set(NAMES)
        if precision.startswith("int"):
            assert all(fmt.is_quantized for fmt in formats.values())
    formats = assign(NAMES, [], precision_rules("int4", 64, "int8-weights"))
    assert [str(formats[name]) for name in NAMES] == ["int8:64", "int8:64", "int4:64", "int4:64", "int8:64"]


def test_the_first_rule_that_matches_wins() -> None:
    rules = [Rule.parse("llm.layers.*=int8:32", 128), Rule.parse("llm.*=fp16", 128)]
    formats = assign(NAMES, rules, precision_rules("int4", 128, "int8-weights"))
    assert [str(formats[name]) for name in NAMES[:3]] == ["fp16", "fp16", "int8:32"]


def test_4_bit_wildcard_skips_embedding_table() -> None:
    assert (
        str(assign(NAMES, [Rule.parse("*=int4", 64)], precision_rules("int4", 128, "int8-weights"))[EMBEDDING])
        == "int8:128"
    )
    with pytest.raises(UsageError, match="looked up by row"):
        assign(NAMES, [Rule.parse(f"{EMBEDDING}=int4", 64)], precision_rules("int4", 128, "int8-weights"))


def test_rules_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('[rules]\n"llm.lm_head" = "int8:32"\n"vision.*" = "fp16"\n')
    assert read_rules(path, 128) == [
        Rule("llm.lm_head", WeightFormat("int8", 32)), Rule("vision.*", WeightFormat("fp16"))
    ]  # fmt: skip
    path.write_text("[rules]\nllm.lm_head = 'int8'\n")  # TOML reads this as nested tables
    with pytest.raises(FusionError, match="quote names"):
        read_rules(path, 128)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_codebooks_have_no_scale_per_channel(kind: str) -> None:
    with pytest.raises(UsageError, match="cannot have one scale per channel"):
        Rule.parse(f"llm.*={kind}", PER_CHANNEL)
