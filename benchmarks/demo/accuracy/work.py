"""The folder of a run: pictures, bundles and finished measurements, which a later run reuses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_edge.benchmarks.demo.accuracy.held_out import QUESTIONS_PER_PICTURE
from fusion_edge.benchmarks.demo.accuracy.tables import BUNDLES, Measurement
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.system.output_file import write_whole

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Work:
    """Paths in the folder, and what its content depends on."""

    folder: Path
    checkpoint: Path
    questions: int
    """Questions of their own."""
    chosen: int
    """The first of them are also asked with choices."""
    calibrating: int
    """Calibration samples."""

    @property
    def count(self) -> int:
        """Number of pictures."""
        return -(-self.questions // QUESTIONS_PER_PICTURE)

    @property
    def pictures(self) -> Path:
        """Folder of held-out pictures."""
        return self.folder / "pictures"

    @property
    def samples(self) -> Path:
        """Folder of calibration samples, from the training split."""
        return self.folder / "calibration"

    @property
    def reference(self) -> Path:
        """Log-probabilities of fp32's first token: float32 ``[questions, V]``."""
        return self.folder / "measurements" / "fp32.npy"

    def bundle(self, name: str) -> Path:
        """Return the folder of a bundle."""
        return self.folder / "bundles" / name

    def measurement(self, measurement: Measurement) -> Path:
        """Return the file of a finished measurement."""
        return self.folder / "measurements" / f"{measurement.name}.json"

    def open(self) -> None:
        """Create the folder, or check that it is one of the same settings.

        Raises :class:`UsageError` for other settings, :class:`FusionError` for a folder without a checkpoint.
        """
        digest = hashlib.sha256()
        if not all(list(self.checkpoint.glob(pattern)) for pattern in ("config.json", "*.safetensors")):
            raise FusionError(f"{self.checkpoint} has no checkpoint; expected config.json and model-*.safetensors.")
        for pattern in ("*.json", "*.safetensors", "tokenizer.model"):
            for file in sorted(self.checkpoint.glob(pattern)):
                digest.update(file.read_bytes())
        counts = {"questions": self.questions, "chosen": self.chosen, "calibrating": self.calibrating}
        exports = {name: asdict(bundle) for name, bundle in BUNDLES.items()}
        settings = json.dumps({"checkpoint": digest.hexdigest(), **counts, "bundles": exports}, indent=1)
        file = self.folder / SETTINGS
        if file.exists() and file.read_text(encoding="utf-8") != settings:
            raise UsageError(
                f"{self.folder} holds results of another checkpoint, other numbers or other exports; choose another "
                "--work."
            )
        for folder in (self.reference.parent, self.bundle("any").parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, settings)
