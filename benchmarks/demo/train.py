"""Train the demo model: ``python -m fusion_edge.benchmarks.demo.train --output FOLDER``.

The folder becomes a FUSION checkpoint, rewritten at every report. A stopped run resumes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusion_edge.benchmarks.demo.initialize import CONFIG, initial_tensors, write_checkpoint
from fusion_edge.benchmarks.demo.pictures import KINDS
from fusion_edge.benchmarks.demo.pretrain import pretrain
from fusion_edge.benchmarks.demo.training_data import Batch, Batches, Gallery
from fusion_edge.benchmarks.demo.training_model import (
    MAPPING_WEIGHT,
    gallery_features,
    run,
    with_full_kernel,
    with_small_kernel,
)
from fusion_edge.export.checkpoint.tensor_mapping import UNUSED, VISION_MODEL
from fusion_edge.runtime.errors import FusionError

PICTURES_PER_STEP, QUESTIONS_PER_PICTURE = 8, 8


@dataclass(frozen=True)
class Phase:
    """Part of the training, with the image inputs of the LLM."""

    name: str
    end: float
    """End, as a share of the run's steps."""
    latent_scale: float
    """Factor of the pooled latents; at 0 all information comes from their windows."""
    image_share: float
    """Share of batches with image tokens."""
    vision_is_frozen: bool
    """Whether the gallery's projected features are computed once. Requires batches without image tokens, because the
    local crop trains the tower."""


PHASES = (
    Phase("windows", end=0.7, latent_scale=0, image_share=0, vision_is_frozen=True),
    Phase("whole", end=1.0, latent_scale=1, image_share=0.7, vision_is_frozen=False),
)
"""Interaction layers learn only without other inputs. Image tokens or latents suffice for every question of this task,
so a model trained with them from the start ignores its interaction layers (disabling them changed no answer)."""
VISION_RATE = 0.4  # learning rate of the vision tower, relative to the rest
WARM_UP = 200  # steps
DECAY = 0.75  # start of the learning rate decay, as a share of the steps
VALIDATION_SEED, VALIDATION_PICTURES = 1, 96  # of the held-out split; evaluation uses another seed
STATE = "training-state.pt"

log = logging.getLogger(__name__)


