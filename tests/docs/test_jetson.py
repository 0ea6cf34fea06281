"""The Jetson guide prepares what its later steps need."""

from __future__ import annotations

import json
import re

from support.paths import DEMO_CHECKPOINT, ROOT

from fusion_edge.benchmarks.acceptance import alignment
from fusion_edge.kernels.triton.ahead_of_time import HIDDEN_SIZES

GUIDE = (ROOT / "docs/jetson.md").read_text(encoding="utf-8")


def test_the_kernels_have_the_widths_of_the_acceptance() -> None:
    (command,) = re.findall(
        r"^python -m fusion_edge\.kernels\.triton\.ahead_of_time (?:.*\\\n)*.*$", GUIDE, re.MULTILINE
    )
    widths = set(map(int, re.findall(r"--width[ =](\d+)", command)))
    demo = json.loads((DEMO_CHECKPOINT / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    assert widths == {demo, alignment.WIDTH}
    (text,) = (part for part in GUIDE.split("\n\n") if part.startswith("Compile the kernels"))
    assert {*widths, *HIDDEN_SIZES} <= set(map(int, re.findall(r"\d+", text)))


def test_contiguous_memory_is_set_before_the_acceptance() -> None:
    """Without it the steps of the full size are skipped on an Orin Nano."""
    assert 0 < GUIDE.index("cma=950M/") < GUIDE.index("## 4. Check the device")
    assert GUIDE.index("## 3. Prepare the device") < GUIDE.index("cma=950M/")
