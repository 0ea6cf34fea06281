"""Write ``quantized/*.safetensors``: a small linear in each variant of each layout, quantized by the libraries.

Each file holds the tensors of a linear named ``linear`` as in a checkpoint, and ``dequantized``, the library's result.
Its metadata holds the checkpoint's ``quantization_config`` and the library versions. Each command needs a separate
environment::

    pip install gptqmodel==7.7.0 && python make_quantized_fixtures.py gptq
    pip install compressed-tensors==0.20.0 && python make_quantized_fixtures.py compressed-tensors
    pip install compressed-tensors==0.12.2 && python make_quantized_fixtures.py compressed-tensors-actorder
    pip install bitsandbytes==0.50.2 transformers==5.23.0 && python make_quantized_fixtures.py bitsandbytes

0.12.2 is one of the last releases of compressed-tensors that write reordered columns (``actorder: group``).
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "quantized"
ROWS, COLUMNS, GROUP = 64, 128, 32


def save(name: str, tensors: dict[str, Tensor], dequantized: Tensor, config: dict[str, Any], *packages: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    versions = {package: version(package) for package in ("torch", *packages)}
    metadata = {"quantization_config": json.dumps(config, default=str), "versions": json.dumps(versions)}
    stored = {f"linear.{part}": tensor.detach().clone().contiguous() for part, tensor in tensors.items()}
    stored["dequantized"] = dequantized.detach().clone().contiguous()
    save_file(stored, FOLDER / f"{name}.safetensors", metadata)


def weights() -> Tensor:
    torch.manual_seed(0)
    values = torch.randn(ROWS, COLUMNS) * 0.1
    values[0, :GROUP] += 1  # no negative number in a group: a zero point of 0
    return values


def scattered_groups() -> Tensor:
    """Return a random group for each column; groups are of equal size."""
    return (torch.randperm(COLUMNS) // GROUP).to(torch.int32)


def gptq() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    variants: dict[str, dict[str, Any]] = {
        "gptq-v1-sym": {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "format": "gptq"},
        "gptq-v1-asym": {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "format": "gptq"},
        "gptq-v1-channel": {"bits": 4, "group_size": -1, "sym": True, "desc_act": False, "format": "gptq"},
        "gptq-v2-asym-desc-act": {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": True, "format": "gptq_v2"},
        "gptq-v1-8bit-sym": {"bits": 8, "group_size": GROUP, "sym": True, "desc_act": False, "format": "gptq"},
        "gptq-v2-8bit-asym": {"bits": 8, "group_size": GROUP, "sym": False, "desc_act": False, "format": "gptq_v2"},
    }
    for name, options in variants.items():
        config = QuantizeConfig(**options, offload_to_disk=False)
        values, largest = weights(), 2 ** options["bits"] - 1
        size = options["group_size"] if options["group_size"] > 0 else COLUMNS
        groups = scattered_groups() if options["desc_act"] else (torch.arange(COLUMNS) // size).to(torch.int32)
        grouped = values[:, torch.argsort(groups, stable=True)].reshape(ROWS, -1, size)
        least, most = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        if options["sym"]:
            scales = torch.maximum(-least, most) * 2 / largest
            zeros = torch.full_like(scales, (largest + 1) // 2)
        else:
            scales = (most - least) / largest
            zeros = torch.round(-least / scales)
        linear = nn.Linear(COLUMNS, ROWS, bias=False)
        linear.weight.data = values
        packed = TorchLinear(
            **{key: options[key] for key in ("bits", "group_size", "sym", "desc_act")},
            in_features=COLUMNS,
            out_features=ROWS,
        )
        packed.pack_original(linear, scales, zeros, groups)
        packed.optimize = lambda *_: None  # compiles kernels
        packed.post_init()
        dequantized = packed.dequantize_weight().T
        if options["format"] == "gptq":
            convert_gptq_v2_to_v1_format_module(packed, config)
        tensors = {part: getattr(packed, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        save(name, tensors, dequantized, config.to_dict(), "gptqmodel")


def compressed_tensors(variants: dict[str, dict[str, Any]]) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    for name, options in variants.items():
        options = {"type": "int", **options}
        arguments = QuantizationArgs(**options)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        values, size = weights().to(torch.bfloat16), options.get("group_size") or COLUMNS
        groups = scattered_groups() if options.get("actorder") == "group" else None
        order = torch.arange(COLUMNS) if groups is None else torch.argsort(groups, stable=True)
        grouped = values[:, order].reshape(ROWS, -1, size)
        scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), arguments)
        state = {"weight": values, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero.to(torch.int8)}
        if groups is not None:
            state["weight_g_idx"] = groups
        packed, dequantized = _compress(state, scheme)
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized",
            quantization_status="compressed",
        )  # fmt: skip
        save(name, packed, dequantized, config.to_dict(), "compressed-tensors")


def _compress(state: dict[str, Tensor], scheme: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return the packed and the dequantized weight, by the API of the installed release."""
    if version("compressed-tensors") == "0.12.2":
        from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor

        compressor = PackedQuantizationCompressor()
        scale, groups = state["weight_scale"], state["weight_g_idx"]
        packed = compressor.compress_weight(state["weight"], scale, scheme.weights, state["weight_zero_point"], groups)
        packed |= {"weight_scale": scale, "weight_g_idx": groups}
        return packed, compressor.decompress_weight(packed, scheme.weights)
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Compressor

    packed = Compressor.compress(state, scheme)
    return packed, Compressor.decompress(packed, scheme)["weight"]


