"""The demo model, of scenes of things that people know: pictures, questions, training and evaluation."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the committed checkpoint."""
