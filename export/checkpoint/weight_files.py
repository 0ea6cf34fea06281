"""Find the safetensors files of a checkpoint folder. For a folder without any, describe what it holds instead."""

from __future__ import annotations

import re
from pathlib import Path

from fusion_edge.export.checkpoint.input_files import read_json_object
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.errors import FusionError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Return each safetensors file with the tensors that the index places in it. None: there is no index.

    As in ``transformers``, a single file takes precedence over an index. Numbered shards need no index. Raises
    :class:`FusionError` for a damaged index, and for a folder without weights, naming what it has instead.
    """
    is_single, has_index = (folder / SINGLE_FILE).exists(), (folder / INDEX_FILE).exists()
    shards = {} if is_single or has_index else _numbered_shards(folder)
    _check_adapter(folder, has_weights=is_single or has_index or bool(shards))
    if is_single:
        return {folder / SINGLE_FILE: None}
    if not has_index:
        if not shards:
            raise _no_weights(folder)
        return dict.fromkeys(shards)
    index = folder / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FusionError(f"{index} has no weight_map, which maps tensors to shards: download it again.")
    placed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise FusionError(
                f"{index} places tensor {name} in {shard!r}; expected a .safetensors file in the same folder. Download "
                "the checkpoint again, from a trusted source."
            )
        placed.setdefault(shard, set()).add(name)
    return {folder / shard: placed[shard] for shard in sorted(placed)}


def _numbered_shards(folder: Path) -> list[Path]:
    """Return all shards, by the count in the first one's name. A missing shard raises when it is opened."""
    for path in sorted(folder.glob("model-*-of-*.safetensors")):
        if match := re.fullmatch(r"model-\d{5}-of-(\d{5})\.safetensors", path.name, re.ASCII):
            return [folder / f"model-{n:05}-of-{match[1]}.safetensors" for n in range(1, int(match[1]) + 1)]
    return []


def _check_adapter(folder: Path, has_weights: bool) -> None:
    """Raise :class:`FusionError` for a LoRA adapter, with or without its base model's weights."""
    adapters = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    if not has_weights:
        adapters.append(folder / "adapter_config.json")
    for adapter in adapters:
        if adapter.exists():
            raise FusionError(
                f"{folder} holds a LoRA adapter ({adapter.name}): merge it into its base model (merge_and_unload of "
                "the `peft` library), save the model, and pass that folder."
            )


def _no_weights(folder: Path) -> FusionError:
    """Return the error for a folder without safetensors weights."""
    if (folder / MANIFEST).exists():
        return FusionError(
            f"{folder} is a bundle that fusion-export wrote; expected a checkpoint. Pass the checkpoint's folder, or "
            "run the bundle with fusion-run."
        )
    if (folder / "zero_to_fp32.py").exists():
        return FusionError(
            f"{folder} is a sharded DeepSpeed checkpoint: convert it with "
            "`python zero_to_fp32.py . . --safe_serialization`, run in that folder."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return FusionError(
            f"{folder} has safetensors files of other names ({others[0]}); expected {SINGLE_FILE}, or {INDEX_FILE} "
            f"with its shards. Rename the model's file to {SINGLE_FILE}, or save the model again."
        )
    for pattern in ("pytorch_model*.bin", "*.pth", "*.pt", "*.bin"):
        pickles = sorted(folder.glob(pattern))
        if pickles:
            return FusionError(
                f"{folder} has only pickle weights ({pickles[0].name}), which can run code when loaded: if you trust "
                f"them, convert them in that folder with `{_conversion_command(pattern)}`."
            )
    return FusionError(
        f"{folder} has no weights; expected {SINGLE_FILE}, or {INDEX_FILE} with its shards. Pass a complete checkpoint "
        "folder; pickle weights are neither downloaded nor read."
    )


def _conversion_command(pattern: str) -> str:
    """Return a shell command that converts the pickles in the current folder to one safetensors file."""
    # Clones, because save_file refuses tensors that share memory (tied embeddings).
    return (
        'python -c "import glob, torch; from safetensors.torch import save_file; '
        f"save_file({{name: tensor.contiguous().clone() for file in sorted(glob.glob('{pattern}')) "
        "for name, tensor in torch.load(file, map_location='cpu', weights_only=True).items()}, "
        f"'{SINGLE_FILE}')\""
    )
