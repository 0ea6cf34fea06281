"""Phases of the demo model's training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Part of the training."""

    name: str
    share: float
    """Share of the run's time."""
    rate: float
    """Peak learning rate."""
    pictures_per_step: int
    questions_per_picture: int = 0
    """0: the vision tower learns codes, without the LLM."""
    latent_scale: float = 1.0
    """Factor of the pooled latents."""
    image_share: float = 0.0
    """Share of batches with image tokens."""
    vision_is_frozen: bool = False
    """Whether the gallery's projected features are computed once. Requires batches without image tokens, because the
    local crop trains the tower."""


PHASES = (
    Phase("vision", share=0.3, rate=1.5e-3, pictures_per_step=12),
    Phase(
        "windows",
        share=0.25,
        rate=1.2e-3,
        pictures_per_step=8,
        questions_per_picture=6,
        latent_scale=0,
        vision_is_frozen=True,
    ),
    Phase("whole", share=0.45, rate=8e-4, pictures_per_step=8, questions_per_picture=6, image_share=0.75),
)
"""The vision tower, which in a released model is a pre-trained SigLIP, learns first. Interaction layers learn only
without other inputs: a model that has image tokens and latents from the start ignores its interaction layers."""
