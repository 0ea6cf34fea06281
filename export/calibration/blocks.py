"""FUSION as a sequence of blocks for calibration: each takes what the block before it left of a sample.

Only one block's weights need to be in memory at a time. What is left of a sample between two blocks is its *state*;
every sample runs by itself, so there is no padding in it.
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
from fusion_edge.export.calibration.samples import Sample
from fusion_edge.export.model import architecture
from fusion_edge.export.model.architecture import Alignment
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.quant.formats import ActivationQuantization
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, FusionConfig, side
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.images.grids import pooling_cells, resize_grid
from fusion_edge.runtime.images.preprocessing import cut_crops, normalize
from fusion_edge.runtime.prompts.prompt import encode_prompt


class BlockOperations(EagerOperations):
    """Eager operations of one block: it has the keys and values of its own interaction layer alone."""

    def __init__(
        self,
        config: FusionConfig,
        get: Callable[[str], Tensor],
        embed: Callable[[Tensor], Tensor],
        device: str,
        activation_quantization: Callable[[str], ActivationQuantization | None] | None = None,
    ) -> None:
        """``embed`` maps token ids ``[T]`` to embeddings ``[T,D]``."""
        super().__init__(config, get, activation_quantization=activation_quantization)
        self.embed = embed
        self.device = device

    def layer(self, stacked: Tensor, index: int, layers: int) -> Tensor:
        return stacked


@dataclass(frozen=True)
class Prepared:
    """A sample as the model's input, without its pixels."""

    sample: Sample
    instruct_ids: Tensor
    """``[T]``."""
    tokens: Tensor
    """``[L]``: ids of the prompt and the answer; 0 where image tokens and latents go."""
    answer_start: int
    """Row of the answer's first token; L if there is no answer."""
    query_length: int
    image_side: int
    image_start: int
    latent_positions: Tensor
    """``[1, q]``."""
    instruct_positions: Tensor
    """``[1]``."""


@dataclass(frozen=True)
class Block:
    """A step of the model that is quantized as one."""

    name: str
    prefixes: tuple[str, ...]
    """What the names of its parameters begin with."""
    run: Callable[[BlockOperations, Prepared, Activations], Activations]
    """From the state before it to the state behind it, and what it adds to a graph's outputs (:data:`OUTPUTS`)."""


OUTPUTS = {"features": "vision_encoder", "keys": "alignment_decoder", "values": "alignment_decoder", "logits": "llm"}
"""Names in what a block returns that are outputs of a graph; no block after it reads them."""


def kept(state: Activations) -> Activations:
    """What the next block needs of a state."""
    return {name: value for name, value in state.items() if name not in OUTPUTS}


