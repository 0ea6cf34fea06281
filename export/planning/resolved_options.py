"""Options of an export with every default filled in: from the target, the preset and the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fusion_edge.export.checkpoint.language_config import MINIMUM_CONTEXT
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.presets import DETAILS, PRESETS, Preset
from fusion_edge.export.planning.targets import TARGETS
from fusion_edge.export.planning.targets.target import Target
from fusion_edge.quant.formats import PER_CHANNEL
from fusion_edge.runtime.bundle.config import MINIMUM_QUESTION, FusionConfig, side
from fusion_edge.runtime.errors import UsageError

DEFAULT_QUERY_LENGTH = 144
"""Upper limit of the default query length: enough detail for a small share of the prompt."""


@dataclass(frozen=True)
class ResolvedOptions:
    """Options of a planned bundle."""

    requested: ExportOptions
    target: Target
    precision: str
    vision: str
    """Precision of the vision encoder, one of ``export.planning.rules.VISION``; only for quantized precisions."""
    query_lengths: tuple[int, ...]
    """Offered query lengths, the default first."""
    image_tokens: int
    max_context: int
    """Tokens that the KV cache holds."""
    cache: str
    """numpy dtype name of the KV cache."""
    accuracy_level: int
    """MatMulNBits' attribute: 0 computes in the activations' dtype, 4 quantizes activations to int8 blocks."""
    memory: int | None
    """Bytes that the preset's device has for a bundle; None without a preset."""
    bandwidth: float | None
    """Bytes per second of the preset's device; None if it is unknown."""

    @property
    def activations(self) -> str:
        """numpy dtype name of the values that flow in and between graphs."""
        return self.target.activations

    @property
    def image_side(self) -> int:
        """Side of the grid of image tokens."""
        return side(self.image_tokens)


def resolve_options(options: ExportOptions, config: FusionConfig) -> ResolvedOptions:
    """Fill in every default. Raises :class:`UsageError` for an option that does not suit the model or the target."""
    options = _with_detail(options, config)
    preset = PRESETS.get(options.target)
    target = TARGETS[options.target] if preset is None else preset.target
    _check_combinations(options, target)
    patches = config.vision.patches
    _check_query_lengths(options.query_lengths, config.alignment.query_lengths)
    _check_image_tokens(options.image_tokens, config)
    lengths = tuple(dict.fromkeys(options.query_lengths)) or _default_lengths(config.alignment.query_lengths)
    context = options.max_context or _preset_context(preset, config)
    image_tokens = options.image_tokens or _preset_image_tokens(preset, patches)
    _check_context(context, config, image_tokens + lengths[0] + MINIMUM_QUESTION)
    return ResolvedOptions(
        requested=options,
        target=target,
        precision=options.precision,
        vision=options.vision or _default_vision(options, target),
        query_lengths=lengths,
        image_tokens=image_tokens,
        max_context=context or config.max_length,
        cache=target.activations if options.kv_cache == "float" else options.kv_cache,
        accuracy_level=target.accuracy_levels[0] if options.accuracy_level is None else options.accuracy_level,
        memory=None if preset is None else preset.memory,
        bandwidth=None if preset is None else preset.bandwidth,
    )


def _with_detail(options: ExportOptions, config: FusionConfig) -> ExportOptions:
    """Replace the level of detail by its image tokens and query length."""
    if options.detail is None:
        return options
    if options.image_tokens is not None or options.query_lengths:
        raise UsageError(
            f"--detail {options.detail} sets image tokens and query length; leave out --image-tokens and --query-len."
        )
    detail = DETAILS[options.detail]
    tokens = config.vision.patches if detail.image_tokens is None else detail.image_tokens
    return replace(options, image_tokens=tokens, query_lengths=(detail.latents,))


# Defaults ---------------------------------------------------------------------------------------------------


def _default_vision(options: ExportOptions, target: Target) -> str:
    if options.is_calibrated:
        return "int8" if target.quantizes_activations else "int8-weights"
    return target.default_vision


def _default_lengths(offered: tuple[int, ...]) -> tuple[int, ...]:
    """Return all offered lengths, the largest up to :data:`DEFAULT_QUERY_LENGTH` first."""
    default = max((length for length in offered if length <= DEFAULT_QUERY_LENGTH), default=offered[0])
    return default, *(length for length in offered if length != default)


def _preset_context(preset: Preset | None, config: FusionConfig) -> int | None:
    if preset is None:
        return None
    return min(preset.max_context or config.max_length, config.max_length)


def _preset_image_tokens(preset: Preset | None, patches: int) -> int:
    if preset is None or preset.image_tokens is None or preset.image_tokens > patches:
        return patches
    return preset.image_tokens


# Checks -----------------------------------------------------------------------------------------------------


def _check_query_lengths(lengths: tuple[int, ...], offered: tuple[int, ...]) -> None:
    for length in lengths:
        if length not in offered:
            raise UsageError(f"Query length {length} is not offered by this checkpoint; choose from {_list(offered)}.")


def _check_image_tokens(tokens: int | None, config: FusionConfig) -> None:
    squares = [n * n for n in range(1, config.vision.grid + 1)]
    if tokens is not None and tokens not in squares:
        raise UsageError(
            f"{tokens} image tokens do not form a square grid of at most {config.vision.patches}; "
            f"choose one of {_list(squares)}."
        )


def _check_context(context: int | None, config: FusionConfig, needed: int) -> None:
    """Check the limit of the user or the preset, None without one, against the tokens that a short prompt needs."""
    if context is not None and not MINIMUM_CONTEXT <= context <= config.max_length:
        raise UsageError(
            f"A context of {context} tokens is out of range; this checkpoint was trained with {config.max_length}: "
            f"choose {MINIMUM_CONTEXT} to {config.max_length}."
        )
    if (tokens := context or config.max_length) < needed:
        source = "" if context else " (tokenizer_model_max_length or sliding_window of config.json)"
        raise UsageError(
            f"A context of {tokens} tokens{source} has no room for a question beside image tokens and latents; "
            f"choose {needed} or more, or fewer --image-tokens."
        )


def _check_combinations(options: ExportOptions, target: Target) -> None:
    """Raise :class:`UsageError` for options that exclude each other or that the target does not support."""
    if options.asymmetric and options.precision != "int4":
        raise UsageError(f"--asym is for --int4, not --{options.precision}: leave it out.")
    if options.accuracy_level is not None and len(target.accuracy_levels) == 1:
        raise UsageError(f"--accuracy-level is for ONNX Runtime; --target {target.name} has none: leave it out.")
    if target.int8_per_channel and options.precision == "int8" and options.group_size not in (None, PER_CHANNEL):
        raise UsageError(
            f"8-bit weights for --target {target.name} have one scale per channel: leave --group-size out."
        )
    if options.vision is not None and options.precision in ("fp32", "fp16"):
        raise UsageError(
            f"--vision is for --int4, --nf4 and --int8; --{options.precision} is for vision too: leave it out."
        )
    if options.kv_cache not in target.kv_caches:
        supported = " or ".join(name for name, other in TARGETS.items() if options.kv_cache in other.kv_caches)
        raise UsageError(
            f"--kv-cache {options.kv_cache} is for --target {supported}; {target.name} has no kernel for it: "
            "leave it out."
        )


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
