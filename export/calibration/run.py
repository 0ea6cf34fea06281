"""Calibration: block by block, every linear's inputs are observed and its weights quantized for them.

A block's linears see what the blocks before them, already quantized, make of the samples. The last samples are held
out: no weight is fitted to them, the float model runs on them beside the quantized one, and the report tells how far
apart both ended (``evaluation.py``). Every finished block is kept in a folder, so a run that was killed goes on where
it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fusion_edge.export.calibration import activation_cache as states
from fusion_edge.export.calibration.activation_cache import ActivationReader, Activations
from fusion_edge.export.calibration.blocks import Block, BlockOperations, blocks, kept
from fusion_edge.export.calibration.evaluation import Evaluation
from fusion_edge.export.calibration.float_model import FloatModel
from fusion_edge.export.calibration.layer_quantizer import LayerQuantizer
from fusion_edge.export.calibration.observer import Observer
from fusion_edge.export.calibration.samples import Samples
from fusion_edge.export.calibration.weight_store import WeightStore
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.quant.formats import ActivationQuantization
from fusion_edge.quant.packing import dequantize, quantize
from fusion_edge.quant.policy import EMBEDDING
from fusion_edge.quant.smoothquant import float_parameters, producer
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.progress import Progress


@dataclass(frozen=True)
class Calibrated:
    """The outcome of a calibration."""

    records: WeightStore
    report: QuantizationReport


def calibrate(plan: ExportPlan, samples: Samples, method: str, device: str, folder: Path) -> Calibrated:
    """Quantize every linear of a planned bundle for the samples, going on with what ``folder`` already holds.

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
        self._records = WeightStore(folder, plan.formats)
        self._calibrating = list(self._float.prepare(samples.calibrating))
        self._held_out = list(self._float.prepare(samples.held_out))
        self._sequence = blocks(plan.config)
        self._evaluation = Evaluation(self._held_out)
        self._embedding = lru_cache(maxsize=None)(self._embedding_row)

    @torch.inference_mode()
    def run(self) -> Calibrated:
        sequence = self._sequence
        if any(self._is_torn(block) for block in sequence):
            raise FusionError(f"{self._folder} has lost files of an earlier run; delete it and start again.")
        start = max(i for i in range(len(sequence) + 1) if i == 0 or states.are_complete(self.states(i)))
        sizes = [self._float.elements(block) for block in sequence]
        passes = 2 * (len(self._calibrating) + len(self._held_out))
        with Progress("Calibrating", sum(sizes[start:]) * passes, "M weights") as progress:
            for i, block in enumerate(sequence):
                if i < start:
                    continue
                progress.label = f"Calibrating {block.name} ({i + 1} of {len(sequence)})"
                self.run_block(i, partial(progress.advance, sizes[i]))
                states.remove(self.states(i))
        linears = tuple(linear for block in sequence for linear in self._records.finished(block.name) or ())
        for i in range(len(sequence)):
            self._evaluation.load(self._outputs(i))
        report = QuantizationReport(linears, len(self._calibrating), self._evaluation.result())
        return Calibrated(self._records, report)

    # One block ---------------------------------------------------------------------------------------------------

    def tokens(self, number: int) -> int:
        """Rows of the LLM's input for a calibrating sample."""
        return len(self._calibrating[number].tokens)

    def run_block(self, i: int, advance: Callable[[], None]) -> None:
        """Quantize block ``i`` and run all samples through it; ``advance`` is called for each."""
        block, is_last = self._sequence[i], i + 1 == len(self._sequence)
        before = ActivationReader(self.states(i)) if i else None
        weights = lru_cache(maxsize=None)(self._float.parameter)
        if self._records.finished(block.name) is None:
            self._quantize(block, before, weights, advance)
        self._propagate(i, block, before, weights, is_last, advance)

    def _quantize(
        self,
        block: Block,
        before: ActivationReader | None,
        weights: Callable[[str], Tensor],
        advance: Callable[[], None],
    ) -> None:
        observing = Observer(self.config, weights, self._embed, self._device, self._plan.quantized_formats)
        for number, prepared in enumerate(self._calibrating):
            block.run(observing, prepared, self._state(before, number))
            advance()
        symmetric = self._plan.options.target.symmetric_activations
        fitting = LayerQuantizer(self._plan.quantized_formats, self._method, weights, self._records, symmetric)
        self._records.finish(block.name, fitting.quantize(observing))

    def _propagate(
        self,
        i: int,
        block: Block,
        before: ActivationReader | None,
        weights: Callable[[str], Tensor],
        is_last: bool,
        advance: Callable[[], None],
    ) -> None:
        """Run the quantized block on all samples, the float block on those held out, and note how they differ."""
        config, first = self.config, len(self._calibrating)
        quantized_weights = lru_cache(maxsize=None)(self._quantized_parameter)
        grid = lru_cache(maxsize=None)(self._activation_quantization)
        quantized = BlockOperations(config, quantized_weights, self._embed, self._device, grid)
        exact = BlockOperations(config, weights, self._float.embed, self._device)
        with states.writing(self.states(i + 1)) as after:
            for number, prepared in enumerate(self._calibrating):
                if not is_last:
                    after.append(kept(block.run(quantized, prepared, self._state(before, number))))
                advance()
            for number, prepared in enumerate(self._held_out):
                pair = [self._state(before, first + 2 * number + path) for path in (0, 1)]
                state, reference = block.run(quantized, prepared, pair[0]), block.run(exact, prepared, pair[1])
                self._evaluation.add(number, state, reference)
                for after_it in (state, reference):
                    after.append(kept(after_it))
                    advance()
            self._evaluation.save(self._outputs(i))

    # Files, weights ----------------------------------------------------------------------------------------------

    def _is_torn(self, block: Block) -> bool:
        """Whether a finished block misses the weights of a linear, or a parameter that was divided for it."""
        formats = self._plan.quantized_formats
        linears = [linear.name for linear in self._records.finished(block.name) or ()]
        sources = [source for name in linears if (source := producer(name, formats)) is not None]
        divided = [name for source in sources for name in float_parameters(source, formats)]
        return any(name not in self._records for name in linears) or any(
            self._records.parameter(name) is None for name in divided
        )

    def states(self, i: int) -> Path:
        """The file of what block ``i`` is given."""
        return self._folder / f"states-{i}"

    def _outputs(self, i: int) -> Path:
        return self._folder / f"outputs-{i}.json"

    def _state(self, before: ActivationReader | None, number: int) -> Activations:
        if before is None:
            return {}
        return {name: value.to(self._device) for name, value in before[number].items()}

    def _activation_quantization(self, name: str) -> ActivationQuantization | None:
        return (
            self._records.activation_quantization(name)
            if self._plan.linears[name].format.quantizes_activations
            else None
        )

    def _quantized_parameter(self, name: str) -> Tensor:
        folded = self._records.parameter(name)
        if folded is not None:
            return torch.from_numpy(folded).to(self._device)
        linear = self._plan.linear_by_weight.get(name)
        if linear is None or linear.name not in self._records:
            exact = self._float.parameter(name)
            is_half = linear is not None and linear.format.kind == "fp16"
            return exact.half().float() if is_half else exact
        values = self._records.dequantized(linear.name, linear.inputs)
        return torch.from_numpy(values).to(self._device)

    def _embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``[T,D]`` as the bundle has them."""
        if not self._plan.linears[EMBEDDING].format.is_quantized:
            return self._float.embed(ids)
        return torch.stack([self._embedding(int(i)) for i in ids]).to(self._device)

    def _embedding_row(self, token: int) -> Tensor:
        form = self._plan.linears[EMBEDDING].format
        row = self._float.weights.rows(f"{EMBEDDING}.weight", token, token + 1)
        return torch.from_numpy(dequantize(quantize(row, form), form, row.shape[1])[0])
