"""Prequantized checkpoints for tests: random weights in a layout, and fixtures made by the libraries."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import TINY, write_checkpoint
from support.paths import QUANTIZED
from torch import Tensor, from_numpy

from fusion_edge.export.checkpoint.prequantized import compressed_tensors, gptq
from fusion_edge.export.checkpoint.prequantized.int32_packing import pack_int32
from fusion_edge.runtime.bundle.config import FusionConfig

Tensors = dict[str, Tensor]
Pack = Callable[[str, int, int], Tensors]
"""Return the tensors of a random linear ``[rows, inputs]``, by the suffix of the linear's name."""

SMALL = dataclasses.replace(
    TINY, language=dataclasses.replace(TINY.language, hidden_size=64, mlp_width=128, heads=4, kv_heads=4)
)
"""Its ``mlp.down`` is ``[64, 128]``, like the fixtures."""
DOWN = "model.layers.0.mlp.down_proj"
VARIANTS = sorted(path.stem for path in QUANTIZED.glob("*.safetensors") if path.stem != "bnb-quantizer")


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One linear as a library quantized it."""

    config: dict[str, Any]
    """``quantization_config``."""
    tensors: Tensors
    """Tensors by the suffix of the linear's name."""
    dequantized: Tensor
    """Weights ``[64, 128]``, dequantized by the library."""


def read_fixture(name: str) -> Fixture:
    """Read one of :data:`VARIANTS`."""
    path = QUANTIZED / f"{name}.safetensors"
    with safe_open(path, "np") as file:
        config = json.loads(file.metadata()["quantization_config"])
    tensors = load_file(path)
    dequantized = tensors.pop("dequantized")
    return Fixture(config, {key.removeprefix("linear"): tensor for key, tensor in tensors.items()}, dequantized)


def write_quantized(
    folder: Path,
    config: dict[str, Any],
    tensors: Tensors,
    pack: Pack | None = None,
    pattern: str = r"model\.layers\.",
    model: FusionConfig = SMALL,
) -> Path:
    """Write a checkpoint whose first ``mlp.down`` is ``tensors``. ``pack`` makes the other linears that match."""
    write_checkpoint(folder, model)
    stored: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        stored |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    for name in [name for name in stored if name.endswith(".weight") and stored[name].ndim == 2]:
        module = name.removesuffix(".weight")
        if module == DOWN:
            stored.pop(name)
            stored |= {f"{module}{part}": tensor for part, tensor in tensors.items()}
        elif pack is not None and re.match(pattern, name):
            stored |= {f"{module}{part}": tensor for part, tensor in pack(module, *stored.pop(name).shape).items()}
    save_file(stored, folder / "model.safetensors")
    edit_config(folder, quantization_config=config)
    return folder


def edit_config(folder: Path, **values: object) -> None:
    """Set fields of ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint that :func:`write_quantized` wrote."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def packer(name: str, seed: int = 0) -> Pack:
    """Return a function that makes random linears in a variant's layout. Equal inputs share a column order."""
    config = read_fixture(name).config
    draw = np.random.default_rng(seed)

    def scales(rows: int, groups: int) -> npt.NDArray[np.float32]:
        return draw.uniform(0.01, 0.03, (rows, groups)).astype(np.float32)

    def pack_gptq(module: str, rows: int, inputs: int) -> Tensors:
        bits, version = config["bits"], gptq.VERSIONS[config["checkpoint_format"]]
        size = config["group_size"] if config["group_size"] > 0 else inputs
        groups = np.arange(inputs, dtype=np.int32) // size
        if config["desc_act"]:
            groups = np.random.default_rng(inputs).permutation(groups)
        shape, middle = (rows, -(-inputs // size)), 1 << (bits - 1)
        zeros = np.full(shape, middle) if config["sym"] else draw.integers(0, 2 * middle, shape)
        values = draw.integers(0, 2 * middle, (rows, inputs))
        arrays = {
            ".qweight": gptq.pack_weight(values.astype(np.uint8), bits),
            ".qzeros": gptq.pack_zeros(zeros.astype(np.uint8), bits, version),
            ".scales": scales(*shape).T.astype(np.float16).copy(),
            ".g_idx": groups,
        }
        return {part: from_numpy(array) for part, array in arrays.items()}

    def pack_compressed(module: str, rows: int, inputs: int) -> Tensors:
        weights = config["config_groups"]["group_0"]["weights"]
        bits, size = weights["num_bits"], weights["group_size"] or inputs
        shape, limit = (rows, -(-inputs // size)), 1 << weights["num_bits"]
        values = draw.integers(0, limit, (rows, inputs)).astype(np.uint8)
        arrays: dict[str, npt.NDArray[Any]] = {
            ".weight_packed": pack_int32(values, bits),
            ".weight_shape": np.array([rows, inputs]),
        }
        if not weights["symmetric"]:
            zeros = draw.integers(0, limit, shape).astype(np.uint8)
            arrays[".weight_zero_point"] = compressed_tensors.pack_zeros(zeros, bits)
        if weights.get("actorder") == "group":
            groups = np.arange(inputs, dtype=np.int32) // size
            arrays[".weight_g_idx"] = np.random.default_rng(inputs).permutation(groups)
        tensors = {part: from_numpy(array) for part, array in arrays.items()}
        return tensors | {".weight_scale": from_numpy(scales(*shape)).bfloat16()}

    def pack_bitsandbytes(module: str, rows: int, inputs: int) -> Tensors:
        kind, count = config["bnb_4bit_quant_type"], rows * inputs
        state = {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": [rows, inputs]}
        codes = read_fixture(f"bnb-{kind}").tensors[".weight.quant_map"]
        tensors = {".weight": from_numpy(draw.integers(0, 256, (count // 2, 1)).astype(np.uint8))}
        if config["bnb_4bit_use_double_quant"]:
            blocks = count // 64
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
            tensors |= {
                ".weight.absmax": from_numpy(draw.integers(0, 256, blocks).astype(np.uint8)),
                ".weight.nested_absmax": from_numpy(scales(1, -(-blocks // 256))[0]),
                ".weight.nested_quant_map": read_fixture("bnb-nf4-nested").tensors[".weight.nested_quant_map"],
            }
        else:
            tensors[".weight.absmax"] = from_numpy(scales(1, count // 64)[0])
        stored = from_numpy(np.frombuffer(json.dumps(state).encode(), np.uint8).copy())
        return tensors | {".weight.quant_map": codes, f".weight.quant_state.bitsandbytes__{kind}": stored}

    return {"gptq": pack_gptq, "compressed-tensors": pack_compressed, "bitsandbytes": pack_bitsandbytes}[
        config["quant_method"]
    ]
