"""Phases of the demo model's training."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.benchmarks.demo.questions import KINDS, LESSONS


@dataclass(frozen=True)
class Phase:
    """Part of the training."""

    name: str
    share: float
    """Share of the run's time."""
    rate: float
    """Peak learning rate."""
    pictures_per_step: int = 8
    questions_per_picture: int = 8
    """0: the vision tower learns codes, without the LLM."""
    packed: tuple[int, ...] = (8,)
    """Conversations in a sequence; each batch draws one of these numbers."""
    kinds: frozenset[str] = frozenset(KINDS | LESSONS)
    """Of these questions."""
    aligned: bool = True
    """Whether interaction layers run."""
    conversation_share: float = 0.0
    """Share of batches with conversations of three questions that follow from each other."""
    latent_scale: float = 1.0
    """Factor of the pooled latents."""
    image_share: float = 1.0
    """Share of batches with image tokens."""
    exact_codes: bool = False
    """Whether the LLM reads exact codes in place of the vision tower's features."""


LOOKUPS = frozenset({"what", "place", "where", "presence", "category", "background"})
"""Kinds of questions whose answers stand in one feature."""
REASONING = frozenset({"relation", "count", "odd"})
"""Kinds that need several: one feature tells where to look for the next, or things are compared."""

PHASES = (
    Phase("vision", share=0.33, rate=1.5e-3, pictures_per_step=12, questions_per_picture=0),
    Phase(
        "lookups",
        share=0.025,
        rate=1e-3,
        kinds=LOOKUPS,
        latent_scale=0,
        aligned=False,
        exact_codes=True,
    ),
    Phase(
        "reasoning",
        share=0.125,
        rate=1e-3,
        kinds=REASONING | {"place", "where", "presence"},
        latent_scale=0,
        aligned=False,
        exact_codes=True,
    ),
    Phase(
        "windows",
        share=0.07,
        rate=1e-3,
        image_share=0.3,
        exact_codes=True,
    ),
    Phase(
        "whole",
        share=0.45,
        rate=6e-4,
        packed=(1, 8, 8, 8),
        conversation_share=0.1,
        image_share=0.5,
    ),
)
"""The vision tower, which in a released model is a pre-trained SigLIP, learns first. Then the LLM learns to read exact
codes, which needs no vision tower: first the questions that one feature answers, because the others teach nothing until
the LLM finds features, and disturb. Interaction layers learn from batches without image tokens."""
