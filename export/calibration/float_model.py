"""Float model of a plan: the checkpoint's weights, block by block, and tokenized samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.export.calibration.blocks import Block, BlockOperations, PreparedSample, prepare
from fusion_edge.export.checkpoint.weights import CheckpointWeights, read_parameter
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.export.planning.rules import EMBEDDING
from fusion_edge.quant.packing import check_range
from fusion_edge.runtime.bundle.manifest import TOKENIZER
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.samples import Sample


class FloatModel:
    """The model of a planned bundle without quantization, on ``device``."""

    def __init__(self, plan: ExportPlan, device: str) -> None:
        self.plan = plan
        self.device = device
        self.weights = CheckpointWeights(plan.checkpoint, plan.parameters)
        self._embedding = lru_cache(maxsize=None)(lambda token: torch.from_numpy(self.embedding_row(token)[0]))

    def prepare(self, samples: Sequence[Sample]) -> Iterator[PreparedSample]:
        """Tokenize samples, with the bundle's query lengths in turn. Raises :class:`FusionError` for one too long."""
        plan = self.plan
        tokenizer = Tokenizer.from_str(plan.small_files[TOKENIZER].decode())
        lengths, context = plan.options.query_lengths, plan.options.max_context
        for i, sample in enumerate(samples):
            length = lengths[i % len(lengths)]
            prepared = prepare(sample, tokenizer, plan.config, length, plan.options.image_side, self.device)
            if len(prepared.tokens) > context:
                raise FusionError(
                    f"The sample {sample.question[:40]!r} about {sample.image} has {len(prepared.tokens)} tokens, "
                    f"the context has {context}. Shorten it, or raise --max-context."
                )
            yield prepared

    def parameter(self, name: str) -> Tensor:
        """Return a parameter, float32. Raises :class:`FusionError` for values outside the range of its format."""
        values, linear = read_parameter(self.weights, name), self.plan.linear_by_weight.get(name)
        if linear is not None and not linear.prequantized:
            check_range(name, values, linear.format)
        return torch.from_numpy(np.array(values)).to(self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings ``[T,D]`` of ids ``[T]``."""
        return torch.stack([self._embedding(int(i)) for i in ids]).to(self.device)

    def operations(self) -> BlockOperations:
        """Return operations for one block. They keep the weights that they read in memory."""
        return BlockOperations(self.plan.config, lru_cache(maxsize=None)(self.parameter), self.embed, self.device)

    def elements(self, block: Block) -> int:
        """Return the number of elements of a block's parameters."""
        return sum(p.size for p in self.plan.parameters.values() if p.name.startswith(block.prefixes))

    def embedding_row(self, token: int) -> npt.NDArray[np.float32]:
        """Return the token's row of the checkpoint's token table, ``[1,D]``."""
        return np.array(self.weights.rows(self.plan.linears[EMBEDDING].weight.name, token, token + 1))