def prepare(
    sample: Sample, tokenizer: Tokenizer, config: FusionConfig, query_length: int, image_side: int, device: str
) -> Prepared:
    """Prompt and, if it is known, answer of a sample."""
    template = TEMPLATES[config.template]
    # As the released code reads its training data, whose questions may hold image markers.
    prompt = encode_prompt(tokenizer, template, [], sample.question, control_tokens=True)
    layout = prompt.layout(image_side**2, query_length)
    answer: list[int] = []
    if sample.answer is not None:
        # Tokenized behind its start, as the model would have written it.
        start, end = template.answer_start, template.answer_end
        before, whole = (
            tokenizer.encode(text, add_special_tokens=False).ids for text in (start, start + sample.answer + end)
        )
        answer = whole[len(before) :]
    tokens = np.zeros(layout.length + len(answer), np.int64)
    tokens[layout.text_positions] = layout.text_ids
    tokens[layout.length :] = answer
    return Prepared(
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
    """Every block in the order in which they run; together they read every linear of the model once."""
    found = [Block("vision.embeddings", ("vision.patch_embedding", "vision.text_projector"), _embed)]
    for i in range(config.vision.layers):
        name = f"vision.layers.{i}"
        found.append(Block(name, (f"{name}.",), partial(_vision_layer, i=i)))
    found.append(Block("vision.projector", ("vision.projector.",), _project))
    for i in range(config.language.layers):
        name, k = f"llm.layers.{i}", config.alignment.layer_after(i)
        interaction = () if k is None else (f"alignment.layers.{k}.",)
        found.append(Block(name, (f"{name}.", *interaction), partial(_decoder, i=i)))
    return [*found, Block("llm.lm_head", ("llm.lm_head",), _head)]


def _embed(ops: BlockOperations, prepared: Prepared, _: Activations) -> Activations:
    """Patches of all crops; beside the local crop's, the question's rows."""
    pixels = torch.from_numpy(normalize(cut_crops(prepared.sample.load()))).to(ops.device)
    patches = architecture.embed_patches(ops, ops.config, pixels)
    text = architecture.project_text(ops, ops.embed(prepared.instruct_ids)[None])
    return {"global": patches[:GLOBAL_CROPS], "local": torch.cat([patches[GLOBAL_CROPS:], text], 1)}


def _vision_layer(ops: BlockOperations, prepared: Prepared, state: Activations, i: int) -> Activations:
    after: Activations = {}
    for part in ("global", "local"):
        states = [state[key] for key in sorted(state) if key.startswith(part)]
        text = prepared.instruct_ids != 0 if part == "local" else prepared.instruct_ids[:0]
        mask = ops.key_mask(states[0][:, : ops.config.vision.patches], text.expand(len(states[0]), -1))
        for number, value in enumerate(architecture.vision_layer(ops, ops.config, states, mask, i)):
            after[f"{part}{number or ''}"] = value
    return after


def _project(ops: BlockOperations, prepared: Prepared, state: Activations) -> Activations:
    """The LLM's input ``[1,L,D]`` and the interaction layers' windows ``[1,q,9,D]``."""
    config, patches = ops.config, ops.config.vision.patches
    features = []
    for part in ("global", "local"):
        states = [state[key] for key in sorted(state) if key.startswith(part)]
        rows = architecture.vision_features(ops, config, states)[:, :patches]
        features.append(architecture.project_vision(ops, rows))
    size, cells = 2 * config.vision.grid, side(prepared.query_length)
    tables = (torch.from_numpy(pooling_cells(size, n)) for n in (cells, cells * config.alignment.window_size))
    latents, windows = architecture.pool_image(ops, config, features[0], *tables)
    x = ops.embed(prepared.tokens)[None].clone()
    image = torch.from_numpy(resize_grid(features[1][0].cpu().numpy(), prepared.image_side))
    x[0, prepared.image_start : prepared.image_start + len(image)] = image
    x[0, prepared.latent_positions[0]] = latents[0]
    return {"x": x, "windows": windows, "features": torch.cat(features)}


def _decoder(ops: BlockOperations, prepared: Prepared, state: Activations, i: int) -> Activations:
    """A decoder layer, and the interaction layer behind it with its keys and values."""
    config, x, windows = ops.config, state["x"], state["windows"]
    x = architecture.decoder_layer(ops, config, x, i)
    k = config.alignment.layer_after(i)
    if k is None:
        return {"x": x, "windows": windows}
    keys, values = architecture.context_keys_values(ops, k, windows)
    alignment = Alignment(prepared.latent_positions, prepared.instruct_positions, keys, values)
    x = architecture.interaction_layer(ops, config, x, k, alignment)
    return {"x": x, "windows": windows, "keys": keys, "values": values}


def _head(ops: BlockOperations, prepared: Prepared, state: Activations) -> Activations:
    """Logits ``[n,V]`` of the rows that write the answer, or of the last row."""
    rows = state["x"][0, prepared.answer_start - 1 :]
    return {"logits": architecture.logits(ops, ops.config, rows if len(rows) == 1 else rows[:-1])}
