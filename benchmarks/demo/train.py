"""Train the demo model: ``python -m fusion_edge.benchmarks.demo.train --output FOLDER``.

The folder becomes a FUSION checkpoint, rewritten at every report. A stopped run resumes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.codes import Codes
from fusion_edge.benchmarks.demo.gallery import Gallery
from fusion_edge.benchmarks.demo.initialize import CONFIG, initial_tensors, write_checkpoint
from fusion_edge.benchmarks.demo.phases import PHASES, Phase
from fusion_edge.benchmarks.demo.tokenizer import write_tokenizer
from fusion_edge.benchmarks.demo.training_data import Batches, Inputs, centered
from fusion_edge.benchmarks.demo.training_model import (
    MAPPING_WEIGHT,
    patch_loss,
    run,
    with_full_kernel,
    with_small_kernel,
)
from fusion_edge.export.checkpoint.tensor_mapping import UNUSED, VISION_MODEL
from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import positive_integer, positive_minutes
from fusion_edge.runtime.errors import FusionError

VISION_RATE = 0.3  # learning rate of the vision tower beside the LLM, relative to the rest
WARM_UP = 0.03  # share of a phase
DECAY = 0.4  # share of a phase at whose end the learning rate falls
VALIDATION_SEED, VALIDATION_PICTURES, VALIDATION_QUESTIONS = 1, 128, 4  # of the held-out split
STATE = "training-state.pt"
LOG_EVERY = 50  # steps

log = logging.getLogger(__name__)


class Training:
    """Weights, optimizer and clock of a run."""

    def __init__(self, folder: Path, minutes: float, picture_count: int, seed: int) -> None:
        self.folder, self.minutes, self.seed = folder, minutes, seed
        self.options = {"minutes": minutes, "pictures": picture_count, "seed": seed}
        tensors = initial_tensors(seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder)
        self.codes = Codes.draw(seed)
        self.codes.start_names(tensors, Tokenizer.from_str(tokenizer_json(folder)))
        self.leaves = with_small_kernel(tensors)
        self.phase = 0  # index of PHASES
        self.step = 0  # of all phases
        self.seconds = 0.0  # of the phase
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.AdamW:
        only_vision = PHASES[self.phase].questions_per_picture == 0
        names = [name for name in self.leaves if name not in UNUSED]
        if only_vision:
            names = [name for name in names if name.startswith(VISION_MODEL) or "mm_projector" in name]
        groups = _groups(names, self.leaves)
        return torch.optim.AdamW(
            [
                {
                    "params": [self.leaves[name] for name in group],
                    "weight_decay": decay,
                    "scale": VISION_RATE if in_tower and not only_vision else 1.0,
                }
                for in_tower, decay, group in groups
                if group
            ],
            betas=(0.9, 0.98),
            fused=True,
        )

    @property
    def progress(self) -> float:
        """Part of the phase that is over; 1 or more at its end."""
        return self.seconds / (60 * self.minutes * PHASES[self.phase].share)

    def update(self, loss: Tensor) -> None:
        """Run an optimizer step at the rate of this moment: linear warm-up, constant, linear decay."""
        rate = PHASES[self.phase].rate * min(self.progress / WARM_UP + 0.01, 1, (1.02 - self.progress) / DECAY)
        for group in self.optimizer.param_groups:
            group["lr"] = max(rate, 0.0) * group["scale"]
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        trained = [leaf for group in self.optimizer.param_groups for leaf in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.step += 1

    def next_phase(self) -> None:
        self.phase, self.seconds = self.phase + 1, 0.0
        if self.phase < len(PHASES):
            self.optimizer = self._optimizer()

    def save(self) -> None:
        """Write the checkpoint, and atomically the state to resume from."""
        write_checkpoint(self.folder, with_full_kernel(self.leaves))
        state = {
            "leaves": self.leaves,
            "optimizer": self.optimizer.state_dict(),
            "position": (self.phase, self.step, self.seconds),
            "options": self.options,
        }
        temporary = self.folder / f"{STATE}.part"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / STATE)

    def resume(self) -> None:
        """Resume from the folder's state, if any. Raises :class:`FusionError` for the state of another run."""
        if not (self.folder / STATE).exists():
            return
        state = torch.load(self.folder / STATE, weights_only=True)
        if state["options"] != self.options:
            given = " ".join(f"--{name} {value:g}" for name, value in state["options"].items())
            raise FusionError(
                f"{self.folder} has a run with {given}; pass the same values to resume it, or another --output."
            )
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(state["leaves"][name])
        self.phase, self.step, self.seconds = state["position"]
        if self.phase < len(PHASES):
            self.optimizer = self._optimizer()
            self.optimizer.load_state_dict(state["optimizer"])


def _groups(names: list[str], leaves: Mapping[str, Tensor]) -> Iterator[tuple[bool, float, list[str]]]:
    """Yield (of the vision tower, weight decay, names): only matrices decay."""
    for in_tower in (True, False):
        for is_matrix in (True, False):
            group = [
                name
                for name in names
                if name.startswith(VISION_MODEL) == in_tower and (leaves[name].ndim > 1) == is_matrix
            ]
            yield in_tower, 0.02 if is_matrix else 0.0, group


