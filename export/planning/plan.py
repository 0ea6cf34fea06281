"""Deciding everything about a bundle before a byte of it is written: formats, graphs, sizes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tokenizers import Tokenizer

from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.language_config import MINIMUM_CONTEXT
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.prequantized.layout import StoredLayout
from fusion_edge.export.checkpoint.prequantized_weights import check_scales, stored_layout
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.export.lowering.graph_builder import GraphBuilder, PlannedTensor
from fusion_edge.export.lowering.graphs import build_graphs
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.lowering.onnx_operations import Settings
from fusion_edge.export.lowering.onnxruntime import OPSET
from fusion_edge.export.planning.targets import ACTIVATIONS, with_preset
from fusion_edge.export.planning.tensorrt_formats import check_formats, in_blocks
from fusion_edge.quant.formats import PER_CHANNEL, WeightFormat
from fusion_edge.quant.policy import EMBEDDING, Rule, assign, preset
from fusion_edge.runtime.bundle import manifest as bundle
from fusion_edge.runtime.bundle.config import MINIMUM_QUESTION, FusionConfig, side
from fusion_edge.runtime.bundle.files import FileEntry
from fusion_edge.runtime.bundle.graphs import GraphSpec
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.errors import FusionError, UsageError

KV_CACHES = ("float", "int8")


@dataclass(frozen=True)
class ExportOptions:
    """What the user asks for; each field is an option of ``fusion-export`` and explained there."""

    precision: str = ""
    """Empty: INT4, or a preset's."""
    group_size: int | None = None
    """None: each kind's default."""
    rules: tuple[Rule, ...] = ()
    query_lengths: tuple[int, ...] = ()
    image_tokens: int | None = None
    max_context: int | None = None
    target: str = "cpu"
    preset: str | None = None
    """One of ``export.targets.PRESETS``: what is left open here is as it says."""
    accuracy_level: int | None = None
    """None: 4, but for TensorRT, which computes in float16."""
    kv_cache: str = "float"
    vision: str | None = None
    """One of ``quant.policy.VISION``; None: integers throughout where samples calibrate them, else weights alone."""
    is_calibrated: bool = False
    asymmetric: bool = False


