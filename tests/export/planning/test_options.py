"""Options of ``fusion-export``: declared at the field, parsed, and resolved for target, preset and model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.checkpoints import TINY

from fusion_edge.export.calibration.options import CalibrationOptions
from fusion_edge.export.cli import parser
from fusion_edge.export.planning.arguments import flag_of, given
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.presets import PRESETS
from fusion_edge.export.planning.resolved_options import resolve_options
from fusion_edge.export.planning.targets import TARGETS
from fusion_edge.quant.formats import PER_CHANNEL
from fusion_edge.runtime.bundle import manifest
from fusion_edge.runtime.errors import UsageError

VALUES: dict[str, tuple[str, Any]] = {
    "group_size": ("channel", PER_CHANNEL),
    "vision": ("fp16", "fp16"),
    "query_lengths": ("16,4", (16, 4)),
    "image_tokens": ("9", 9),
    "detail": ("fast", "fast"),
    "max_context": ("300", 300),
    "target": ("rtx", "rtx"),
    "accuracy_level": ("0", 0),
    "kv_cache": ("int8", "int8"),
    "samples": ("8", 8),
    "held_out": ("2", 2),
    "method": ("rtn", "rtn"),
    "device": ("cuda", "cuda"),
    "largest_drop": ("1.5", 1.5),
    "budget": ("2GB", 2_000_000_000),
    "bits": ("4.5", 4.5),
    "sensitivity_samples": ("3", 3),
}
"""Text and value of the options that have one, by field."""
NOT_ON_THE_COMMAND_LINE = {"rules", "is_calibrated", "is_small", "data"}


def test_nothing_is_given_by_default() -> None:
    arguments = parser().parse_args(["checkpoint"])
    assert given(arguments, ExportOptions) == given(arguments, CalibrationOptions) == {}


@pytest.mark.parametrize("options", [ExportOptions, CalibrationOptions])
def test_every_field_is_an_option(options: type) -> None:
    names = {field.name for field in dataclasses.fields(options)} - NOT_ON_THE_COMMAND_LINE
    for name in names - {"precision", "asymmetric"}:
        text, value = VALUES[name]
        assert given(parser().parse_args(["checkpoint", flag_of(options, name), text]), options) == {name: value}


@pytest.mark.parametrize(
    ("flag", "values"),
    [("--nf4", {"precision": "nf4"}), ("--int4", {"precision": "int4"}), ("--asym", {"asymmetric": True})],
)
def test_flags_with_constant_values(flag: str, values: dict[str, Any]) -> None:
    assert given(parser().parse_args(["checkpoint", flag]), ExportOptions) == values


@pytest.mark.parametrize("flags", [["--int4", "--nf4"], ["--budget", "1GB", "--bits", "5"]])
def test_mutually_exclusive_options(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["checkpoint", *flags])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_cache_in_fp8_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["checkpoint", "--target=tensorrt", "--kv-cache=fp8"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "--kv-cache: no runtime here has a cache in fp8; int8, for cpu and tensorrt, has codes of the" in message
    assert "use --kv-cache int8" in message


def test_the_runtime_accepts_every_target() -> None:
    assert set(TARGETS) == set(manifest.TARGETS)


@pytest.mark.parametrize(("patch", "patches"), [(14, 729), (16, 576)])
@pytest.mark.parametrize(
    ("detail", "tokens", "latents"), [("full", None, 144), ("balanced", 256, 64), ("fast", 144, 16)]
)
def test_levels_of_detail(detail: str, tokens: int | None, latents: int, patch: int, patches: int) -> None:
    vision = dataclasses.replace(TINY.vision, patch_size=patch)
    alignment = dataclasses.replace(TINY.alignment, query_lengths=(4, 16, 36, 64, 144))
    config = dataclasses.replace(TINY, vision=vision, alignment=alignment, max_length=4096)
    for target in ("cpu", "rtx"):
        resolved = resolve_options(ExportOptions(target=target, precision="int8", detail=detail), config)
        assert (resolved.image_tokens, resolved.query_lengths) == (tokens or patches, (latents,))


@pytest.mark.parametrize("others", [{"image_tokens": 9}, {"query_lengths": (16,)}])
def test_a_level_of_detail_excludes_the_exact_options(others: dict[str, Any]) -> None:
    with pytest.raises(
        UsageError, match=r"^--detail fast sets image tokens and query length; leave out --image-tokens"
    ):
        resolve_options(ExportOptions(detail="fast", **others), TINY)


def test_a_level_of_detail_that_the_checkpoint_lacks() -> None:
    with pytest.raises(UsageError, match=r"^Query length 144 is not offered by this checkpoint; choose from"):
        resolve_options(ExportOptions(detail="full"), TINY)


@pytest.mark.parametrize("target", [*TARGETS, *PRESETS])
def test_every_target_resolves(target: str) -> None:
    """A preset limits what the user leaves open, and 8-bit weights need no group size."""
    resolved = resolve_options(ExportOptions(target=target, precision="int8"), TINY)
    preset = PRESETS.get(target)
    assert resolved.target is (TARGETS[target] if preset is None else preset.target)
    assert resolved.max_context == TINY.max_length
    assert resolved.image_tokens == TINY.vision.patches == resolved.image_side**2
    assert resolved.memory == (None if preset is None else preset.memory)
    assert resolved.cache == resolved.activations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(kv_cache="int8", target="cuda"), "--kv-cache int8"),
        (ExportOptions(accuracy_level=0, target="rtx"), "--accuracy-level is for ONNX Runtime"),
        (ExportOptions(precision="int8", group_size=32, target="tensorrt"), "leave --group-size out"),
        (ExportOptions(precision="nf4", asymmetric=True), "--asym is for --int4"),
        (ExportOptions(query_lengths=(7,)), "Query length 7 is not offered"),
        (ExportOptions(image_tokens=8), "8 image tokens do not form a square grid"),
        (ExportOptions(max_context=10), "A context of 10 tokens is out of range"),
    ],
)
def test_options_that_do_not_fit(options: ExportOptions, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve_options(options, TINY)
    assert message in str(refused.value)