def bitsandbytes() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import BitsAndBytesConfig

    for name, quant_type, is_nested, dtype in (
        ("bnb-nf4", "nf4", False, torch.float32),
        ("bnb-nf4-nested", "nf4", True, torch.bfloat16),
        ("bnb-fp4", "fp4", False, torch.float32),
    ):
        values = weights().to(dtype)
        packed, state = quantize_4bit(values, quant_type=quant_type, compress_statistics=is_nested)
        parts = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=is_nested
        )
        tensors = {"weight": packed, **parts}
        stored = json.loads(config.to_json_string(use_diff=False))
        save(name, tensors, dequantize_4bit(packed, state), stored, "bitsandbytes", "transformers")
    _quantizer()


def _quantizer() -> None:
    """Save weights as bitsandbytes quantizes them: random ones, midpoints of codes, blocks of 0 and of 1e-40."""
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    torch.manual_seed(1)
    codes = get_4bit_type("nf4", "cpu")
    midpoints = (codes[1:] + codes[:-1]) / 2
    values = torch.randn(32, 128)
    values[0, :16], values[0, 16:31], values[0, 31:64] = codes, midpoints, 0
    values[1, :15] = torch.nextafter(midpoints, torch.tensor(1.0))
    values[1, 15:30] = torch.nextafter(midpoints, torch.tensor(-1.0))
    values[1, 30:64] = 0
    values[1, 63] = 1
    values[2, :64], values[2, 64:], values[3, :64] = 0, 1e-40, -0.0
    stored = {"weights": values}
    for kind in ("nf4", "fp4"):
        for size in (32, 64, 128):
            packed, state = quantize_4bit(values, blocksize=size, quant_type=kind)
            stored |= {f"{kind}.{size}.packed": packed, f"{kind}.{size}.absmax": state.absmax}
    metadata = {"versions": json.dumps({name: version(name) for name in ("torch", "bitsandbytes")})}
    save_file(stored, FOLDER / "bnb-quantizer.safetensors", metadata)


FORMATS: dict[str, dict[str, Any]] = {
    "ct-sym-group": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": GROUP},
    "ct-asym-group": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP},
    "ct-channel": {"num_bits": 8, "symmetric": True, "strategy": "channel"},
    "ct-asym-channel": {"num_bits": 4, "symmetric": False, "strategy": "channel"},
}
ACTORDER: dict[str, dict[str, Any]] = {
    "ct-actorder": {
        "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": GROUP, "actorder": "group"
    }
}  # fmt: skip

if __name__ == "__main__":
    {
        "gptq": gptq,
        "compressed-tensors": lambda: compressed_tensors(FORMATS),
        "compressed-tensors-actorder": lambda: compressed_tensors(ACTORDER),
        "bitsandbytes": bitsandbytes,
    }[sys.argv[1]]()
