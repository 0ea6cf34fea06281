"""Which files of a checkpoint folder hold its weights, and what a folder without weights is instead."""

from __future__ import annotations

import re
from pathlib import Path

from fusion_edge.export.checkpoint.input_files import read_json_object
from fusion_edge.runtime.errors import FusionError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Each safetensors file with the tensors that the index places in it (None: there is no index).

    As the ``transformers`` library does, a single file goes before an index. Shards that tell their number need none.
    Raises :class:`FusionError` for a folder without weights, saying what it has instead, and for a damaged index.
    """
    is_single, has_index = (folder / SINGLE_FILE).exists(), (folder / INDEX_FILE).exists()
    shards = {} if is_single or has_index else _numbered(folder)
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
        raise FusionError(f"{index} has no weight_map that names each tensor's shard: download it again.")
    placed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise FusionError(
                f"{index} places {name} in {shard!r}, expected the name of a .safetensors file in the same "
                "folder: download the checkpoint again, from a source that you trust."
            )
        placed.setdefault(shard, set()).add(name)
    return {folder / shard: placed[shard] for shard in sorted(placed)}


def _numbered(folder: Path) -> list[Path]:
    """All of the shards that the first one found counts; one that is missing is missed when it is opened."""
    for path in sorted(folder.glob("model-*-of-*.safetensors")):
        if match := re.fullmatch(r"model-\d{5}-of-(\d{5})\.safetensors", path.name, re.ASCII):
            return [folder / f"model-{n:05}-of-{match[1]}.safetensors" for n in range(1, int(match[1]) + 1)]
    return []


def _check_adapter(folder: Path, has_weights: bool) -> None:
    """Raise :class:`FusionError` for an adapter, alone or beside weights that it would change."""
    adapters = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    if not has_weights:
        adapters.append(folder / "adapter_config.json")
    for adapter in adapters:
        if adapter.exists():
            raise FusionError(
                f"{folder} holds a LoRA adapter ({adapter.name}), which is only a change of its base model: merge it "
                "into that (merge_and_unload of the `peft` library), save the whole, and pass that folder."
            )


def _no_weights(folder: Path) -> FusionError:
    if (folder / "zero_to_fp32.py").exists():
        return FusionError(
            f"{folder} is a checkpoint of DeepSpeed in parts: put it together with "
            "`python zero_to_fp32.py . . --safe_serialization`, run in that folder."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return FusionError(
            f"{folder} has safetensors files of other names ({others[0]}), expected {SINGLE_FILE} or {INDEX_FILE} with "
            f"its shards: rename the model's file to {SINGLE_FILE}, or save the model again."
        )
    for pattern in ("pytorch_model*.bin", "*.pth", "*.pt", "*.bin"):
        pickles = sorted(folder.glob(pattern))
        if pickles:
            return FusionError(
                f"{folder} has only pickle weights ({pickles[0].name}), which can run code when loaded and "
                f"are not read: if you trust them, convert them there with `{_conversion(pattern)}`."
            )
    return FusionError(
        f"{folder} has no weights, expected {SINGLE_FILE} or {INDEX_FILE} with its shards (pickle weights "
        "are neither downloaded nor read): pass a complete checkpoint folder."
    )


def _conversion(pattern: str) -> str:
    """A shell command that rewrites the state dictionaries in the current folder as one safetensors file."""
    # Clones, because save_file refuses tensors that share memory (tied embeddings).
    return (
        'python -c "import glob, torch; from safetensors.torch import save_file; '
        f"save_file({{name: tensor.contiguous().clone() for file in sorted(glob.glob('{pattern}')) "
        "for name, tensor in torch.load(file, map_location='cpu', weights_only=True).items()}, "
        f"'{SINGLE_FILE}')\""
    )
