"""The three graphs of a bundle: each runs an architecture function over its inputs."""

from __future__ import annotations

from collections.abc import Mapping

from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.lowering.base import OnnxOperations, OnnxValue, Settings
from fusion_edge.export.lowering.graph_builder import GraphBuilder
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.model import architecture
from fusion_edge.export.model.architecture import Alignment
from fusion_edge.runtime.bundle import graphs
from fusion_edge.runtime.bundle.config import FusionConfig


def build_graphs(
    lowering: type[OnnxOperations],
    config: FusionConfig,
    parameters: Mapping[str, Parameter],
    linears: Mapping[str, Linear],
    settings: Settings,
) -> list[GraphBuilder]:
    """Build vision encoder, alignment decoder and LLM with ``lowering``. Their weights are planned, not read."""
    specs = graphs.graph_specs(config, settings.target, settings.activations, settings.cache)
    builders = [GraphBuilder(spec, lowering.opset) for spec in specs]
    vision, alignment, llm = (lowering(config, builder, parameters, linears, settings) for builder in builders)
    _vision_encoder(vision, config)
    _alignment_decoder(alignment, config)
    _llm(llm, config)
    for builder in builders:
        for rewrite in lowering.passes:
            rewrite(builder)
    return builders


def _inputs(ops: OnnxOperations, *names: str) -> list[OnnxValue]:
    return [ops.input(name) for name in names]


def _vision_encoder(ops: OnnxOperations, config: FusionConfig) -> None:
    pixels, text, mask = _inputs(ops, "pixel_values", "text_embeds", "text_mask")
    ops.output(architecture.vision_encoder(ops, config, pixels, text, mask), "features")


def _alignment_decoder(ops: OnnxOperations, config: FusionConfig) -> None:
    features, latent_cells, context_cells = _inputs(ops, "features", "latent_cells", "context_cells")
    outputs = architecture.alignment_decoder(ops, config, features, latent_cells, context_cells)
    for value, name in zip(outputs, ("latents", "keys", "values"), strict=True):
        ops.output(value, name)


def _llm(ops: OnnxOperations, config: FusionConfig) -> None:
    (embeddings,) = _inputs(ops, "embeddings")
    alignment = Alignment(*_inputs(ops, "latent_positions", "question_positions", "keys", "values"))
    ops.output(architecture.llm(ops, config, embeddings, alignment), "logits")
