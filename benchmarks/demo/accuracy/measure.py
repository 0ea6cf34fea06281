"""Ask a model all questions, and keep what it says."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.demo.accuracy.held_out import Picture, read_pictures
from fusion_edge.benchmarks.demo.accuracy.tables import CHECKPOINT_WITHOUT_ALIGNMENT, FLOAT, GUIDES, Measurement
from fusion_edge.benchmarks.demo.accuracy.work import Work
from fusion_edge.benchmarks.demo.reliability import SAMPLING, candidates
from fusion_edge.benchmarks.evaluation.teacher_forcing import Floats, decode_greedily
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.logprobs import divergences
from fusion_edge.runtime.system.output_file import write_whole


@dataclass(frozen=True)
class Measured:
    """What a model said, in the order of the questions."""

    answers: tuple[str, ...]
    divergences: tuple[float, ...]
    """KL(fp32 || model) of the first token, nats; 0 for fp32, none for conversations."""
    choices: tuple[str, ...]
    """The likeliest choice of each of the first questions."""
    probabilities: tuple[float, ...]
    """Of these choices."""
    size: int
    """Bytes of the bundle; 0 for a checkpoint."""
    seconds: float
    """Processor time."""


def read_measured(work: Work, measurement: Measurement) -> Measured:
    """Return a finished measurement."""
    return from_json(Measured, read_json(work.measurement(measurement)))


def measure(measurement: Measurement, work: Work) -> None:
    """Ask all questions and write the measurement. The bundle exists, and fp32 is measured first."""
    pictures = read_pictures(work.pictures)
    started = time.process_time()
    with _tier(measurement.tier), _open(measurement, work) as fusion:
        if measurement.is_conversation:
            measured = _converse(fusion, measurement, work, conversation_pictures(pictures))
        else:
            measured = _ask(fusion, measurement, work, pictures)
    measured = replace(measured, seconds=round(time.process_time() - started, 1))
    write_whole(work.measurement(measurement), json.dumps(asdict(measured)))


def conversation_pictures(pictures: Sequence[Picture]) -> Sequence[Picture]:
    """Return the pictures that conversations are about: their questions take longer."""
    return pictures[: -(-len(pictures) // 2)]


def _open(measurement: Measurement, work: Work) -> AbstractContextManager[Fusion]:
    if measurement.model == CHECKPOINT_WITHOUT_ALIGNMENT:
        return _without_alignment(work.checkpoint)
    return load(work.bundle(measurement.model), threads=1)  # threads of so small a model only wait for each other


@contextmanager
def _without_alignment(checkpoint: Path) -> Iterator[Fusion]:
    """Open the checkpoint with one thread: each processor has a process of its own."""
    import torch  # only for a checkpoint

    from fusion_edge.benchmarks.demo.without_alignment import WithoutAlignment
    from fusion_edge.export.reference.eager_backend import open_checkpoint

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with open_checkpoint(checkpoint, WithoutAlignment) as fusion:
            yield fusion
    finally:
        torch.set_num_threads(before)


@contextmanager
def _tier(name: str | None) -> Iterator[None]:
    """Let the CPU kernels use a tier, which this processor has; None: the fastest one."""
    if name is None:
        yield
        return
    cpu_kernels.use_tier(name)
    try:
        yield
    finally:
        cpu_kernels.use_tier(cpu_kernels.tiers()[-1])


def _ask(fusion: Fusion, measurement: Measurement, work: Work, pictures: Sequence[Picture]) -> Measured:
    is_reference = measurement == FLOAT
    reference = None if is_reference else np.load(work.reference, mmap_mode="r")
    rows: list[Floats] = []
    answers: list[str] = []
    far: list[float] = []
    choices: list[tuple[str, float]] = []
    for picture in pictures:
        image = Image.open(work.pictures / picture.image)
        with fusion.look(image, GUIDES[measurement.guide], query_length=measurement.latents) as scene:
            for question in picture.questions:
                given = decode_greedily(fusion, scene.prepare(question.text, sampling=SAMPLING))
                first, number = given.rows[0], len(answers)
                if reference is None:
                    rows.append(first)
                else:
                    far.append(float(divergences(reference[number][None], first[None])[0]))
                if number < work.chosen:
                    choice = scene.choose(question.text, candidates(question.kind, question.answer, number))
                    choices.append((choice.text, choice.probabilities[choice.text]))
                answers.append(given.text)
    if is_reference:
        partial = work.reference.with_name("partial.npy")
        np.save(partial, np.stack(rows))
        partial.replace(work.reference)
        far = [0.0] * len(answers)
    texts, probabilities = tuple(text for text, _ in choices), tuple(probability for _, probability in choices)
    return Measured(tuple(answers), tuple(far), texts, probabilities, fusion.manifest.size, 0.0)


def _converse(fusion: Fusion, measurement: Measurement, work: Work, pictures: Sequence[Picture]) -> Measured:
    """Hold the conversations. The history of a question has the model's own answers."""
    answers = []
    for picture in pictures:
        conversation = fusion.conversation(Image.open(work.pictures / picture.image))
        for question in picture.conversation:
            given = conversation.answer(question.text, query_length=measurement.latents, sampling=SAMPLING)
            answers.append(given.text)
    return Measured(tuple(answers), (), (), (), fusion.manifest.size, 0.0)
