"""FUSION as a sequence of blocks: each maps a sample's activations before it to those after it.

Only one block's weights are in memory at a time. Every sample runs alone, so activations have no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.export.calibration.activation_cache import Activations
from fusion_edge.export.model import architecture
from fusion_edge.export.model.architecture import Alignment
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.quant.formats import InputQuantization
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, FusionConfig
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.images.grids import alignment_cells, resize_grid
from fusion_edge.runtime.images.preprocessing import cut_crops, normalize
from fusion_edge.runtime.prompts.prompt import encode_prompt
from fusion_edge.runtime.samples import Sample


class BlockOperations(EagerOperations):
    """Eager operations of one block. Its keys and values are those of one interaction layer."""

    def __init__(
        self,
        config: FusionConfig,
        get: Callable[[str], Tensor],
        embed: Callable[[Tensor], Tensor],
        device: str,
        activation_quantization: Callable[[str], InputQuantization | None] | None = None,
    ) -> None:
        """``embed`` maps token ids ``[T]`` to embeddings ``[T,D]``."""
        super().__init__(config, get, activation_quantization=activation_quantization)
        self.embed = embed
        self.device = device

    def layer(self, stacked: Tensor, index: int, layers: int) -> Tensor:
        return stacked


@dataclass(frozen=True)
class PreparedSample:
    """A tokenized sample, without its pixels."""

    sample: Sample
    instruct_ids: Tensor
    """``[T]``."""
    tokens: Tensor
    """``[L]``: token ids of prompt and answer; 0 in the rows of image tokens and latents."""
    answer_start: int
    """Row of the answer's first token; L without an answer."""
    query_length: int
    image_side: int
    image_start: int
    latent_positions: Tensor
    """``[1, q]``."""
    instruct_positions: Tensor
    """``[1]``."""


@dataclass(frozen=True)
class Block:
    """A part of the model that is quantized as a unit."""

    name: str
    prefixes: tuple[str, ...]
    """Prefixes of the names of its parameters."""
    run: Callable[[BlockOperations, PreparedSample, Activations], Activations]
    """Return the activations after the block, with the graph outputs it computes (:data:`OUTPUTS`)."""


OUTPUTS = {"features": "vision_encoder", "keys": "alignment_decoder", "values": "alignment_decoder", "logits": "llm"}
"""Graph outputs among the activations that blocks return, with their graph. No later block reads them."""


def without_outputs(activations: Activations) -> Activations:
    """Return the activations that the next block reads."""
    return {name: value for name, value in activations.items() if name not in OUTPUTS}


def prepare(
    sample: Sample, tokenizer: Tokenizer, config: FusionConfig, query_length: int, image_side: int, device: str
) -> PreparedSample:
    """Tokenize a sample's question, and its answer if it has one."""
    template = TEMPLATES[config.template]
    # As the released code tokenizes training data, whose questions may contain image markers.
    prompt = encode_prompt(tokenizer, template, [], sample.question, control_tokens=True)
    layout = prompt.layout(image_side**2, query_length)
    answer: list[int] = []
    if sample.answer is not None:
        # Tokenized after the start of the answer, as the model generates it.
        start, end = template.answer_start, template.answer_end
        before, whole = (
            tokenizer.encode(text, add_special_tokens=False).ids for text in (start, start + sample.answer + end)
        )
        answer = whole[len(before) :]
    tokens = np.zeros(layout.length + len(answer), np.int64)
    tokens[layout.text_positions] = layout.text_ids
    tokens[layout.length :] = answer
    return PreparedSample(
        sample=sample,
        instruct_ids=torch.from_numpy(prompt.instruct_ids).to(device),
        tokens=torch.from_numpy(tokens).to(device),
        answer_start=layout.length,
        query_length=query_length,
        image_side=image_side,
        image_start=layout.image_start,
        latent_positions=torch.from_numpy(layout.latent_positions).to(device),
        instruct_positions=torch.from_numpy(layout.instruct_positions).to(device),
    )