class Training:
    """Weights, optimizer and step of a run."""

    def __init__(self, folder: Path, steps: int, rate: float, seed: int) -> None:
        self.folder, self.steps, self.seed = folder, steps, seed
        self.leaves = with_small_kernel(initial_tensors(seed))
        names = [name for name in self.leaves if name not in UNUSED]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.leaves[name] for name in group], "lr": rate * scale, "weight_decay": decay}
                for scale, decay, group in _groups(names, self.leaves)
            ],
            betas=(0.9, 0.98),
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step = 0

    def _rate(self, step: int) -> float:
        """Return the rate of a step: linear warm-up, constant, linear decay to a hundredth."""
        progress = max(step / self.steps - DECAY, 0) / (1 - DECAY)
        return min((step + 1) / WARM_UP, 1 - 0.99 * progress)

    def update(self, batch: Batch) -> tuple[float, float]:
        """Run an optimizer step; return the losses of answers and mapping."""
        outcome = run(self.leaves, batch)
        self.optimizer.zero_grad()
        (outcome.answer_loss + MAPPING_WEIGHT * outcome.mapping_loss).backward()  # type: ignore[no-untyped-call]
        trained = [leaf for group in self.optimizer.param_groups for leaf in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return outcome.answer_loss.item(), outcome.mapping_loss.item()

    def save(self) -> None:
        """Write the checkpoint, and atomically the state to resume from."""
        write_checkpoint(self.folder, with_full_kernel(self.leaves))
        state = {
            "leaves": self.leaves,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "steps": self.steps,
            "seed": self.seed,
        }
        temporary = self.folder / f"{STATE}.part"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / STATE)

    def resume(self) -> None:
        """Resume from the folder's state, if any. Raises :class:`FusionError` for the state of another run."""
        if not (self.folder / STATE).exists():
            return
        state = torch.load(self.folder / STATE, weights_only=True)
        if (state["steps"], state["seed"]) != (self.steps, self.seed):
            raise FusionError(
                f"{self.folder} has a run of {state['steps']} steps with seed {state['seed']}; pass the "
                "same values to resume it, or another --output."
            )
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(state["leaves"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]


def _groups(names: list[str], leaves: dict[str, Tensor]) -> Iterator[tuple[float, float, list[str]]]:
    """Yield (relative learning rate, weight decay, names): the tower learns slower, only matrices decay."""
    for in_tower in (True, False):
        for is_matrix in (True, False):
            group = [
                name
                for name in names
                if name.startswith(VISION_MODEL) == in_tower and (leaves[name].ndim > 1) == is_matrix
            ]
            yield VISION_RATE if in_tower else 1.0, 0.02 if is_matrix else 0.0, group


def accuracy(leaves: dict[str, Tensor], batches: Batches, phase: Phase, align: bool = True) -> dict[str, float]:
    """Return the share of exact answers on a gallery at the smallest query length, by kind and ``all``.

    Image inputs are those of a training phase.
    """
    exact: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    rng = np.random.default_rng(0)
    query_length = CONFIG.alignment.query_lengths[0]
    with torch.no_grad():
        for start in range(0, len(batches.gallery.shapes), PICTURES_PER_STEP):
            chosen = range(start, start + PICTURES_PER_STEP)
            inputs = phase.latent_scale, phase.image_share > 0
            batch = batches.batch(chosen, rng, QUESTIONS_PER_PICTURE, query_length, *inputs)
            for question, correct in zip(batch.questions, run(leaves, batch, align).correct, strict=True):
                exact[question.kind].append(bool(correct))
    shares = {kind: sum(answers) / max(len(answers), 1) for kind, answers in exact.items()}
    everything = [answer for answers in exact.values() for answer in answers]
    return {"all": sum(everything) / len(everything)} | shares


def train(training: Training, pictures: Batches, validation: Batches, report_every: int) -> None:
    """Train to the end, with reports and checkpoints."""
    started, first, losses = time.monotonic(), training.step, []
    for phase in PHASES:
        end = round(phase.end * training.steps)
        if training.step < end:
            log.info("phase %s, to step %d", phase.name, end)
            frozen = phase.vision_is_frozen
            pictures.features = gallery_features(training.leaves, pictures.gallery.crops) if frozen else None
        while training.step < end:
            losses.append(training.update(_draw(training, pictures, phase)))
            if training.step % 50 == 0:
                pace = (time.monotonic() - started) / (training.step - first)
                log.info("step %d: answers %.3f, mapping %.3f, %.2f s a step", training.step, *np.mean(losses, 0), pace)
                losses = []
            if training.step % report_every == 0 or training.step == training.steps:
                training.save()
                for name, align in (("aligned", True), ("interaction layers off", False)):
                    shares = accuracy(training.leaves, validation, phase, align)
                    log.info("%s: %s", name, ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))


def _draw(training: Training, pictures: Batches, phase: Phase) -> Batch:
    """Draw the batch of the present step, which depends on seed and step only."""
    seed = [training.seed, training.step]
    with_image_tokens = np.random.default_rng([*seed, 1]).random() < phase.image_share
    return pictures.draw(seed, PICTURES_PER_STEP, QUESTIONS_PER_PICTURE, phase.latent_scale, bool(with_image_tokens))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--steps", type=int, default=10000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--vision-steps", type=int, default=2000, help="pre-training steps (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=8000, help="number of pictures (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--report-every", type=int, default=500, help="steps between reports (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and pictures (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    try:
        training = Training(options.output, options.steps, options.learning_rate, options.seed)
        training.resume()
        write_checkpoint(options.output, with_full_kernel(training.leaves))
        log.info("rendering %d pictures", options.pictures)
        pictures = Batches(Gallery.render("train", options.seed, options.pictures), options.output)
        if training.step == 0:
            pretrain(training.leaves, pictures.gallery, options.vision_steps, options.seed)
        held_out = Gallery.render("held_out", VALIDATION_SEED, VALIDATION_PICTURES)
        train(training, pictures, Batches(held_out, options.output), options.report_every)
    except FusionError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
