"""What 4 bits cost a linear: the whole float model runs on a few samples with that linear alone rounded.

Blocks are walked through once for each block whose linears are tried, and hold their weights once for all of these.
Rounding is to nearest: for a ranking that is near enough to what calibration will make of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fusion_edge.export.calibration.activation_cache import Activations, replace_text
from fusion_edge.export.calibration.blocks import Block, BlockOperations, Prepared, blocks, kept
from fusion_edge.export.calibration.evaluation import compare_answers
from fusion_edge.export.calibration.float_model import FloatModel
from fusion_edge.export.calibration.samples import Sample
from fusion_edge.export.planning.plan import ExportPlan
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.gptq import round_to_nearest
from fusion_edge.runtime.bundle.quantization_report import Sensitivity, sqnr
from fusion_edge.runtime.system.progress import Progress


def measure_sensitivity(
    plan: ExportPlan, names: Sequence[str], samples: Sequence[Sample], device: str, folder: Path
) -> list[Sensitivity]:
    """The sensitivity of each linear, at its planned format, going on with what ``folder`` already holds."""
    return Measurement(plan, names, samples, device, folder).run()


class OneLinearRounded(BlockOperations):
    """The float model but for one linear; notes the squares of its outputs and of what rounding changes in them."""

    def __init__(self, exact: BlockOperations, name: str, form: WeightFormat) -> None:
        super().__init__(exact.config, exact.get, exact.embed, exact.device)
        self._name = name
        self._rounded = round_to_nearest(exact.get(f"{name}.weight"), form).values
        self.noise, self.signal = 0.0, 0.0

    def linear(self, x: Tensor, name: str, bias: bool = False) -> Tensor:
        y = super().linear(x, name, bias)
        if name != self._name:
            return y
        change = x @ (self._rounded - self.get(f"{name}.weight")).T
        self.noise += float(change.square().sum(dtype=torch.float64))
        self.signal += float(y.square().sum(dtype=torch.float64))
        return y + change


class Measurement:
    """A measurement, block by block."""

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
        sizes = [self._model.elements(block) for block in self._sequence]
        passes = [len(self._of(block)) for block in self._sequence]
        work = sum(sizes) + sum(size * (1 + sum(passes[: i + 1])) for i, size in enumerate(sizes))
        with Progress("Measuring sensitivity", work * len(self._prepared), "M weights") as progress:

            def advance(block: Block) -> None:
                progress.advance(self._model.elements(block))

            states: list[Activations] = [{} for _ in self._prepared]
            for block in self._sequence:
                states = self._through(block, [self._model.operations()], [states], advance)[0]
            reference = [state["logits"] for state in states]
            found, states = [], [{} for _ in self._prepared]
            for i, block in enumerate(self._sequence):
                progress.label = f"Measuring sensitivity of {block.name} ({i + 1} of {len(self._sequence)})"
                found += self._kept_or_measured(i, states, reference, advance)
                states = self._through(block, [self._model.operations()], [states], advance)[0]
        return found

    def _of(self, block: Block) -> list[str]:
        """The linears to be measured in a block."""
        return [name for name in self._names if f"{name}.".startswith(block.prefixes)]

    def _kept_or_measured(
        self, i: int, states: list[Activations], reference: list[Tensor], advance: Callable[[Block], None]
    ) -> list[Sensitivity]:
        path = self._folder / f"sensitivity-{i}.json"
        names = self._of(self._sequence[i])
        if path.exists():
            for block in self._sequence[i:]:
                for _ in range(len(names) * len(states)):
                    advance(block)
            return [Sensitivity(**facts) for facts in json.loads(path.read_text(encoding="utf-8"))]
        measured = self._measure(i, names, states, reference, advance) if names else []
        replace_text(path, json.dumps([asdict(sensitivity) for sensitivity in measured]))
        return measured

    def _measure(
        self,
        i: int,
        names: list[str],
        states: list[Activations],
        reference: list[Tensor],
        advance: Callable[[Block], None],
    ) -> list[Sensitivity]:
        """Of the linears of block ``i``, from the samples' states before it to their logits."""
        exact = self._model.operations()
        rounded = [OneLinearRounded(exact, name, self._formats[name]) for name in names]
        changed = self._through(self._sequence[i], rounded, [states] * len(names), advance)
        qualities = [sqnr(operations.noise, operations.signal) for operations in rounded]
        del exact, rounded  # their weights make room for those of the blocks that follow
        for block in self._sequence[i + 1 :]:
            changed = self._through(block, [self._model.operations()] * len(names), changed, advance)
        found = []
        for quality, name, ends in zip(qualities, names, changed, strict=True):
            pairs = zip(self._prepared, ends, reference, strict=True)
            answers = [compare_answers(prepared, end["logits"], logits) for prepared, end, logits in pairs]
            divergence = sum(answer.divergence for answer in answers) / sum(answer.tokens for answer in answers)
            # Of two equal distributions float arithmetic may leave less than nothing.
            found.append(Sensitivity(name, max(divergence, 0.0), quality))
        return found

    def _through(
        self,
        block: Block,
        operations: Sequence[BlockOperations],
        states: Sequence[list[Activations]],
        advance: Callable[[Block], None],
    ) -> list[list[Activations]]:
        """Each list of states, one a sample, through a block by operations of its own."""

        def run(ops: BlockOperations, prepared: Prepared, state: Activations) -> Activations:
            after = block.run(ops, prepared, state)
            advance(block)
            return after if "logits" in after else kept(after)

        return [
            list(map(partial(run, ops), self._prepared, before)) for ops, before in zip(operations, states, strict=True)
        ]
