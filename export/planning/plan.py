"""Plan of a bundle: formats, graphs and sizes, decided before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.hub import checkpoint_name
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.lowering.base import Settings
from fusion_edge.export.lowering.graph_builder import GraphBuilder, PlannedTensor
from fusion_edge.export.lowering.graphs import build_graphs
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.lowering.onnxruntime import OPSET
from fusion_edge.export.planning.formats import plan_linears
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.resolved_options import ResolvedOptions, resolve_options
from fusion_edge.export.planning.rules import EMBEDDING
from fusion_edge.export.planning.tokenizer import read_tokenizer, with_end_tokens
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.bundle import manifest as bundle
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.bundle.files import FileEntry
from fusion_edge.runtime.bundle.graphs import GraphSpec
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport


@dataclass(frozen=True)
class DataFile:
    """A file of weights, with the place of every tensor."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    size: int


@dataclass(frozen=True)
class ExportPlan:
    """A bundle, complete except for the values of its weights."""

    checkpoint: Checkpoint
    config: FusionConfig
    options: ResolvedOptions
    parameters: Mapping[str, Parameter]
    """Every array of the model by name, weights and float parameters alike."""
    linears: Mapping[str, Linear]
    """Every linear and the token table by name, in the order of ``parameters``."""
    small_files: Mapping[str, bytes]
    """Content of every file except the manifest and the weights, by name."""
    data_files: tuple[DataFile, ...]
    specs: tuple[GraphSpec, ...] = field(repr=False)

    @cached_property
    def linear_by_weight(self) -> dict[str, Linear]:
        """Linears by the name of their weight in ``parameters``."""
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
        """Size of the checkpoint."""
        return self.checkpoint.total_bytes

    def manifest(self, files: tuple[FileEntry, ...]) -> bundle.Manifest:
        """Return the manifest that lists ``files``."""
        options = self.options
        return bundle.Manifest(
            schema_version=bundle.SCHEMA_VERSION,
            producer=bundle.producer(),
            source=checkpoint_name(self.checkpoint.folder),
            target=options.target.name,
            precision=options.precision,
            max_context=options.max_context,
            query_lengths=options.query_lengths,
            image_side=options.image_side,
            activations=options.activations,
            cache=options.cache,
            accuracy_level=options.accuracy_level,
            model=self.config,
            embedding=_embedding_table(self.data_files[-1].tensors),
            graphs={spec.name: spec.to_json() for spec in self.specs},
            weights={name: str(fmt) for name, fmt in self.formats.items()},
            files=files,
        )

    @property
    def bundle_bytes(self) -> int:
        """Size of the finished bundle, the manifest included."""
        sizes = {name: len(content) for name, content in self.small_files.items()}
        sizes |= {file.name: file.size for file in self.data_files}
        quantized = {name: str(fmt) for name, fmt in self.quantized_formats.items()}
        prequantized = {name: str(linear.format) for name, linear in self.linears.items() if linear.prequantized}
        if quantized or prequantized:
            sizes[bundle.QUANTIZATION] = len(QuantizationReport.planned(quantized, prequantized).to_bytes())
        entries = tuple(FileEntry(name, size, "0" * 64) for name, size in sizes.items())
        return sum(sizes.values()) + len(self.manifest(entries).to_text())


def plan_export(checkpoint: Checkpoint, options: ExportOptions) -> ExportPlan:
    """Validate checkpoint and options together, and lay out the bundle. Reads no weights.

    Raises :class:`FusionError` for an invalid checkpoint, and :class:`UsageError` for an option that does not suit the
    checkpoint or the target.
    """
    config = read_config(checkpoint)
    parameters = match_parameters(checkpoint, config)
    resolved = resolve_options(options, config)
    linears = plan_linears(checkpoint, parameters, resolved)
    tokenizer = read_tokenizer(checkpoint, config)
    config = with_end_tokens(checkpoint, config, tokenizer)
    settings = Settings(
        target=resolved.target.name,
        activations=resolved.activations,
        accuracy_level=resolved.accuracy_level,
        cache=resolved.cache,
        max_context=resolved.max_context,
    )
    builders = build_graphs(resolved.target.lowering, config, parameters, linears, settings)
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
        options=resolved,
        parameters=parameters,
        linears=linears,
        small_files=small_files,
        data_files=tuple(data_files),
        specs=tuple(builder.spec for builder in builders),
    )


def embedding_file(table: Linear) -> DataFile:
    """Lay out the token table in the embedding file: values, then scales."""
    builder = GraphBuilder(GraphSpec("embeddings", (), ()), OPSET)
    fmt = table.format
    shape = fmt.packed_shape(table.outputs, table.inputs)
    dtype = {"int8": "uint8", "fp16": "float16", "fp32": "float32"}[fmt.kind]
    builder.plan(table.weight.name, "values", fmt, dtype, shape)
    if fmt.is_quantized:
        builder.plan(table.weight.name, "scales", fmt, fmt.scale_dtype, shape[:2])
    return DataFile(bundle.EMBEDDINGS, tuple(builder.planned.values()), builder.data_bytes)


def _embedding_table(tensors: tuple[PlannedTensor, ...]) -> bundle.EmbeddingTable:
    fmt = tensors[0].format
    return bundle.EmbeddingTable(fmt.kind, fmt.block_size, tensors[0].offset, tensors[-1].offset)
