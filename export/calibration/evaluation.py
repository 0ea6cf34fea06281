"""Comparison of the quantized model with the float model, on held-out samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_edge.export.bundle.durable_files import replace_text
from fusion_edge.export.calibration.activation_cache import Activations
from fusion_edge.export.calibration.blocks import OUTPUTS, PreparedSample
from fusion_edge.runtime.bundle.quantization_report import EndToEnd


@dataclass(frozen=True)
class AnswerComparison:
    """Comparison on one answer: the sample's, or the float model's first token if the sample has none."""

    tokens: int
    same_token: int
    """Number of tokens for which both models have the same top-1 token."""
    divergence: float
    """Sum over the tokens of KL(float || quantized), nats."""
    loss: float
    """Sum of the quantized model's -log p of the answer's tokens, nats."""
    float_loss: float
    right: bool | None
    """Whether the quantized model generates exactly this answer; None for a sample without an answer."""
    float_right: bool | None


class Evaluation:
    """Collects comparisons, block by block."""

    def __init__(self, held_out: Sequence[PreparedSample]) -> None:
        self._held_out = held_out
        self._cosines: dict[str, list[float]] = {}
        self._answers: list[AnswerComparison] = []
        self._latest: tuple[dict[str, list[float]], list[AnswerComparison]] = {}, []

    def add(self, number: int, outputs: Activations, reference: Activations) -> None:
        """Compare the graph outputs of a block for held-out sample ``number``."""
        cosines, answers = self._latest
        for name, graph in OUTPUTS.items():
            if name in outputs:
                cosines.setdefault(graph, []).append(_cosine(outputs[name], reference[name]))
        if "logits" in outputs:
            answers.append(compare_answers(self._held_out[number], outputs["logits"], reference["logits"]))

    def save(self, path: Path) -> None:
        """Save the comparisons added since the last call."""
        cosines, answers = self._latest
        replace_text(path, json.dumps({"cosines": cosines, "answers": [vars(answer) for answer in answers]}))
        self._latest = {}, []

    def load(self, path: Path) -> None:
        """Load saved comparisons."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        for graph, values in saved["cosines"].items():
            self._cosines.setdefault(graph, []).extend(values)
        self._answers += [AnswerComparison(**answer) for answer in saved["answers"]]

    def result(self) -> EndToEnd:
        """Return the result over all loaded comparisons."""
        tokens = sum(answer.tokens for answer in self._answers)
        known = [answer for answer in self._answers if answer.right is not None]

        def mean(values: Sequence[float]) -> float:
            return sum(values) / tokens

        return EndToEnd(
            samples=len(self._answers),
            tokens=tokens,
            cosine={graph: float(np.mean(values)) for graph, values in self._cosines.items()},
            top1_agreement=mean([answer.same_token for answer in self._answers]),
            kl_divergence=mean([answer.divergence for answer in self._answers]),
            perplexity=float(np.exp(mean([answer.loss for answer in self._answers]))),
            float_perplexity=float(np.exp(mean([answer.float_loss for answer in self._answers]))),
            answers=len(known),
            accuracy=sum(bool(answer.right) for answer in known) / len(known) if known else None,
            float_accuracy=sum(bool(answer.float_right) for answer in known) / len(known) if known else None,
        )


def compare_answers(prepared: PreparedSample, logits: Tensor, reference: Tensor) -> AnswerComparison:
    """Compare logits ``[n,V]`` of the quantized and the float model at the rows that predict the answer.

    Exact answers are counted without generating: a model generates an answer if each of its tokens is top-1, given
    those before it.
    """
    log_p, float_log_p = (F.log_softmax(x.double(), dim=-1) for x in (logits, reference))
    best, float_best = logits.argmax(-1), reference.argmax(-1)
    answer = prepared.tokens[prepared.answer_start :]
    is_known = len(answer) > 0
    tokens = answer if is_known else float_best
    rows = torch.arange(len(tokens), device=tokens.device)
    return AnswerComparison(
        tokens=len(tokens),
        same_token=int((best == float_best).sum()),
        divergence=float((float_log_p.exp() * (float_log_p - log_p)).sum()),
        loss=-float(log_p[rows, tokens].sum()),
        float_loss=-float(float_log_p[rows, tokens].sum()),
        right=bool((best == tokens).all()) if is_known else None,
        float_right=bool((float_best == tokens).all()) if is_known else None,
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))
