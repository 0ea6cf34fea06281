"""Calibration: block by block, observe the inputs of every linear and quantize its weights for them.

The activations before a block come from the quantized blocks before it. The last samples are held out: the float model
and the quantized one run on them, and the report compares the two (``evaluation.py``). Every finished block is saved in
a folder, so a killed run resumes there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fusion_edge.export.calibration.activation_cache import (
    ActivationReader,
    Activations,
    delete_activations,
    is_complete,
    write_activations,
)
from fusion_edge.export.calibration.blocks import Block, BlockOperations, blocks, without_outputs
from fusion_edge.export.calibration.evaluation import Evaluation
from fusion_edge.export.calibration.float_model import FloatModel
from fusion_edge.export.calibration.layer_quantizer import LayerQuantizer
from fusion_edge.export.calibration.observer import Observer
from fusion_edge.export.calibration.samples import Samples
from fusion_edge.export.calibration.weight_store import CalibratedWeights, WeightStore
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.export.planning.rules import EMBEDDING
from fusion_edge.quant.formats import InputQuantization
from fusion_edge.quant.packing import dequantize, quantize
from fusion_edge.quant.smoothquant import find_producer, float_parameters
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.progress import Progress


def calibrate(plan: ExportPlan, samples: Samples, method: str, device: str, folder: Path) -> CalibratedWeights:
    """Quantize every linear of a planned bundle for the samples. Resumes from the files in ``folder``.

    Raises :class:`FusionError` for activations that are not finite, naming the linear.
    """
    return CalibrationRun(plan, samples, method, device, folder).run()


class CalibrationRun:
    """A calibration, block by block."""

    def __init__(self, plan: ExportPlan, samples: Samples, method: str, device: str, folder: Path) -> None:
        self.config = plan.config
        self._plan = plan
        self._method = method
        self._device = device
        self._folder = folder
        self._float = FloatModel(plan, device)
        self._store = WeightStore(folder, plan.formats)
        self._calibrating = list(self._float.prepare(samples.calibrating))
        self._held_out = list(self._float.prepare(samples.held_out))
        self._sequence = blocks(plan.config)
        self._evaluation = Evaluation(self._held_out)
        self._embedding = lru_cache(maxsize=None)(self._embedding_row)

    @torch.inference_mode()
    def run(self) -> CalibratedWeights:
        """Run all unfinished blocks. Returns the calibrated weights, with their report."""
        sequence = self._sequence
        if any(self._lacks_files(block) for block in sequence):
            raise FusionError(f"{self._folder} has lost files of an earlier run; delete it and start again.")
        start = max(i for i in range(len(sequence) + 1) if i == 0 or is_complete(self.cache_path(i)))
        sizes = [self._float.elements(block) for block in sequence]
        passes = 2 * (len(self._calibrating) + len(self._held_out))
        with Progress("Calibrating", sum(sizes[start:]) * passes, "M weights") as progress:
            for i, block in enumerate(sequence):
                if i < start:
                    continue
                progress.label = f"Calibrating {block.name} ({i + 1} of {len(sequence)})"
                self.run_block(i, partial(progress.advance, sizes[i]))
                delete_activations(self.cache_path(i))
        linears = tuple(linear for block in sequence for linear in self._store.finished(block.name) or ())
        for i in range(len(sequence)):
            self._evaluation.load(self._evaluation_path(i))
        report = QuantizationReport(linears, len(self._calibrating), self._evaluation.result())
        return CalibratedWeights(self._float.weights, self._store, report)

    # One block ---------------------------------------------------------------------------------------------------

    def tokens(self, number: int) -> int:
        """Return the number of rows of the LLM's input for a calibration sample."""
        return len(self._calibrating[number].tokens)

    def run_block(self, i: int, advance: Callable[[], None]) -> None:
        """Quantize block ``i`` and run all samples through it. Calls ``advance`` after each sample."""
        block, is_last = self._sequence[i], i + 1 == len(self._sequence)
        before = ActivationReader(self.cache_path(i)) if i else None
        weights = lru_cache(maxsize=None)(self._float.parameter)
        if self._store.finished(block.name) is None:
            self._quantize(block, before, weights, advance)
        self._propagate(i, block, before, weights, is_last, advance)

    def _quantize(
        self,
        block: Block,
        before: ActivationReader | None,
        weights: Callable[[str], Tensor],
        advance: Callable[[], None],
    ) -> None:
        formats = self._plan.quantized_formats
        observer = Observer(self.config, weights, self._embed, self._device, formats)
        for number, prepared in enumerate(self._calibrating):
            block.run(observer, prepared, self._activations(before, number))
            advance()
        symmetric = self._plan.options.target.symmetric_activations
        quantizer = LayerQuantizer(formats, self._method, weights, self._store, symmetric)
        self._store.finish(block.name, quantizer.quantize(observer))

    def _propagate(
        self,
        i: int,
        block: Block,
        before: ActivationReader | None,
        weights: Callable[[str], Tensor],
        is_last: bool,
        advance: Callable[[], None],
    ) -> None:
        """Run the quantized block on all samples and the float block on the held-out ones, and compare the two."""
        config, first = self.config, len(self._calibrating)
        quantized_weights = lru_cache(maxsize=None)(self._quantized_parameter)
        activation_quantization = lru_cache(maxsize=None)(self._activation_quantization)
        quantized = BlockOperations(config, quantized_weights, self._embed, self._device, activation_quantization)
        exact = BlockOperations(config, weights, self._float.embed, self._device)
        with write_activations(self.cache_path(i + 1)) as cache:
            for number, prepared in enumerate(self._calibrating):
                if not is_last:
                    cache.append(without_outputs(block.run(quantized, prepared, self._activations(before, number))))
                advance()
            for number, prepared in enumerate(self._held_out):
                pair = [self._activations(before, first + 2 * number + path) for path in (0, 1)]
                after, reference = block.run(quantized, prepared, pair[0]), block.run(exact, prepared, pair[1])
                self._evaluation.add(number, after, reference)
                for activations in (after, reference):
                    cache.append(without_outputs(activations))
                    advance()
            self._evaluation.save(self._evaluation_path(i))

    # Files, weights ----------------------------------------------------------------------------------------------

    def _lacks_files(self, block: Block) -> bool:
        """Return whether a finished block lacks the weights of a linear or a smoothed parameter."""
        formats = self._plan.quantized_formats
        linears = [linear.name for linear in self._store.finished(block.name) or ()]
        producers = [found for name in linears if (found := find_producer(name, formats)) is not None]
        smoothed = [name for found in producers for name in float_parameters(found, formats)]
        return any(name not in self._store for name in linears) or any(
            self._store.parameter(name) is None for name in smoothed
        )

    def cache_path(self, i: int) -> Path:
        """Return the path of the activations before block ``i``."""
        return self._folder / f"activations-{i}"

    def _evaluation_path(self, i: int) -> Path:
        return self._folder / f"evaluation-{i}.json"

    def _activations(self, before: ActivationReader | None, number: int) -> Activations:
        if before is None:
            return {}
        return {name: value.to(self._device) for name, value in before[number].items()}

    def _activation_quantization(self, name: str) -> InputQuantization | None:
        if not self._plan.linears[name].format.quantizes_activations:
            return None
        return self._store.activation_quantization(name)

    def _quantized_parameter(self, name: str) -> Tensor:
        smoothed = self._store.parameter(name)
        if smoothed is not None:
            return torch.from_numpy(smoothed).to(self._device)
        linear = self._plan.linear_by_weight.get(name)
        if linear is None or linear.name not in self._store:
            exact = self._float.parameter(name)
            is_half = linear is not None and linear.format.kind == "fp16"
            return exact.half().float() if is_half else exact
        values = self._store.dequantized(linear.name, linear.inputs)
        return torch.from_numpy(values).to(self._device)

    def _embed(self, ids: Tensor) -> Tensor:
        """Return embeddings ``[T,D]`` as the bundle stores them."""
        if not self._plan.linears[EMBEDDING].format.is_quantized:
            return self._float.embed(ids)
        return torch.stack([self._embedding(int(i)) for i in ids]).to(self._device)

    def _embedding_row(self, token: int) -> Tensor:
        fmt = self._plan.linears[EMBEDDING].format
        row = self._float.embedding_row(token)
        return torch.from_numpy(dequantize(quantize(row, fmt), fmt, row.shape[1])[0])