def train(training: Training, batches: Batches, validation: Batches, report_minutes: float) -> None:
    """Train to the end, with reports and checkpoints."""
    while training.phase < len(PHASES):
        phase = PHASES[training.phase]
        log.info("phase %s from step %d, for %.1f minutes", phase.name, training.step, training.minutes * phase.share)
        before = training.seconds
        started, reported = time.monotonic() - before, before
        for one in (batches, validation):
            one.codes = training.codes if phase.exact_codes else None
        losses: list[tuple[float, float]] = []
        while training.progress < 1:
            losses.append(_step(training, batches, phase))
            training.seconds = time.monotonic() - started
            if training.step % LOG_EVERY == 0:
                first, second = np.mean(losses, 0)
                names = ("answers", "mapping") if phase.questions_per_picture else ("patches", "right")
                log.info("step %d, %.0f %%: %s %.3f, %s %.3f", training.step, 100 * training.progress,
                         names[0], first, names[1], second)  # fmt: skip
                losses = []
            if training.seconds - reported > 60 * report_minutes:
                reported = training.seconds
                _report(training, validation, phase)
        training.next_phase()
        _report(training, validation, phase)


def _step(training: Training, batches: Batches, phase: Phase) -> tuple[float, float]:
    """Run a step on the batch of this step, which depends on seed and step only. Return two figures for the log."""
    seed = [training.seed, training.step]
    with torch.autocast("cpu", torch.bfloat16):
        if phase.questions_per_picture == 0:
            gallery = batches.gallery
            chosen = np.random.default_rng(seed).choice(len(gallery.scenes), phase.pictures_per_step, replace=False)
            crops, labels = torch.from_numpy(gallery.crops[chosen]), torch.from_numpy(gallery.labels[chosen])
            loss, second = patch_loss(training.leaves, training.codes, centered(crops), labels)
            first = loss
        else:
            outcome = run(training.leaves, batches.draw(seed, phase), phase.aligned)
            loss = outcome.answer_loss + MAPPING_WEIGHT * outcome.mapping_loss
            first, second = outcome.answer_loss, outcome.mapping_loss
    training.update(loss)
    return first.item(), second.item()


def _report(training: Training, validation: Batches, phase: Phase) -> None:
    """Write the checkpoint and log figures of held-out pictures."""
    training.save()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if phase.questions_per_picture == 0:
            crops, labels = (torch.from_numpy(a[:64]) for a in (validation.gallery.crops, validation.gallery.labels))
            for name, part in (("global", slice(0, 4)), ("local", slice(4, 5))):
                _, right = patch_loss(training.leaves, training.codes, centered(crops[:, part]), labels[:, part])
                log.info("held out, %s crops: %.1f %% of covered patches right", name, 100 * right.item())
            return
        ways = {"interaction layers off": False} | ({"aligned": True} if phase.aligned else {})
        for name, align in ways.items():
            for query_length in CONFIG.alignment.query_lengths:
                inputs = Inputs(query_length, phase.latent_scale, phase.image_share > 0)
                shares = accuracy(training.leaves, validation, inputs, align)
                text = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items())
                log.info("held out, %s, %d latents: %s", name, query_length, text)


def accuracy(leaves: Mapping[str, Tensor], batches: Batches, inputs: Inputs, align: bool = True) -> dict[str, float]:
    """Return the share of exact answers to single questions on a gallery, by kind and ``all``."""
    exact: dict[str, list[bool]] = defaultdict(list)
    rng = np.random.default_rng(0)
    scenes = batches.gallery.scenes
    with torch.no_grad():
        for start in range(0, len(scenes), 8):
            chosen = range(start, min(start + 8, len(scenes)))
            asked = [q for i in chosen for q in pictures.ask(scenes[i], rng, VALIDATION_QUESTIONS)]
            batch = batches.batch(chosen, [[[question]] for question in asked], inputs)
            for question, correct in zip(asked, run(leaves, batch, align).correct, strict=True):
                exact[question.kind].append(bool(correct))
    everything = [answer for answers in exact.values() for answer in answers]
    kinds = sorted(exact.items())
    return {"all": float(np.mean(everything))} | {kind: float(np.mean(answers)) for kind, answers in kinds}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="checkpoint folder")
    add("--minutes", type=positive_minutes, default=76, help="time to train, without rendering (default: %(default)s)")
    add("--pictures", type=_pictures, default=24000, help="number of pictures (default: %(default)s)")
    add("--report-minutes", type=positive_minutes, default=4, help="time between reports (default: %(default)s)")
    add(
        "--threads",
        type=positive_integer,
        default=2,
        help="PyTorch threads and rendering processes (default: %(default)s)",
    )
    add("--seed", type=_seed, default=0, help="seed of weights and pictures (default: %(default)s)")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    training = Training(options.output, options.minutes, options.pictures, options.seed)
    training.resume()
    log.info("rendering %d pictures", options.pictures)
    gallery = Gallery.render("train", options.seed, options.pictures, options.threads)
    held_out = Gallery.render("held_out", VALIDATION_SEED, VALIDATION_PICTURES)
    train(training, Batches(gallery, options.output), Batches(held_out, options.output), options.report_minutes)
    return 0


def _pictures(text: str) -> int:
    least = max(phase.pictures_per_step for phase in PHASES)
    if positive_integer(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is less than the {least} pictures of a step")
    return int(text)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 4294967295")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
