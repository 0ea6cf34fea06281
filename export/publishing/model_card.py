"""The model card of a published bundle, made from its manifest and ``quantization.json``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.quantization_report import read_report
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import printable
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.hub.client import is_hub_id, open_client

MARK = "<!-- Written by fusion-export, and replaced at the next push. Delete this line to keep your own text. -->"
EXTRAS = {"cpu": "cpu,hub", "cuda": "cuda,hub", "tensorrt": "tensorrt-rtx,export"}
"""What runs a bundle, by target."""
_METADATA = re.compile(r"\A---\r?\n.*?^---\r?$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^(license(?:_name|_link)?): *[\"']?([\w][\w.:/+-]*)[\"']? *\r?$", re.ASCII | re.MULTILINE)
"""A license in a card's metadata. Its values are identifiers, file names and addresses."""
_ESCAPED = {ord(character): f"\\{character}" for character in "\\`|[]<>*_"}
CARD = """\
{header}
{mark}

# {title}

{source}: a [FUSION](https://arxiv.org/abs/2504.09925) vision-language model as three ONNX graphs, which `fusion-edge`
runs on robots and desktops, without PyTorch.

```sh
pip install '.[{extra}]'  # in a clone of fusion-edge
{build}fusion-run {hub_id} --image frame.jpg --ask "Is the path clear?"
```

```python
import fusion_edge

with fusion_edge.load("{hub_id}") as fusion:
    print(fusion.answer("frame.jpg", "Is the path clear?").text)
```

A robot should pin a commit: `--revision COMMIT`, `load(..., revision="COMMIT")`.

| | |
|---|---|
{facts}

Every file is listed in `bundle.json` with its SHA-256. `fusion-info {hub_id}` verifies all.
"""


def model_card(bundle: Bundle, hub_id: str, license_fields: Mapping[str, Any]) -> str:
    """Return the card of a bundle published as ``hub_id``: YAML metadata, then Markdown.

    ``license_fields`` are those of the checkpoint's card (see :func:`checkpoint_license`). Without them the card names
    no license: that is the user's to choose.

    Raises :class:`FusionError` if ``quantization.json`` is invalid.
    """
    from huggingface_hub import ModelCardData

    manifest = bundle.manifest
    origin = manifest.source if is_hub_id(manifest.source) else None
    metadata = ModelCardData(
        base_model=origin,
        base_model_relation="quantized" if origin else None,
        library_name="fusion-edge",
        pipeline_tag="image-text-to-text",
        tags=["fusion", "fusion-edge", "onnx", "robotics", manifest.precision, manifest.target],
        **license_fields,
    )
    name = _plain(manifest.source)
    link = f"[{name}](https://huggingface.co/{origin})" if origin else f"`{name}`"
    return CARD.format(
        header=f"---\n{metadata.to_yaml()}\n---",
        mark=MARK,
        title=_plain(hub_id.rpartition("/")[2]),
        source=f"{link} as {manifest.precision.upper()}",
        extra=EXTRAS[manifest.target],
        build=f"fusion-build {hub_id}\n" if manifest.target == "tensorrt" else "",
        hub_id=hub_id,
        facts="\n".join(f"| {name} | {_plain(value)} |" for name, value in _facts(bundle)),
    )


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
    manifest = bundle.manifest
    language, vision = manifest.model.language, manifest.model.vision
    return [
        ("Size", format_bytes(manifest.size)),
        ("Target", manifest.target),
        ("LLM", f"{language.layers} layers, width {language.hidden_size}, vocabulary {language.vocab_size}"),
        ("Vision", f"{vision.layers} layers, width {vision.width}, {vision.patches} patches per crop"),
        ("Image tokens", str(manifest.image_side**2)),
        ("Query lengths", ", ".join(map(str, manifest.query_lengths))),
        ("Context", f"{manifest.max_context} tokens, {manifest.cache} KV cache"),
        ("Weights", _formats(manifest)),
        *_quantization(bundle),
        ("Made by", manifest.producer),
    ]


def _formats(manifest: Manifest) -> str:
    counts = Counter(manifest.weights.values())
    return ", ".join(f"{count} in {weight_format}" for weight_format, count in counts.most_common())


def _quantization(bundle: Bundle) -> list[tuple[str, str]]:
    report = read_report(bundle)
    if report is None:
        return []
    samples = report.calibration_samples
    return [("Calibration", f"{samples} samples" if samples else "none"), *report.rows()]


def _plain(text: str) -> str:
    """Return a text that is no markup: one line, without what ends a cell, a link or a code span."""
    return printable(" ".join(text.split())).translate(_ESCAPED)


def checkpoint_license(folder: Path | None, source: str) -> dict[str, Any]:
    """Return ``license`` and its companions from a checkpoint's card, on disk or on the hub; empty if unknown."""
    from huggingface_hub.errors import HfHubHTTPError

    path = None if folder is None else folder / "README.md"
    if path is not None and path.is_file():
        metadata = _METADATA.match(path.read_text(encoding="utf-8", errors="replace"))
        return {} if metadata is None else dict(_LICENSE.findall(metadata[0]))
    if not is_hub_id(source):
        return {}
    try:
        card = open_client().model_info(source).card_data
    except HfHubHTTPError:  # the checkpoint is no longer there, or not for this user
        return {}
    fields = {} if card is None else {name: card.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in fields.items() if isinstance(value, str)}