def blocks(config: FusionConfig) -> list[Block]:
    """Return all blocks in execution order. Each linear of the model belongs to exactly one."""
    sequence = [Block("vision.embeddings", ("vision.patch_embedding", "vision.text_projector"), _embed)]
    for i in range(config.vision.layers):
        name = f"vision.layers.{i}"
        sequence.append(Block(name, (f"{name}.",), partial(_vision_layer, i=i)))
    sequence.append(Block("vision.projector", ("vision.projector.",), _project))
    for i in range(config.language.layers):
        name, k = f"llm.layers.{i}", config.alignment.layer_after(i)
        interaction = () if k is None else (f"alignment.layers.{k}.",)
        sequence.append(Block(name, (f"{name}.", *interaction), partial(_decoder, i=i)))
    return [*sequence, Block("llm.lm_head", ("llm.lm_head",), _head)]


def _embed(ops: BlockOperations, prepared: PreparedSample, _: Activations) -> Activations:
    """Embed the patches of all crops, and append the question's rows to the local crop."""
    pixels = torch.from_numpy(normalize(cut_crops(prepared.sample.load()))).to(ops.device)
    patches = architecture.embed_patches(ops, ops.config, pixels)
    text = architecture.project_text(ops, ops.embed(prepared.instruct_ids)[None])
    return {"global": patches[:GLOBAL_CROPS], "local": torch.cat([patches[GLOBAL_CROPS:], text], 1)}


def _vision_layer(ops: BlockOperations, prepared: PreparedSample, before: Activations, i: int) -> Activations:
    after: Activations = {}
    for part in ("global", "local"):
        states = _vision_states(before, part)
        text = prepared.instruct_ids != 0 if part == "local" else prepared.instruct_ids[:0]
        mask = ops.key_mask(states[0][:, : ops.config.vision.patches], text.expand(len(states[0]), -1))
        for number, value in enumerate(architecture.vision_layer(ops, ops.config, states, mask, i)):
            after[f"{part}{number or ''}"] = value
    return after


def _vision_states(activations: Activations, part: str) -> list[Tensor]:
    """Return the states of :func:`architecture.vision_layer`, of the global crops or of the local one."""
    return [activations[key] for key in sorted(activations) if key.startswith(part)]


def _project(ops: BlockOperations, prepared: PreparedSample, before: Activations) -> Activations:
    """Return the LLM's input ``[1,L,D]`` and the interaction layers' windows ``[1,q,9,D]``."""
    config, patches = ops.config, ops.config.vision.patches
    features = []
    for part in ("global", "local"):
        rows = architecture.vision_features(ops, config, _vision_states(before, part))[:, :patches]
        features.append(architecture.project_vision(ops, rows))
    cells = alignment_cells(2 * config.vision.grid, prepared.query_length, config.alignment.window_size)
    latents, windows = architecture.pool_image(ops, config, features[0], *map(torch.from_numpy, cells))
    x = ops.embed(prepared.tokens)[None].clone()
    image = torch.from_numpy(resize_grid(features[1][0].cpu().numpy(), prepared.image_side))
    x[0, prepared.image_start : prepared.image_start + len(image)] = image
    x[0, prepared.latent_positions[0]] = latents[0]
    return {"x": x, "windows": windows, "features": torch.cat(features)}


def _decoder(ops: BlockOperations, prepared: PreparedSample, before: Activations, i: int) -> Activations:
    """Run a decoder layer, and the interaction layer after it with its keys and values."""
    config, x, windows = ops.config, before["x"], before["windows"]
    x = architecture.decoder_layer(ops, config, x, i)
    k = config.alignment.layer_after(i)
    if k is None:
        return {"x": x, "windows": windows}
    keys, values = architecture.context_keys_values(ops, k, windows)
    alignment = Alignment(prepared.latent_positions, prepared.instruct_positions, keys, values)
    x = architecture.interaction_layer(ops, config, x, k, alignment)
    return {"x": x, "windows": windows, "keys": keys, "values": values}


def _head(ops: BlockOperations, prepared: PreparedSample, before: Activations) -> Activations:
    """Return logits ``[n,V]``: of the rows that predict the answer, or of the last row."""
    rows = before["x"][0, prepared.answer_start - 1 :]
    return {"logits": architecture.logits(ops, ops.config, rows if len(rows) == 1 else rows[:-1])}
