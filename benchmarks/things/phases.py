"""Phases of the demo model's training."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.benchmarks.things.questions import KINDS, LESSONS


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
    turns: tuple[int, ...] = (1,)
    """Questions in a sequence; each batch draws one of these numbers."""
    kinds: frozenset[str] = frozenset(KINDS | LESSONS)
    """Of these questions."""
    conversation_share: float = 0.0
    """Share of batches with conversations of three questions that follow from each other."""
    latent_scale: float = 1.0
    """Factor of the pooled latents."""
    image_share: float = 0.0
    """Share of batches with image tokens."""
    exact_codes: bool = False
    """Whether the LLM reads exact codes in place of the vision tower's features."""


NAMING = frozenset({"what", "place", "row", "description", "where"})
"""Kinds of questions whose answers name things or places."""

PHASES = (
    Phase("vision", share=0.3614, rate=1.5e-3, pictures_per_step=12),
    Phase(
        "names",
        share=0.0602,
        rate=1.2e-3,
        pictures_per_step=8,
        questions_per_picture=12,
        kinds=NAMING,
        latent_scale=0,
        exact_codes=True,
    ),
    Phase(
        "reading",
        share=0.2169,
        rate=1e-3,
        pictures_per_step=8,
        questions_per_picture=8,
        turns=(8,),
        conversation_share=0.1,
        image_share=0.5,
        exact_codes=True,
    ),
    Phase(
        "whole",
        share=0.3615,
        rate=6e-4,
        pictures_per_step=8,
        questions_per_picture=8,
        turns=(1, 8, 8, 8),
        conversation_share=0.1,
        image_share=0.75,
    ),
)
"""The vision tower, which in a released model is a pre-trained SigLIP, learns first. Then the LLM learns to read exact
codes, which needs no vision tower: several times as many questions a minute. Interaction layers learn only without
other inputs: a model that has image tokens and latents from the start ignores them."""