@dataclass(frozen=True)
class DataFile:
    """A file of weights: every tensor's place in it."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    size: int


@dataclass(frozen=True)
class ExportPlan:
    """A bundle, complete but for the values of its weights."""

    checkpoint: Checkpoint
    config: FusionConfig
    options: ExportOptions
    parameters: Mapping[str, Parameter]
    """Every array of the model by name, weights and float parameters alike."""
    linears: Mapping[str, Linear]
    """Every linear and the token table by name, in the order of ``parameters``."""
    settings: Settings
    small_files: Mapping[str, bytes]
    """Content of every file but the manifest and the weights."""
    data_files: tuple[DataFile, ...]
    specs: tuple[GraphSpec, ...] = field(repr=False)

    @cached_property
    def linear_by_weight(self) -> dict[str, Linear]:
        """The linears by the names of their weights in ``parameters``."""
        return {linear.weight.name: linear for linear in self.linears.values()}

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """Format of every linear."""
        return {name: linear.format for name, linear in self.linears.items()}

    @property
    def quantized_formats(self) -> dict[str, WeightFormat]:
        """Formats of the linears that the export quantizes."""
        return {name: linear.format for name, linear in self.linears.items() if linear.is_quantized_here}

    @property
    def source_bytes(self) -> int:
        """Bytes of the checkpoint that will be read."""
        return self.checkpoint.total_bytes

    def manifest(self, files: tuple[FileEntry, ...]) -> bundle.Manifest:
        """The manifest for the files written."""
        settings = self.settings
        return bundle.Manifest(
            schema_version=bundle.SCHEMA_VERSION,
            producer=bundle.producer(),
            source=os.fsencode(self.checkpoint.folder.resolve().name).decode("utf-8", "replace"),
            target=self.options.target,
            precision=self.options.precision,
            max_context=settings.max_context,
            query_lengths=self.options.query_lengths,
            image_side=side(self.options.image_tokens or self.config.vision.patches),
            activations=settings.activations,
            cache=settings.cache,
            accuracy_level=settings.accuracy_level,
            model=self.config,
            embedding=_embedding_table(self.data_files[-1].tensors),
            graphs={spec.name: spec.to_json() for spec in self.specs},
            weights={name: str(form) for name, form in self.formats.items()},
            files=files,
        )

    @property
    def bundle_bytes(self) -> int:
        """Bytes of the finished bundle, the manifest included."""
        sizes = {name: len(content) for name, content in self.small_files.items()}
        sizes |= {file.name: file.size for file in self.data_files}
        quantized = {name: str(form) for name, form in self.quantized_formats.items()}
        taken_over = {name: str(linear.format) for name, linear in self.linears.items() if linear.prequantized}
        if quantized or taken_over:
            sizes[bundle.QUANTIZATION] = len(QuantizationReport.planned(quantized, taken_over).to_bytes())
        entries = tuple(FileEntry(name, size, "0" * 64) for name, size in sizes.items())
        return sum(sizes.values()) + len(self.manifest(entries).to_text())


def plan_export(checkpoint: Checkpoint, options: ExportOptions) -> ExportPlan:
    """Validate checkpoint and options together and lay the bundle out. Reads no weights.

    Raises :class:`FusionError` for a checkpoint that is not FUSION's, :class:`UsageError` for an option that does
    not fit it.
    """
    config = read_config(checkpoint)
    parameters = match_parameters(checkpoint, config)
    options = _checked(with_preset(options, config), config)
    vision = options.vision or _default_vision(options)
    defaults = preset(options.precision, options.group_size, vision, options.asymmetric, options.target)
    activations = ACTIVATIONS[options.target]
    weights = {p.linear: p for p in parameters.values() if p.kind != "float"}
    prequantized = _prequantized(checkpoint, weights, options.rules)
    for name in prequantized:
        check_scales(weights[name], checkpoint, activations)
    if options.target == "tensorrt":
        prequantized = {name: in_blocks(layout, weights[name].shape[1]) for name, layout in prequantized.items()}
    formats = assign(weights, options.rules, defaults) | {name: s.format for name, s in prequantized.items()}
    linears = {name: Linear(weights[name], form, prequantized.get(name)) for name, form in formats.items()}
    _check_formats(linears, options)
    if options.target == "tensorrt":
        check_formats(linears)
    tokenizer = _tokenizer(checkpoint, config)
    config = _with_end_tokens(checkpoint, config, tokenizer)
    settings = Settings(
        target=options.target,
        activations=activations,
        accuracy_level=_accuracy_level(options),
        cache=activations if options.kv_cache == "float" else "int8",
        max_context=options.max_context or config.max_length,
    )
    builders = build_graphs(config, parameters, linears, settings)
    small_files = {bundle.TOKENIZER: tokenizer.encode()}
    data_files = []
    for builder in builders:
        name = builder.spec.name
        model = builder.model(bundle.data_file(name), bundle.producer())
        small_files[bundle.graph_file(name)] = model.SerializeToString(deterministic=True)
        data_files.append(DataFile(bundle.data_file(name), tuple(builder.planned.values()), builder.data_bytes))
    data_files.append(embedding_file(linears[EMBEDDING]))
    return ExportPlan(
        checkpoint=checkpoint,
        config=config,
        options=options,
        parameters=parameters,
        linears=linears,
        settings=settings,
        small_files=small_files,
        data_files=tuple(data_files),
        specs=tuple(builder.spec for builder in builders),
    )


def _accuracy_level(options: ExportOptions) -> int:
    if options.accuracy_level is None:
        return 0 if options.target == "tensorrt" else 4
    return options.accuracy_level


def _default_vision(options: ExportOptions) -> str:
    """Integers throughout where samples give the range of inputs and there are products of integers, else weights."""
    return "int8" if options.is_calibrated and options.target != "cuda" else "int8-weights"


def _prequantized(
    checkpoint: Checkpoint, weights: Mapping[str, Parameter], overrides: Sequence[Rule]
) -> dict[str, StoredLayout]:
    """Return the stored layouts of prequantized linears. A rule that matches a linear quantizes it anew.

    Raises as :func:`stored_layout`.
    """
    return {
        name: stored_layout(weight, checkpoint)
        for name, weight in weights.items()
        if weight.is_prequantized and not any(rule.matches(name) for rule in overrides)
    }


def _tokenizer(checkpoint: Checkpoint, config: FusionConfig) -> str:
    """``tokenizer.json``. Raises :class:`FusionError` if it has an id that the token table has no row for."""
    content = tokenizer_json(checkpoint.folder)
    vocabulary: dict[str, int] = Tokenizer.from_str(content).get_vocab()
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= config.language.vocab_size:
        raise FusionError(
            f"The tokenizer of {checkpoint.folder} gives {token!r} the id {largest}, but vocab_size is "
            f"{config.language.vocab_size}; take tokenizer and weights from the same checkpoint."
        )
    return content


def _with_end_tokens(checkpoint: Checkpoint, config: FusionConfig, tokenizer: str) -> FusionConfig:
    """``config`` with the token behind its end tokens that ends an answer in the template, unless it is among them.

    Raises :class:`FusionError` if there is no end token at all.
    """
    name = TEMPLATES[config.template].answer_end
    end: int | None = Tokenizer.from_str(tokenizer).token_to_id(name)
    if end is None and not config.eos_token_ids:
        raise FusionError(
            f"The tokenizer of {checkpoint.folder} has no {name}, which ends an answer, and no eos_token_id is given; "
            "add one to generation_config.json, or take the tokenizer of the FUSION checkpoint."
        )
    if end is None or end in config.eos_token_ids:
        return config
    return dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, end))


def _checked(options: ExportOptions, config: FusionConfig) -> ExportOptions:
    """``options`` with defaults filled in from the model, or :class:`UsageError`."""
    offered = config.alignment.query_lengths
    for length in options.query_lengths:
        if length not in offered:
            raise UsageError(f"Query length {length} is not offered by this checkpoint; choose from {_list(offered)}.")
    patches = config.vision.patches
    squares = [n * n for n in range(1, config.vision.grid + 1)]
    if options.image_tokens is not None and options.image_tokens not in squares:
        raise UsageError(
            f"{options.image_tokens} image tokens do not form a square grid of at most {patches}; "
            f"choose one of {_list(squares)}."
        )
    context = options.max_context
    if context is not None and not MINIMUM_CONTEXT <= context <= config.max_length:
        raise UsageError(
            f"A context of {context} positions is out of range; this checkpoint was trained with {config.max_length}: "
            f"choose {MINIMUM_CONTEXT} to {config.max_length}."
        )
    lengths = tuple(dict.fromkeys(options.query_lengths)) or _default_lengths(offered)
    taken = (options.image_tokens or patches) + lengths[0] + MINIMUM_QUESTION
    if (positions := context or config.max_length) < taken:
        limit = "" if context else " (tokenizer_model_max_length or sliding_window of config.json)"
        raise UsageError(
            f"A context of {positions} positions{limit} has no room for a question beside image tokens and latents; "
            f"choose {taken} or more, or fewer --image-tokens."
        )
    if options.asymmetric and options.precision != "int4":
        raise UsageError(f"--asym is for --int4, not --{options.precision}: leave it out.")
    if options.target == "tensorrt" and options.accuracy_level is not None:
        raise UsageError("--accuracy-level is for ONNX Runtime's products; TensorRT computes in float16: leave it out.")
    if options.target == "tensorrt" and options.precision == "int8" and options.group_size not in (None, PER_CHANNEL):
        raise UsageError("TensorRT's 8-bit weights have one scale a channel: leave --group-size out.")
    if options.vision is not None and options.precision in ("fp32", "fp16"):
        raise UsageError(
            f"--vision is for --int4, --nf4 and --int8; --{options.precision} is for vision too: leave it out."
        )
    if options.kv_cache == "int8" and options.target != "cpu":
        raise UsageError(f"--kv-cache int8 is for --target cpu; {options.target} has no kernel for it: leave it out.")
    return dataclasses.replace(options, query_lengths=lengths, image_tokens=options.image_tokens or patches)


def _check_formats(linears: Mapping[str, Linear], options: ExportOptions) -> None:
    """Raise :class:`UsageError` for a format that the weight's shape, the samples or the target do not allow."""
    for name, linear in linears.items():
        form = linear.format
        if form.has_codebook and linear.inputs % form.group_size:
            raise UsageError(
                f"{name} cannot be {form}: its {linear.inputs} inputs are not whole blocks of {form.group_size}; use a "
                f"smaller --group-size, or another format (--rule '{name}=int4')."
            )
    rounding = [name for name, linear in linears.items() if linear.format.quantizes_activations]
    if rounding and not options.is_calibrated:
        raise UsageError(
            f"{rounding[0]} is to be w8a8, and the range of its inputs is not known: add --calibrate DATA, or use "
            "int8 (--vision int8-weights)."
        )
    if rounding and options.target == "cuda":
        raise UsageError(
            f"w8a8 ({rounding[0]}) is for --target cpu and tensorrt; use int8 (--vision int8-weights) or fp16."
        )


def _default_lengths(offered: tuple[int, ...]) -> tuple[int, ...]:
    """All offered lengths, the largest of at most 144 first: most detail, still a small share of the prompt."""
    default = max((length for length in offered if length <= 144), default=offered[0])
    return default, *(length for length in offered if length != default)


def _list(numbers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, numbers))


def embedding_file(table: Linear) -> DataFile:
    """Lay out the token table in the embedding file: values, then scales."""
    builder = GraphBuilder(GraphSpec("embeddings", (), ()), OPSET)
    form = table.format
    shape = form.packed_shape(table.outputs, table.inputs)
    dtype = {"int8": "uint8", "fp16": "float16", "fp32": "float32"}[form.kind]
    builder.plan(table.weight.name, "values", form, dtype, shape)
    if form.is_quantized:
        builder.plan(table.weight.name, "scales", form, form.scale_dtype, shape[:2])
    return DataFile(bundle.EMBEDDINGS, tuple(builder.planned.values()), builder.data_bytes)


def _embedding_table(tensors: tuple[PlannedTensor, ...]) -> bundle.EmbeddingTable:
    form = tensors[0].format
    return bundle.EmbeddingTable(form.kind, form.block_size, tensors[0].offset, tensors[-1].offset)
