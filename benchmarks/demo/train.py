"""Train the demo model: ``python -m fusion_edge.benchmarks.demo.train --output FOLDER``.

The folder becomes a FUSION checkpoint, rewritten at every report; a run that was stopped goes on where it was.
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

PICTURES_A_STEP, QUESTIONS_A_PICTURE = 8, 8


@dataclass(frozen=True)
class Phase:
    """What the LLM is given of a picture in a part of the training."""

    name: str
    end: float
    """Share of the run's steps after which it is over."""
    latent_scale: float
    """Factor on what the latents pooled; at 0 all must come from their windows."""
    image_share: float
    """Share of batches that have image tokens."""
    vision_is_frozen: bool
    """The projected features of the global crops are computed once for the whole gallery. Only without image tokens:
    the local crop would train the tower."""


PHASES = (
    Phase("windows", end=0.7, latent_scale=0, image_share=0, vision_is_frozen=True),
    Phase("whole", end=1.0, latent_scale=1, image_share=0.7, vision_is_frozen=False),
)
"""The interaction layers learn only when there is no other way. Image tokens or latents alone could answer every
question of this task: a model that is given them all the time ignores its interaction layers (measured: switching
them off changed nothing)."""
VISION_RATE = 0.4  # the vision tower's learning rate, relative to the rest
WARM_UP = 200  # steps
DECAY = 0.75  # share of the run's steps after which the learning rate falls
VALIDATION_SEED, VALIDATION_PICTURES = 1, 96  # of the held-out split; evaluation takes another seed
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
        """Linear warm-up, constant for long, linear to a hundredth at the end."""
        progress = max(step / self.steps - DECAY, 0) / (1 - DECAY)
        return min((step + 1) / WARM_UP, 1 - 0.99 * progress)

    def update(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step; the losses of answers and mapping."""
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
        """The checkpoint, and the state to go on from; the latter replaced in one go."""
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
        """Go on from the folder's state, if it has one. Raises :class:`FusionError` if it is another run's."""
        if not (self.folder / STATE).exists():
            return
        state = torch.load(self.folder / STATE, weights_only=True)
        if (state["steps"], state["seed"]) != (self.steps, self.seed):
            raise FusionError(
                f"{self.folder} holds a run of {state['steps']} steps with seed {state['seed']}; ask for the "
                "same to go on, or choose another folder."
            )
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(state["leaves"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]


def _groups(names: list[str], leaves: dict[str, Tensor]) -> Iterator[tuple[float, float, list[str]]]:
    """(relative learning rate, weight decay, names): the tower learns slower, only matrices decay."""
    for in_tower in (True, False):
        for is_matrix in (True, False):
            group = [
                name
                for name in names
                if name.startswith(VISION_MODEL) == in_tower and (leaves[name].ndim > 1) == is_matrix
            ]
            yield VISION_RATE if in_tower else 1.0, 0.02 if is_matrix else 0.0, group


def accuracy(leaves: dict[str, Tensor], batches: Batches, phase: Phase, align: bool = True) -> dict[str, float]:
    """Share of exact answers on a gallery at the least query length, by kind and ``all``.

    The pictures are given as in a phase of the training, with image tokens if it has any.
    """
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    rng = np.random.default_rng(0)
    query_length = CONFIG.alignment.query_lengths[0]
    with torch.no_grad():
        for start in range(0, len(batches.gallery.shapes), PICTURES_A_STEP):
            chosen = range(start, start + PICTURES_A_STEP)
            inputs = phase.latent_scale, phase.image_share > 0
            batch = batches.batch(chosen, rng, QUESTIONS_A_PICTURE, query_length, *inputs)
            for question, correct in zip(batch.questions, run(leaves, batch, align).correct, strict=True):
                right[question.kind].append(bool(correct))
    shares = {kind: sum(answers) / max(len(answers), 1) for kind, answers in right.items()}
    everything = [answer for answers in right.values() for answer in answers]
    return {"all": sum(everything) / len(everything)} | shares


def train(training: Training, pictures: Batches, validation: Batches, report_every: int) -> None:
    """Run to the end, reporting and saving now and then."""
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
    """The batch of the present step: it follows from seed and step alone."""
    seed = [training.seed, training.step]
    with_image_tokens = np.random.default_rng([*seed, 1]).random() < phase.image_share
    return pictures.draw(seed, PICTURES_A_STEP, QUESTIONS_A_PICTURE, phase.latent_scale, bool(with_image_tokens))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=10000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--vision-steps", type=int, default=2000, help="pre-training steps (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=8000, help="different pictures (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="at its highest (default: %(default)s)")
    parser.add_argument("--report-every", type=int, default=500, help="steps between reports (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default: %(default)s)")
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
