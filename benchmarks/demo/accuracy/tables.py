"""What is measured: bundles, ways to ask them, and the tables of both. Data alone."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_edge.benchmarks.demo.pictures import GENERIC_GUIDES
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

FEWEST_LATENTS, MOST_LATENTS = 4, 16
GUIDES = {"question": None, "generic": GENERIC_GUIDES[0], "none": ""}
"""Text that guides the vision encoder. None: the question itself. Without text no row guides it."""
CHECKPOINT_WITHOUT_ALIGNMENT = "checkpoint-without-interaction-layers"
"""In place of a bundle: the checkpoint in the eager interpreter."""


@dataclass(frozen=True)
class Bundle:
    """An export of the checkpoint."""

    options: tuple[str, ...]
    """Of ``fusion-export``, without those of calibration data."""
    is_calibrated: bool = False
    same_size_as: str | None = None
    """Name of a bundle of mixed precision: about as many weights have 8 bits as there, in random linears."""
    seed: int = 0
    """Of the random choice."""


@dataclass(frozen=True)
class Measurement:
    """A model, and how it is asked."""

    model: str
    """Name of one of :data:`BUNDLES`, or :data:`CHECKPOINT_WITHOUT_ALIGNMENT`."""
    latents: int = MOST_LATENTS
    guide: str = "question"
    """A key of :data:`GUIDES`."""
    tier: str | None = None
    """Of the CPU kernels; None: the fastest one."""
    is_conversation: bool = False

    @property
    def name(self) -> str:
        """Name of its file."""
        tier = "" if self.tier is None else f"-{self.tier}"
        asked = "conversations" if self.is_conversation else f"guide-{self.guide}"
        return f"{self.model}-{self.latents}-latents-{asked}{tier}".replace(" ", "-")


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    label: str
    measurement: Measurement
    part: str = "all"
    """A key of :data:`~fusion_edge.benchmarks.demo.accuracy.report.PARTS`: the questions that count."""


@dataclass(frozen=True)
class Table:
    """Rows, and what their losses are against."""

    rows: tuple[Row, ...]
    base: Measurement


PATCHES = "--rule=vision.patch_embedding=fp16"
"""The Hessian of its 6,912 inputs takes most of a calibration's time. Beside 8-bit activations it has 16 bits, too."""


def _int4(group: str, *options: str) -> tuple[str, ...]:
    return "--int4", "--group-size", group, "--vision", "int8-weights", PATCHES, *options


GROUPS = ("32", "64", "128", "channel")
BITS = ("4.5", "5.5")
"""Budgets of mixed precision: mean bits per weight of the linears that ``--int4`` gives 4 bits."""
RANDOM_CHOICES = 3
"""Random choices for each budget."""
DEPLOYED = "int4-128-gptq-w8a8"
"""What ``fusion-export --int4 --calibrate`` makes."""
TENSORRT_OPTIONS = ("--int4", "--target=tensorrt", "--vision=int8-weights", "--rule=llm.lm_head=int8:channel")
BUNDLES: dict[str, Bundle] = {
    "fp32": Bundle(("--fp32",)),
    "int8-128": Bundle(("--int8",)),
    **{f"int4-{group}-rtn": Bundle(_int4(group)) for group in GROUPS},
    **{f"int4-{group}-gptq": Bundle(_int4(group), is_calibrated=True) for group in GROUPS},
    "nf4-64": Bundle(("--nf4",)),
    DEPLOYED: Bundle(("--int4", "--vision", "int8"), is_calibrated=True),
    "int4-128-gptq-int8-cache": Bundle(_int4("128", "--kv-cache", "int8"), is_calibrated=True),
    "int4-128-tensorrt": Bundle(TENSORRT_OPTIONS),
    **{f"int4-{bits}-bits": Bundle(_int4("128", "--bits", bits), is_calibrated=True) for bits in BITS},
    **{
        f"int4-{bits}-bits-random-{number}": Bundle(_int4("128"), True, f"int4-{bits}-bits", number)
        for bits in BITS
        for number in range(1, RANDOM_CHOICES + 1)
    },
    f"{DEPLOYED}-36-tokens": Bundle(("--int4", "--vision", "int8", "--image-tokens", "36"), is_calibrated=True),
}
"""Bundles by name."""

FLOAT = Measurement("fp32")
"""The reference of all divergences."""
_LABELS = {
    "fp32": "fp32",
    "int8-128": "int8:128",
    **{f"int4-{group}-{way}": f"int4:{group} {way.upper()}" for group in GROUPS for way in ("rtn", "gptq")},
    "nf4-64": "nf4:64",
    **{f"int4-{bits}-bits": f"int4:128 GPTQ, {bits} bits by sensitivity" for bits in BITS},
    DEPLOYED: "int4:128 GPTQ, 8-bit vision activations",
    "int4-128-gptq-int8-cache": "int4:128 GPTQ, int8 cache",
    "int4-128-tensorrt": "int4:128 RTN for TensorRT, on ONNX Runtime",
}
_MIXED = tuple(
    Row(label, Measurement(model))
    for bits in BITS
    for model, label in (
        (f"int4-{bits}-bits", f"{bits} bits by sensitivity"),
        *(
            (f"int4-{bits}-bits-random-{number}", f"{bits} bits, random choice {number}")
            for number in range(1, RANDOM_CHOICES + 1)
        ),
    )
)
_CONVERSATION_PARTS = ("first question", "follow-up", "follow-up of right answers")

TABLES = {
    "formats": Table(tuple(Row(label, Measurement(model)) for model, label in _LABELS.items()), FLOAT),
    "mixed": Table((Row("4 bits", Measurement("int4-128-gptq")), *_MIXED), FLOAT),
    "guides": Table(tuple(Row(guide, Measurement(DEPLOYED, guide=guide)) for guide in GUIDES), Measurement(DEPLOYED)),
    "details": Table(
        tuple(
            Row(f"{tokens} image tokens, {latents} latents", Measurement(model, latents))
            for tokens, model in ((64, DEPLOYED), (36, f"{DEPLOYED}-36-tokens"))
            for latents in (MOST_LATENTS, FEWEST_LATENTS)
        ),
        Measurement(DEPLOYED),
    ),
    "tiers": Table(tuple(Row(tier, Measurement(DEPLOYED, tier=tier)) for tier in cpu_kernels.TIERS), FLOAT),
    "parts": Table(
        (
            Row("all parts", FLOAT),
            Row("interaction layers off", Measurement(CHECKPOINT_WITHOUT_ALIGNMENT)),
            Row("text guidance off", Measurement("fp32", guide="none")),
            Row(f"all parts, {FEWEST_LATENTS} latents", Measurement("fp32", FEWEST_LATENTS)),
            Row(
                f"interaction layers off, {FEWEST_LATENTS} latents",
                Measurement(CHECKPOINT_WITHOUT_ALIGNMENT, FEWEST_LATENTS),
            ),
        ),
        FLOAT,
    ),
    "conversations": Table(
        tuple(
            Row(f"{label}, {part}", Measurement(model, is_conversation=True), part)
            for label, model in (("fp32", "fp32"), ("int4:128 GPTQ", DEPLOYED))
            for part in _CONVERSATION_PARTS
        ),
        Measurement("fp32", is_conversation=True),
    ),
}
"""Tables by name."""
