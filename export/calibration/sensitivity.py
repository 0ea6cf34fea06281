"""Sensitivity of a linear to 4 bits: the error of the float model with only that linear quantized, on a few samples.

All linears of a block are measured together: the blocks after it load their weights once. Weights are rounded to
nearest, which ranks linears nearly like calibrated weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fusion_edge.export.bundle.durable_files import replace_text
from fusion_edge.export.calibration.activation_cache import Activations
from fusion_edge.export.calibration.blocks import Block, BlockOperations, PreparedSample, blocks, without_outputs
from fusion_edge.export.calibration.evaluation import compare_answers
from fusion_edge.export.calibration.float_model import FloatModel
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.gptq import round_to_nearest
from fusion_edge.runtime.bundle.quantization_report import Sensitivity, sqnr
from fusion_edge.runtime.samples import Sample
from fusion_edge.runtime.system.progress import Progress


def measure_sensitivity(
    plan: ExportPlan, names: Sequence[str], samples: Sequence[Sample], device: str, folder: Path
) -> list[Sensitivity]:
    """Return the sensitivity of each linear in its planned format. Resumes from the files in ``folder``."""
    return SensitivityMeasurement(plan, names, samples, device, folder).run()


class OneLinearRounded(BlockOperations):
    """The float model with one linear quantized. Accumulates the squared error and squared norm of its outputs."""

    def __init__(self, exact: BlockOperations, name: str, fmt: WeightFormat) -> None:
        super().__init__(exact.config, exact.get, exact.embed, exact.device)
        self._name = name
        self._rounded = round_to_nearest(exact.get(f"{name}.weight"), fmt).values
        self.squared_error, self.squared_norm = 0.0, 0.0

    def linear(self, x: Tensor, name: str, bias: bool = False) -> Tensor:
        y = super().linear(x, name, bias)
        if name != self._name:
            return y
        change = x @ (self._rounded - self.get(f"{name}.weight")).T
        self.squared_error += float(change.square().sum(dtype=torch.float64))
        self.squared_norm += float(y.square().sum(dtype=torch.float64))
        return y + change


class SensitivityMeasurement:
    """A measurement of sensitivity, block by block."""

    def __init__(
        self, plan: ExportPlan, names: Sequence[str], samples: Sequence[Sample], device: str, folder: Path
    ) -> None:
        self._model = FloatModel(plan, device)
        self._formats = plan.formats
        self._names = names
        self._prepared = list(self._model.prepare(samples))
        self._folder = folder
        self._sequence = blocks(plan.config)

    @torch.inference_mode()
    def run(self) -> list[Sensitivity]:
        """Measure all blocks that are not measured yet."""
        sizes = [self._model.elements(block) for block in self._sequence]
        passes = [len(self._linears_of(block)) for block in self._sequence]
        work = sum(sizes) + sum(size * (1 + sum(passes[: i + 1])) for i, size in enumerate(sizes))
        with Progress("Measuring sensitivity", work * len(self._prepared), "M weights") as progress:

            def advance(block: Block) -> None:
                progress.advance(self._model.elements(block))

            activations: list[Activations] = [{} for _ in self._prepared]
            for block in self._sequence:
                activations = self._run_block(block, [self._model.operations()], [activations], advance)[0]
            reference = [last["logits"] for last in activations]
            found, activations = [], [{} for _ in self._prepared]
            for i, block in enumerate(self._sequence):
                progress.label = f"Measuring sensitivity of {block.name} ({i + 1} of {len(self._sequence)})"
                found += self._load_or_measure(i, activations, reference, advance)
                activations = self._run_block(block, [self._model.operations()], [activations], advance)[0]
        return found

    def _linears_of(self, block: Block) -> list[str]:
        """Return the linears of a block to measure."""
        return [name for name in self._names if f"{name}.".startswith(block.prefixes)]

    def _load_or_measure(
        self, i: int, activations: list[Activations], reference: list[Tensor], advance: Callable[[Block], None]
    ) -> list[Sensitivity]:
        path = self._folder / f"sensitivity-{i}.json"
        names = self._linears_of(self._sequence[i])
        if path.exists():
            for block in self._sequence[i:]:
                for _ in range(len(names) * len(activations)):
                    advance(block)
            return [Sensitivity(**facts) for facts in json.loads(path.read_text(encoding="utf-8"))]
        measured = self._measure(i, names, activations, reference, advance) if names else []
        replace_text(path, json.dumps([asdict(sensitivity) for sensitivity in measured]))
        return measured

    def _measure(
        self,
        i: int,
        names: list[str],
        activations: list[Activations],
        reference: list[Tensor],
        advance: Callable[[Block], None],
    ) -> list[Sensitivity]:
        """Measure the linears of block ``i``: from the samples' activations before it to their logits."""
        exact = self._model.operations()
        rounded = [OneLinearRounded(exact, name, self._formats[name]) for name in names]
        changed = self._run_block(self._sequence[i], rounded, [activations] * len(names), advance)
        qualities = [sqnr(operations.squared_error, operations.squared_norm) for operations in rounded]
        del exact, rounded  # frees their weights before the next blocks load theirs
        for block in self._sequence[i + 1 :]:
            changed = self._run_block(block, [self._model.operations()] * len(names), changed, advance)
        found = []
        for quality, name, ends in zip(qualities, names, changed, strict=True):
            pairs = zip(self._prepared, ends, reference, strict=True)
            answers = [compare_answers(prepared, end["logits"], logits) for prepared, end, logits in pairs]
            divergence = sum(answer.divergence for answer in answers) / sum(answer.tokens for answer in answers)
            # Rounding can make the divergence of equal distributions slightly negative.
            found.append(Sensitivity(name, max(divergence, 0.0), quality))
        return found

    def _run_block(
        self,
        block: Block,
        operations: Sequence[BlockOperations],
        activations: Sequence[list[Activations]],
        advance: Callable[[Block], None],
    ) -> list[list[Activations]]:
        """Run each list of activations, one per sample, through a block with its own operations."""

        def run(ops: BlockOperations, prepared: PreparedSample, before: Activations) -> Activations:
            after = block.run(ops, prepared, before)
            advance(block)
            return after if "logits" in after else without_outputs(after)

        return [
            list(map(partial(run, ops), self._prepared, of_samples))
            for ops, of_samples in zip(operations, activations, strict=True)
        ]
